"""Attention against a naive one in numpy, query by query; gradients against finite differences."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from paxlike.ops import attention as ops

B, S, H, K = 2, 7, 6, 8
SEGMENTS = np.array([[1, 1, 1, 2, 2, 3, 0], [1, 2, 2, 2, 2, 0, 0]], np.int32)


@pytest.mark.parametrize("kv_heads", [1, 3, 6])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_naive(causal, kv_heads):
    q, k, v = _qkv(kv_heads=kv_heads)
    _compare(q, k, v, causal=causal)


def test_grouped_heads_are_consecutive():
    """Query heads 0..h/g-1 read the first key head (as in Hugging Face's `repeat_kv`)."""
    q, k, v = _qkv(kv_heads=2)
    repeated = attention(q, np.repeat(k, 3, axis=2), np.repeat(v, 3, axis=2), causal=True)
    np.testing.assert_allclose(attention(q, k, v, causal=True), repeated, rtol=1e-6, atol=1e-6)


def test_scale():
    q, k, v = _qkv()
    _compare(q, k, v, causal=True, scale=0.9)


@pytest.mark.parametrize("causal", [True, False])
def test_documents_do_not_see_each_other(causal):
    q, k, v = _qkv(kv_heads=3)
    segments = SEGMENTS
    _compare(q, k, v, causal=causal, segments=segments)

    changed = attention(
        q, k + 9.0 * (segments == 2)[:, :, None, None], v, causal=causal, segments=segments
    )
    same = attention(q, k, v, causal=causal, segments=segments)
    np.testing.assert_array_equal(
        np.asarray(changed)[segments != 2], np.asarray(same)[segments != 2]
    )


@pytest.mark.parametrize("window", [1, 3, S, S + 5])
def test_window(window):
    q, k, v = _qkv(kv_heads=3)
    _compare(q, k, v, causal=True, window=window)
    _compare(q, k, v, causal=True, window=window, segments=SEGMENTS)


@pytest.mark.parametrize("window", [100, 128, 200, 511])
def test_window_in_blocks_of_queries(window):
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, 512, 2, 4)).astype(np.float32) for _ in range(3))
    with ops.plain():
        whole = attention(q, k, v, causal=True, window=window)
    blocks = attention(q, k, v, causal=True, window=window)
    np.testing.assert_allclose(blocks, whole, rtol=2e-5, atol=2e-6)
    everything = attention(q, k, v, causal=True)
    assert np.abs(np.asarray(everything) - np.asarray(blocks))[:, window:].max() > 1e-3


def test_logit_cap():
    q, k, v = _qkv(std=3.0)
    _compare(q, k, v, causal=True, logit_cap=2.0)
    _compare(q, k, v, causal=False, logit_cap=2.0)
    assert not np.allclose(
        attention(q, k, v, causal=True), attention(q, k, v, causal=True, logit_cap=2.0), atol=1e-2
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"causal": False, "window": 3}, "a window of 3 needs causal attention"),
        ({"causal": True, "window": 0}, "a window of 0 needs .* at least 1 key"),
        ({"causal": True, "logit_cap": 0.0}, "a logit cap of 0.0 must be above 0"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        attention(*_qkv(), **options)


def test_offset_places_the_queries_among_the_keys():
    _, k, v = _qkv(kv_heads=3)
    q = _normal(B, 2, H, K)
    offset = np.array([0, 4], np.int32)
    _compare(q, k, v, causal=True, offset=offset)


def test_decoding_token_by_token_equals_the_whole_row():
    q, k, v = _qkv(kv_heads=2)
    whole = attention(q, k, v, causal=True)
    for i in range(S):
        offset = np.full((B,), i, np.int32)
        one = attention(q[:, i : i + 1], k, v, causal=True, offset=offset)
        np.testing.assert_allclose(one[:, 0], whole[:, i], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_equal_finite_differences(causal, documents):
    q, k, v = (x[:1, :4, :, :3] for x in _qkv(kv_heads=3))
    segments = np.array([[1, 1, 2, 2]], np.int32) if documents else None
    function = functools.partial(attention, causal=causal, segments=segments)
    check_grads(function, (q, k, v), order=1, modes=("rev",), atol=1e-2, rtol=1e-2)


def test_bfloat16_rounds_only_inputs_weights_and_result():
    """Scores of a few hundred, whose differences bfloat16 scores would lose."""
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in _qkv(std=6.0))
    result = attention(q, k, v, causal=True)
    assert result.dtype == jnp.bfloat16
    wide = [np.asarray(x, np.float64) for x in (q, k, v)]
    expected = _naive(*wide, causal=True)
    error = np.abs(np.asarray(result, np.float64) - expected)
    assert error.max() < 2**-7 * np.abs(wide[2]).max()


@pytest.mark.parametrize("kv_heads", [2, H])
def test_products_of_16_bits_stay_so_in_the_backward_pass(kv_heads):
    q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in _qkv(kv_heads=kv_heads))

    def loss(q, k, v):
        return jnp.sum(attention(q, k, v, causal=True).astype(jnp.float32) ** 2)

    program = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v))
    lines = [line for line in program.splitlines() if "dot_general[" in line]
    assert len(lines) == 6
    types = dict(re.findall(r"(\w+):(bf16|f32)\[", program))
    for operands in re.findall(r"dot_general\[.*?\] (\w+) (\w+)", program, re.DOTALL):
        assert [types[name] for name in operands] == ["bf16", "bf16"]


def test_unknown_implementation():
    q, k, v = _qkv()
    # A run that checks annotations refuses it before the function can.
    message = "attention implementation 'flash' is none of auto, te, cudnn, chunked, reference|Actual value: 'flash'"
    with pytest.raises((ValueError, TypeError), match=message):
        attention(q, k, v, causal=True, implementation="flash")


def attention(q, k, v, **kwargs):
    """The op under test, given numpy arrays."""
    given = {
        name: jnp.asarray(value) if isinstance(value, np.ndarray) else value
        for name, value in kwargs.items()
    }
    return ops.attention(*map(jnp.asarray, (q, k, v)), **given)


def _compare(q, k, v, **kwargs):
    expected = _naive(q, k, v, **kwargs)
    np.testing.assert_allclose(attention(q, k, v, **kwargs), expected, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(
        attention(q, k, v, implementation="reference", **kwargs), expected, rtol=2e-5, atol=2e-6
    )


def _naive(q, k, v, *, causal, segments=None, offset=None, scale=None, window=None, logit_cap=None):
    b, s, h, size = q.shape
    t, g = k.shape[1], k.shape[2]
    scale = 1.0 / np.sqrt(size) if scale is None else scale
    result = np.zeros((b, s, h, size), np.float64)
    for row, query, head in np.ndindex(b, s, h):
        group = head // (h // g)
        place = query + (0 if offset is None else offset[row])
        seen = [
            key
            for key in range(t)
            if (not causal or key <= place)
            and (segments is None or segments[row, key] == segments[row, query])
            and (window is None or place - key < window)
        ]
        scores = np.array(
            [np.dot(q[row, query, head], k[row, key, group]) * scale for key in seen], np.float64
        )
        if logit_cap is not None:
            scores = logit_cap * np.tanh(scores / logit_cap)
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        result[row, query, head] = sum(
            w * v[row, key, group] for w, key in zip(weights, seen, strict=True)
        )
    return result


def _qkv(*, kv_heads=H, std=1.0):
    rng = np.random.default_rng(0)
    draw = lambda heads: (std * rng.standard_normal((B, S, heads, K))).astype(np.float32)
    return draw(H), draw(kv_heads), draw(kv_heads)


def _normal(*shape):
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)
