"""Linear against numpy, for each shape of contraction the models use."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from paxlike import parallel
from paxlike.layers.linear import Linear

# features, axes, shape of the inputs behind (b, s), einsum
CASES = {
    "plain": (6, ("embed", "mlp"), (4,), "bsd,df->bsf"),
    "tall": (3, ("mlp", "embed"), (11,), "bsd,df->bsf"),
    "heads": ((3, 2, 5), ("embed", None, "heads", "head_dim"), (4,), "bsd,dchk->bschk"),
    "out": (7, ("heads", "head_dim", "embed"), (2, 5), "bshk,hkd->bsd"),
}


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_equals_einsum(name, use_bias):
    features, axes, inputs, equation = CASES[name]
    layer = Linear(features, axes, use_bias=use_bias, kernel_init=nn.initializers.normal(1.0))
    x = _normal(2, 3, *inputs)
    params = _params(layer, x)
    assert set(params) == ({"kernel", "bias"} if use_bias else {"kernel"})
    params = {name: _normal(*p.shape) for name, p in params.items()}
    y, pullback = jax.vjp(lambda p, x: _apply(layer, p, x), params, x)
    dy = _normal(*y.shape, seed=1)
    dparams, dx = pullback(jnp.asarray(dy))

    ins, kernel, outs = equation.replace("->", ",").split(",")
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(y, np.einsum(equation, x, params["kernel"]) + params.get("bias", 0.0))
    close(dx, np.einsum(f"{outs},{kernel}->{ins}", dy, params["kernel"]))
    close(dparams["kernel"], np.einsum(f"{ins},{outs}->{kernel}", x, dy))
    if use_bias:
        close(dparams["bias"], dy.sum((0, 1)))


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 3, 4)])
def test_any_number_of_leading_dimensions(lead):
    layer = Linear(6, ("embed", "mlp"))
    x = _normal(*lead, 4)
    params = _params(layer, x)
    expected = x @ params["kernel"] + np.broadcast_to(params["bias"], (*lead, 6))
    np.testing.assert_allclose(_apply(layer, params, x), expected, rtol=1e-5, atol=1e-5)


def test_names_of_the_parameters():
    boxes = _boxes(Linear(7, ("heads", "head_dim", "embed")), _normal(2, 3, 2, 5))
    assert boxes["kernel"].names == ("heads", "head_dim", "embed")
    assert boxes["bias"].names == ("norm",)  # whole everywhere, unlike a weight over the width
    boxes = _boxes(Linear((3, 2, 5), ("embed", None, "heads", "head_dim")), _normal(2, 3, 4))
    assert boxes["bias"].names == (None, "heads", "head_dim")


def test_fresh_bias_is_zero_and_kernel_has_the_asked_spread():
    params = _params(
        Linear(300, ("embed", "mlp"), kernel_init=nn.initializers.normal(0.02)), _normal(1, 1, 200)
    )
    assert not params["bias"].any()
    np.testing.assert_allclose(np.std(params["kernel"]), 0.02, rtol=0.02)


def test_bfloat16_computes_narrow_and_keeps_wide_parameters():
    layer = Linear(6, ("embed", "mlp"), dtype="bfloat16", kernel_init=nn.initializers.normal(1.0))
    x = _normal(2, 3, 4)
    params = _params(layer, x)
    y, gradients = jax.value_and_grad(lambda p: jnp.sum(_apply(layer, p, x).astype(jnp.float32)))(
        params
    )
    assert _apply(layer, params, x).dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((params, gradients))} == {jnp.dtype("float32")}
    np.testing.assert_allclose(y, np.sum(x @ params["kernel"]), rtol=0.02, atol=0.1)


def test_the_contraction_can_be_replaced():
    class Doubled:
        def __call__(self, x, kernel, dimensions, precision=None, preferred_element_type=None):
            return 2.0 * jax.lax.dot_general(x, kernel, dimensions, precision=precision)

    x = _normal(2, 3, 2, 5)
    plain = Linear(7, ("heads", "head_dim", "embed"), use_bias=False)
    params = _params(plain, x)
    doubled = _apply(plain.clone(dot_general_cls=Doubled), params, x)
    np.testing.assert_allclose(doubled, 2.0 * _apply(plain, params, x), rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("length", [None, "data"], ids=["length whole", "length sharded"])
def test_same_values_and_gradients_on_a_mesh(name, length):
    features, axes, inputs, _ = CASES[name]
    layer = Linear(features, axes, kernel_init=nn.initializers.normal(1.0))
    x = _normal(2, 4, *inputs)
    params = _params(layer, x)

    def step(params, x):
        y = layer.apply(
            {"params": params}, parallel.shard(x, "batch", "length", *[None] * len(inputs))
        )
        return jnp.sum(jnp.square(y)), y

    run = jax.jit(jax.value_and_grad(step, argnums=(0, 1), has_aux=True))
    expected = run(params, x)
    batch = "fsdp" if length else ("data", "fsdp")
    rules = {**parallel.DEFAULT_RULES, "length": length, "batch": batch}
    mesh = parallel.Mesh(ici=(2, 1, 2)).build(jax.devices()[:4])
    with parallel.activate(mesh, rules):
        got = jax.jit(jax.value_and_grad(step, argnums=(0, 1), has_aux=True))(params, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def _params(layer, x):
    init = jax.jit(lambda x: nn.unbox(layer.init(jax.random.key(0), x)))
    return jax.tree.map(np.asarray, init(x)["params"])


def _boxes(layer, x):
    return jax.eval_shape(lambda: layer.init(jax.random.key(0), jnp.asarray(x)))["params"]


def _apply(layer, params, x):
    return jax.jit(lambda p, x: layer.apply({"params": p}, x))(params, x)


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
