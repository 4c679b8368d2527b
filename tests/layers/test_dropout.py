"""Dropout: what it keeps, how it scales, and that its mask depends on the key alone and not on the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxlike import parallel
from paxlike.layers.dropout import Dropout

SHAPE = (8, 16, 32)
MESHES = {"data": (4, 1, 1), "fsdp": (1, 4, 1), "tensor": (1, 1, 4), "mixed": (2, 1, 2)}


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_keeps_the_right_share_and_scales_it(rate):
    y = _drop(np.ones(SHAPE, np.float32), rate)
    kept = y != 0
    np.testing.assert_allclose(y[kept], 1.0 / (1.0 - rate), rtol=1e-6)
    spread = np.sqrt(rate * (1 - rate) / y.size)
    assert abs(kept.mean() - (1.0 - rate)) < 4 * spread


@pytest.mark.parametrize(("rate", "train"), [(0.5, False), (0.0, True)])
def test_changes_nothing_in_evaluation_or_at_rate_zero(rate, train):
    x = np.ones(SHAPE, np.float32)
    y = Dropout(rate).apply({}, jnp.asarray(x), train=train)  # needs no key either
    np.testing.assert_array_equal(y, x)


def test_each_key_has_its_own_mask():
    x = np.ones(SHAPE, np.float32)
    assert (_drop(x, 0.5, seed=0) == _drop(x, 0.5, seed=0)).all()
    assert (_drop(x, 0.5, seed=0) != _drop(x, 0.5, seed=1)).any()


@pytest.mark.parametrize("name", MESHES)
def test_same_mask_on_every_mesh(name):
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    expected = _drop(x, 0.3)
    mesh = parallel.Mesh(ici=MESHES[name]).build(jax.devices()[:4])
    with parallel.activate(mesh):
        names = ("batch", "length", "act_mlp")
        there = jax.device_put(x, parallel.named_sharding(mesh, names))
        drop = lambda x: parallel.shard(
            Dropout(0.3).apply({}, x, train=True, rngs=_rngs(0)), *names
        )
        got = jax.jit(drop)(there)
    assert not got.sharding.is_fully_replicated
    np.testing.assert_array_equal(got, expected)


def test_the_gradient_passes_where_the_value_does():
    x = np.ones(SHAPE, np.float32)
    gradient = jax.grad(lambda x: jnp.sum(Dropout(0.3).apply({}, x, train=True, rngs=_rngs(0))))(x)
    np.testing.assert_array_equal(gradient, _drop(x, 0.3))


def test_keeps_the_dtype():
    assert _drop(np.ones((2, 2, 2), jnp.bfloat16), 0.5).dtype == jnp.bfloat16


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_impossible_rate(rate):
    with pytest.raises(ValueError, match=rf"a dropout rate is in \[0, 1\), got {rate}"):
        _drop(np.ones((2, 2, 2), np.float32), rate)


def _drop(x, rate, seed=0):
    return np.asarray(
        jax.jit(lambda x: Dropout(rate).apply({}, x, train=True, rngs=_rngs(seed)))(x)
    )


def _rngs(seed):
    return {"dropout": jax.random.key(seed)}
