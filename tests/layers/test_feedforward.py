"""The feed-forward against numpy, for every activation, plain and gated."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from paxlike.layers.feedforward import ACTIVATIONS, FeedForward
from paxlike.layers.sequence import Sequence

NUMPY = {
    "gelu": lambda x: 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_exact": lambda x: 0.5 * x * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0))),
    "relu": lambda x: np.maximum(x, 0.0),
    "silu": lambda x: x / (1.0 + np.exp(-x)),
}


def test_every_activation_is_tested():
    assert set(NUMPY) == set(ACTIVATIONS)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", NUMPY)
def test_equals_numpy(activation, gated):
    layer = _layer(activation=activation, gated=gated)
    x = _normal(2, 3, 8)
    params = _params(layer)
    inner = x @ params["ffn1"]["kernel"] + params["ffn1"]["bias"]
    if gated:
        inner = NUMPY[activation](x @ params["gate"]["kernel"] + params["gate"]["bias"]) * inner
    else:
        inner = NUMPY[activation](inner)
    expected = inner @ params["ffn2"]["kernel"] + params["ffn2"]["bias"]
    got = _apply(layer, params, x)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_parameters_have_the_shapes_and_names_that_sharding_needs():
    boxes = _boxes(_layer(gated=True))
    assert set(boxes) == {"ffn1", "gate", "ffn2"}
    for name in ("ffn1", "gate"):
        assert boxes[name]["kernel"].names == ("embed", "mlp")
        assert boxes[name]["kernel"].value.shape == (8, 20)
        assert boxes[name]["bias"].names == ("mlp",)
    assert boxes["ffn2"]["kernel"].names == ("mlp", "embed")


def test_without_bias():
    params = _params(_layer(use_bias=False, gated=True))
    assert all(set(part) == {"kernel"} for part in params.values())


def test_dropout_is_on_the_result_while_training():
    layer, x = _layer(dropout=0.5), _normal(4, 6, 8)
    params = _params(layer)
    still = np.asarray(_apply(layer, params, x))
    dropped = np.asarray(
        _apply(layer, params, x, Sequence(train=True), rngs={"dropout": jax.random.key(0)})
    )
    zero = dropped == 0
    assert 0.3 < zero.mean() < 0.7
    np.testing.assert_allclose(dropped[~zero], 2.0 * still[~zero], rtol=1e-5)


def test_bfloat16():
    layer, x = _layer(dtype="bfloat16"), _normal(2, 3, 8)
    params = _params(layer)
    got = _apply(layer, params, x)
    assert got.dtype == jnp.bfloat16
    expected = _apply(_layer(), params, x)
    np.testing.assert_allclose(
        np.asarray(got, np.float32), expected, atol=0.02 * np.abs(expected).max()
    )


def test_unknown_activation():
    with pytest.raises(
        ValueError, match="ACTIVATION='swish' is none of gelu, gelu_exact, relu, silu"
    ):
        _boxes(_layer(activation="swish"))


def _layer(**kwargs):
    return FeedForward(20, **kwargs)


def _params(layer):
    """Random parameters; biases show too."""
    params = nn.unbox(_boxes(layer))
    return jax.tree.map(lambda p: 0.5 * _normal(*p.shape), params)


def _boxes(layer):
    return jax.eval_shape(lambda: layer.init(jax.random.key(0), jnp.zeros((1, 1, 8)), Sequence()))[
        "params"
    ]


def _apply(layer, params, x, sequence=None, **kwargs):
    sequence = sequence or Sequence()
    return jax.jit(lambda p, x: layer.apply({"params": p}, x, sequence, **kwargs))(params, x)


def _normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)
