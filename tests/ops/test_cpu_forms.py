"""Forms that are chosen on a CPU only give the numbers of the plain ones, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxlike.ops import attention, cross_entropy, matmul, platform, reference_attention


@pytest.fixture
def elsewhere(monkeypatch):
    """As on an accelerator."""

    def run(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(platform, "is_cpu", lambda: False)
            return jax.jit(lambda *args: function(*args))(*args)

    return run


@pytest.mark.parametrize("shape", [(8, 40, 6), (8, 6, 40), (3, 8, 40, 6)])
def test_contract_rows(shape, elsewhere):
    *lead, p, q = shape
    a, b = _normal(*lead, p), _normal(*lead, q, seed=1)
    expected = np.swapaxes(np.float64(a), -1, -2) @ np.float64(b)
    np.testing.assert_allclose(matmul.contract_rows(a, b), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        elsewhere(matmul.contract_rows, a, b), expected, rtol=1e-5, atol=1e-5
    )


def test_only_small_tall_results_are_transposed():
    barriers = lambda p, q: str(jax.make_jaxpr(matmul.contract_rows)(_zeros(8, p), _zeros(8, q)))
    assert "optimization_barrier" in barriers(64, 32)
    assert "optimization_barrier" not in barriers(32, 64)
    assert "optimization_barrier" not in barriers(50304, 768)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matmul(dtype, elsewhere):
    x, w, dy = (jnp.asarray(_normal(*s), dtype) for s in ((10, 24), (24, 8), (10, 8)))

    def run(x, w, dy):
        y, pull = jax.vjp(matmul.matmul, x, w)
        return y, *pull(dy)

    for got, want in zip(run(x, w, dy), elsewhere(run, x, w, dy), strict=True):
        assert got.dtype == want.dtype == dtype
        tolerance = 1e-5 if dtype == "float32" else 2e-2
        np.testing.assert_allclose(
            np.float32(got), np.float32(want), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize(
    "product",
    [matmul.matmul, functools.partial(reference_attention._wide_product, "np,pq->nq")],
    ids=["weight", "scores"],
)
def test_policies_of_rematerialisation_see_the_products(product):
    policy = jax.checkpoint_policies.dots_saveable
    double = lambda x, w: jnp.sum(jnp.sin(product(jnp.sin(product(x, w)), w)))
    products = lambda f: str(jax.make_jaxpr(jax.grad(f, (0, 1)))(_zeros(8, 24), _zeros(24, 24)))
    count = lambda f: products(f).count("dot_general")
    assert count(double) == count(jax.checkpoint(double, policy=policy)) == 6
    assert count(jax.checkpoint(double)) > 6


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("length", [256, 384])
def test_attention_in_blocks(length, documents, kv_heads, elsewhere):
    q, k, v = _normal(2, length, 4, 8), *(_normal(2, length, kv_heads, 8, seed=i) for i in (1, 2))
    rows = jnp.array([[1, 2, 2, 3], [1, 1, 2, 0]])
    segments = jnp.repeat(rows, length // 4, axis=1) if documents else None

    def run(q, k, v):
        out, pull = jax.vjp(
            lambda *x: attention.attention(*x, causal=True, segments=segments), q, k, v
        )
        return out, *pull(out)

    assert "causal_attention_in_blocks" in str(jax.make_jaxpr(run)(q, k, v))
    for got, want in zip(run(q, k, v), elsewhere(run, q, k, v), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [(256, 512), (200, 200), (130, 130)])
def test_attention_that_does_not_divide_is_whole(lengths):
    s, t = lengths
    run = lambda q, k: attention.attention(q, k, k, causal=True)
    assert "in_blocks" not in str(jax.make_jaxpr(run)(_zeros(1, s, 2, 8), _zeros(1, t, 2, 8)))


def test_logits_of_a_cpu_stay_in_its_cache(monkeypatch):
    chunks = lambda *shape: cross_entropy._num_chunks(shape, 8192, None)[0]
    assert chunks(8, 256, 256) == 4  # 64 MiB of logits in parts of 16
    assert chunks(8, 256, 1024) == 2  # no smaller than the gradient of the table, 32 MiB
    monkeypatch.setattr(platform, "is_cpu", lambda: False)
    assert chunks(8, 256, 256) == 1


def test_the_first_of_equal_logits_is_the_argmax():
    x, table = jnp.ones((1, 3, 2)), jnp.array([[0.0, 0], [1, 1], [1, 1]])
    targets = jnp.array([[0, 1, 2]], jnp.int32)
    _, correct = cross_entropy.token_cross_entropy(x, table, targets)
    np.testing.assert_array_equal(correct, [[False, True, False]])


def _normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _zeros(*shape):
    return jnp.zeros(shape, jnp.float32)
