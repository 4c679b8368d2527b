"""Single layers and losses against PyTorch's own, values and gradients, float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxlike.layers.feedforward import ACTIVATIONS
from paxlike.layers.norm import LayerNorm, RMSNorm
from paxlike.ops.attention import attention
from paxlike.ops.cross_entropy import linear_cross_entropy, token_cross_entropy

torch = pytest.importorskip("torch", reason="parity tests need torch (the extra `parity`)")
F = torch.nn.functional

pytestmark = pytest.mark.parity
_rng = np.random.default_rng(0)


@pytest.mark.parametrize("epsilon", [1e-5, 1e-1])
def test_layer_norm(epsilon):
    x, gain, bias = _normal((4, 7, 24), 3.0, 5.0), _normal((24,), 0.3), _normal((24,))
    tx, tgain, tbias = _leaves(x, 1.0 + gain, bias)
    expected = F.layer_norm(tx, (24,), tgain, tbias, epsilon)

    def layer(x, gain, bias):
        return LayerNorm(epsilon).apply({"params": {"scale": gain, "bias": bias}}, x)

    _check(layer, (x, gain, bias), expected, (tx, tgain, tbias))


def test_rms_norm():
    x, gain = _normal((4, 7, 24), 3.0, 5.0), _normal((24,), 0.3, 1.0)
    tx, tgain = _leaves(x, gain)
    expected = F.rms_norm(tx, (24,), tgain, 1e-6)
    _check(
        lambda x, gain: RMSNorm().apply({"params": {"scale": gain}}, x),
        (x, gain),
        expected,
        (tx, tgain),
    )


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("gelu", lambda x: F.gelu(x, approximate="tanh")),
        ("gelu_exact", F.gelu),
        ("relu", F.relu),
        ("silu", F.silu),
    ],
)
def test_activation(name, reference):
    x = np.concatenate([np.linspace(-12, 12, 4001), [1e-6, -1e-6]]).astype(np.float32)
    (tx,) = _leaves(x)
    _check(ACTIVATIONS[name], (x,), reference(tx), (tx,))


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_attention(causal, kv_heads, scale):
    q, k, v = _normal((2, 9, 6, 8)), _normal((2, 9, kv_heads, 8)), _normal((2, 9, kv_heads, 8))
    tensors = _leaves(q, k, v)
    heads_first = [t.transpose(1, 2) for t in tensors]
    expected = F.scaled_dot_product_attention(
        *heads_first, is_causal=causal, scale=scale, enable_gqa=True
    )
    _check(
        lambda q, k, v: attention(q, k, v, causal=causal, scale=scale),
        (q, k, v),
        expected.transpose(1, 2),
        tensors,
    )


def test_attention_within_documents():
    segments = np.array([[1, 1, 1, 2, 2, 3, 3, 3, 3], [1, 1, 1, 1, 1, 1, 2, 0, 0]], np.int32)
    given = jnp.asarray(segments)
    q, k, v = (_normal((2, 9, 3, 8)) for _ in range(3))
    tensors = _leaves(q, k, v)
    same = torch.from_numpy(segments[:, :, None] == segments[:, None, :])
    mask = (same & torch.ones(9, 9, dtype=torch.bool).tril())[:, None]
    expected = F.scaled_dot_product_attention(*[t.transpose(1, 2) for t in tensors], attn_mask=mask)
    _check(
        lambda q, k, v: attention(q, k, v, causal=True, segments=given),
        (q, k, v),
        expected.transpose(1, 2),
        tensors,
    )


@pytest.mark.parametrize("chunk", [0, 1, 4, 5, None])
@pytest.mark.parametrize("z_loss", [0.0, 0.05])
def test_linear_cross_entropy(chunk, z_loss):
    x, table = _normal((3, 12, 16)), _normal((37, 16), 0.5)
    rng = np.random.default_rng(1)
    targets = rng.integers(0, 37, (3, 12), dtype=np.int32)
    weights = (rng.random((3, 12)) * (rng.random((3, 12)) < 0.7)).astype(np.float32)
    tx, ttable = _leaves(x, table)
    logits = tx @ ttable.T
    nll = F.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(targets).long().flatten(), reduction="none"
    )
    square = torch.logsumexp(logits, -1).flatten() ** 2
    expected = ((nll + z_loss * square) * torch.from_numpy(weights).flatten()).sum()

    ids, given = jnp.asarray(targets), jnp.asarray(weights)

    def loss(x, table):
        return linear_cross_entropy(x, table, ids, given, chunk=chunk, z_loss=z_loss)

    _check(lambda x, table: loss(x, table)[0], (x, table), expected, (tx, ttable))
    parts = jax.jit(loss)(x, table)[1]
    flat = torch.from_numpy(weights).flatten()
    np.testing.assert_allclose(parts.loss, (nll * flat).sum().item(), rtol=1e-5)
    np.testing.assert_allclose(parts.z_loss, (square * flat).sum().item(), rtol=1e-5)
    each, correct = jax.jit(lambda x, table: token_cross_entropy(x, table, ids, chunk=chunk))(
        x, table
    )
    np.testing.assert_allclose(each.ravel(), nll.detach().numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(correct, (logits.argmax(-1) == torch.from_numpy(targets)).numpy())


def _check(function, arrays, expected, tensors, *, tolerance=2e-5):
    """Compares value and gradients, the latter against the same random cotangent."""
    cotangent = _normal(tuple(expected.shape))

    @jax.jit
    def both(arrays):
        value, pullback = jax.vjp(function, *arrays)
        return value, pullback(jnp.asarray(cotangent))

    value, gradients = both(tuple(jnp.asarray(a) for a in arrays))
    np.testing.assert_allclose(value, expected.detach().numpy(), rtol=tolerance, atol=tolerance)
    wanted = torch.autograd.grad(expected, tensors, torch.from_numpy(cotangent), retain_graph=True)
    for got, want in zip(gradients, wanted, strict=True):
        scale = max(1.0, float(want.abs().max()))
        np.testing.assert_allclose(got, want.numpy(), rtol=tolerance, atol=tolerance * scale)


def _normal(shape, std=1.0, mean=0.0):
    return np.asarray(mean + std * _rng.standard_normal(shape), np.float32)


def _leaves(*arrays):
    return [torch.tensor(a, requires_grad=True) for a in arrays]
