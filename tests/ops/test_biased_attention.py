"""Attention with a relative bias against numpy, with a cache, and packed."""

import jax
import jax.numpy as jnp
import numpy as np

from paxlike.ops.biased_attention import biased_attention, bucket


def test_buckets_of_t5():
    found = np.asarray(bucket(jnp.asarray([-3, 0, 1, 15, 16, 20, 40, 127, 128, 5000]), 32))
    # Exact up to 15, then 16 + floor(16 log(distance / 16) / log(8)), at most 31.
    assert found.tolist() == [0, 0, 1, 15, 16, 17, 23, 31, 31, 31]


def naive(q, k, v, table, segments, scale):
    out = np.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for i in range(q.shape[1]):
                seen = [j for j in range(i + 1) if segments[b, j] == segments[b, i]]
                score = [
                    scale * q[b, i, h] @ k[b, j, h // 2] + table[min(i - j, 1), h] for j in seen
                ]
                powers = np.exp(score)
                weights = powers / (powers.sum() + 1.0)  # one more score of 0
                out[b, i, h] = sum(w * v[b, j, h // 2] for w, j in zip(weights, seen))
    return out


def test_values_equal_numpy_and_a_cache_gives_the_same():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 6, n, 4)).astype(np.float32) for n in (4, 2, 2))
    table = rng.normal(size=(2, 4)).astype(np.float32)
    segments = np.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 1]], np.int32)
    # Two buckets: the query itself, and all that lies before it.
    options = {"scale": 0.7, "extra_logit": True}
    q, k, v, table = map(jnp.asarray, (q, k, v, table))
    found = biased_attention(q, k, v, table, segments=jnp.asarray(segments), **options)
    np.testing.assert_allclose(
        found, naive(*map(np.asarray, (q, k, v, table)), segments, 0.7), atol=1e-5
    )
    whole = biased_attention(q, k, v, table, **options)
    for i in range(6):
        offset = jnp.full((2,), i, jnp.int32)
        one = biased_attention(q[:, i : i + 1], k, v, table, offset=offset, **options)
        np.testing.assert_allclose(one, whole[:, i : i + 1], atol=1e-5)


def test_without_table_and_extra_score_it_is_plain_attention():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 6, 2, 4))
    plain = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    np.testing.assert_allclose(biased_attention(q, k, v, None), plain, atol=1e-5)
