"""Norms against numpy in float64; statistics in float32 whatever the inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.test_util import check_grads

from paxlike.layers.norm import LayerNorm, RMSNorm

LAYERS = {"layer": LayerNorm, "rms": RMSNorm}


@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 3, 16), (2, 3, 4, 16)])
@pytest.mark.parametrize("name", LAYERS)
def test_equals_numpy(name, shape):
    x = 2.0 + 3.0 * _normal(*shape)
    layer = LAYERS[name](epsilon=1e-3)
    params = (
        {"scale": _normal(16), "bias": _normal(16)} if name == "layer" else {"scale": _normal(16)}
    )
    got = _apply(layer, params, x)
    np.testing.assert_allclose(got, _expected(name, x, params, 1e-3), rtol=1e-5, atol=1e-5)


def test_the_gain_of_a_layer_norm_is_stored_as_its_distance_from_one():
    params = _params(LayerNorm(), _normal(2, 16))
    assert not params["scale"].any()
    assert not params["bias"].any()
    y = np.asarray(_apply(LayerNorm(), params, _normal(2, 16)))
    np.testing.assert_allclose(y.std(-1), 1.0, rtol=1e-4)
    assert (_params(RMSNorm(), _normal(2, 16))["scale"] == 1.0).all()


def test_bias_can_be_left_out():
    assert set(_params(LayerNorm(use_bias=False), _normal(2, 16))) == {"scale"}


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_equal_finite_differences(name):
    layer, x = LAYERS[name](), _normal(2, 8)
    params = jax.tree.map(lambda p: p + np.float32(0.3), _params(layer, x))
    function = lambda p, x: _apply(layer, p, x)
    check_grads(function, (params, x), order=1, modes=("rev",), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("name", LAYERS)
def test_bfloat16_rounds_once(name):
    """Away from zero, where statistics in bfloat16 would be useless."""
    x = jnp.asarray(100.0 + _normal(4, 64), jnp.bfloat16)
    layer = LAYERS[name](dtype="bfloat16")
    params = _params(layer, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    y = _apply(layer, params, x)
    assert y.dtype == jnp.bfloat16
    expected = _expected(name, np.asarray(x, np.float64), params, layer.epsilon)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-4)


def test_a_mean_far_from_zero_does_not_spoil_the_variance():
    x = 1e4 + _normal(4, 64)
    y = _apply(LayerNorm(), _params(LayerNorm(), x), x)
    expected = _expected("layer", x.astype(np.float64), {"scale": 0.0, "bias": 0.0}, 1e-5)
    np.testing.assert_allclose(y, expected, atol=2e-3)


@pytest.mark.parametrize("name", LAYERS)
def test_elsewhere_than_on_a_cpu_the_backward_pass_is_left_the_input_alone(name, monkeypatch):
    layer, x = LAYERS[name](dtype="bfloat16"), jnp.asarray(_normal(8, 16), "bfloat16")
    variables, dy = layer.init(jax.random.key(0), x), jnp.asarray(_normal(8, 16), "bfloat16")

    def gradients():
        y, pull = jax.vjp(layer.apply, variables, x)
        kept = [a for a in jax.tree.leaves(pull) if a.size == x.size]
        return (y, *pull(dy)), {a.dtype.name for a in kept}

    expected, kept = gradients()
    assert "float32" in kept
    monkeypatch.setattr("paxlike.ops.platform.is_cpu", lambda: False)
    found, kept = gradients()
    assert kept == {"bfloat16"}
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def _expected(name, x, params, epsilon):
    x = np.asarray(x, np.float64)
    if name == "rms":
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + epsilon) * np.float64(params["scale"])
    centred = x - x.mean(-1, keepdims=True)
    y = centred / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    return y * (1.0 + np.float64(params["scale"])) + np.float64(params["bias"])


def _apply(layer, params, x):
    return jax.jit(lambda p, x: layer.apply({"params": p}, x))(params, x)


def _params(layer, x):
    return jax.tree.map(
        np.asarray, nn.unbox(layer.init(jax.random.key(0), jnp.asarray(x)))["params"]
    )


def _normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)
