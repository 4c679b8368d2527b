"""Token table and learned positions against plain indexing, on one device and on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from paxlike import parallel
from paxlike.layers.embedding import Embedding, LearnedPosition

V, D = 24, 8
MESHES = {"data": (4, 1, 1), "fsdp": (1, 4, 1), "tensor": (1, 1, 4), "fsdp-tensor": (1, 2, 2)}


@pytest.mark.parametrize("lookup", ["index", "matmul"])
def test_looks_up_rows(lookup):
    table, tokens = _normal(V, D), _tokens()
    got = _apply(Embedding(V, D, lookup=lookup), table, tokens)
    np.testing.assert_array_equal(got, table[tokens])


@pytest.mark.parametrize("mesh_shape", [None, *MESHES.values()], ids=["no mesh", *MESHES])
@pytest.mark.parametrize("lookup", ["index", "matmul"])
def test_gradient_adds_up_where_a_token_comes_twice(lookup, mesh_shape):
    table, tokens, cotangent = _normal(V, D), _tokens(), _normal(4, 6, D)
    layer = Embedding(V, D, lookup=lookup)
    expected = np.zeros((V, D), np.float32)
    np.add.at(expected, tokens, cotangent)

    def step(table, tokens):
        value, pullback = jax.vjp(lambda t: layer.apply({"params": {"table": t}}, tokens), table)
        return value, pullback(jnp.asarray(cotangent))[0]

    if mesh_shape is None:
        value, gradient = jax.jit(step)(table, tokens)
    else:
        mesh = parallel.Mesh(ici=mesh_shape).build(jax.devices()[:4])
        with parallel.activate(mesh):
            table_there = jax.device_put(table, parallel.named_sharding(mesh, ("vocab", "embed")))
            tokens_there = jax.device_put(
                tokens, parallel.named_sharding(mesh, ("batch", "length"))
            )
            value, gradient = jax.jit(step)(table_there, tokens_there)
    np.testing.assert_allclose(value, table[tokens], rtol=1e-6)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_fresh_tables_and_their_names():
    layers = {"vocab": Embedding(400, 300), "position": LearnedPosition(400)}
    for name, layer in layers.items():
        inputs = _tokens() if name == "vocab" else _normal(1, 6, 300)
        box = layer.init(jax.random.key(0), jnp.asarray(inputs))["params"]["table"]
        assert box.names == (name, "embed")
        assert box.value.shape == (400, 300)
        np.testing.assert_allclose(np.std(nn.unbox(box)), 0.02, rtol=0.02)


def test_bfloat16():
    table = _normal(V, D)
    got = _apply(Embedding(V, D, dtype="bfloat16"), table, _tokens())
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        np.asarray(got), np.asarray(jnp.asarray(table, jnp.bfloat16))[_tokens()]
    )


def test_positions_count_from_zero():
    table, x = _normal(10, D), _normal(4, 6, D) * 3.0
    got = _apply(LearnedPosition(10), table, x)
    np.testing.assert_allclose(got, x + table[:6], rtol=1e-6)


def test_positions_of_packed_documents():
    table, x = _normal(10, D), _normal(2, 6, D) * 3.0
    positions = np.array([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]], np.int32)
    got = _apply(LearnedPosition(10), table, x, positions)
    np.testing.assert_allclose(got, x + table[positions], rtol=1e-6)


def test_more_tokens_than_positions():
    with pytest.raises(
        ValueError, match="11 tokens in a row, but the model has MAX_SEQ_LEN=10 learned positions"
    ):
        LearnedPosition(10).init(jax.random.key(0), jnp.zeros((1, 11, D)))


def _apply(layer, table, *inputs):
    return jax.jit(lambda table, *inputs: layer.apply({"params": {"table": table}}, *inputs))(
        table, *inputs
    )


def _tokens():
    return np.random.default_rng(2).integers(0, V, (4, 6), dtype=np.int32)


def _normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("module", ["token", "position"])
def test_gradient_of_a_frequent_row_is_exact_in_bfloat16(module):
    """Summed in bfloat16, 4,096 ones would stop at 256."""
    table, ids = jnp.zeros((V, D)), jnp.full((4, 1024), 3)
    if module == "token":
        net = Embedding(V, D, dtype="bfloat16")
        output = lambda t: net.apply({"params": {"table": t}}, ids)
    else:
        net = LearnedPosition(V, dtype="bfloat16")
        zeros = jnp.zeros((4, 1024, D), jnp.bfloat16)
        output = lambda t: net.apply({"params": {"table": t}}, zeros, ids)
    gradient = jax.grad(lambda t: jnp.sum(output(t).astype(jnp.float32)))(table)
    np.testing.assert_array_equal(gradient[3], 4096.0)
    assert gradient.dtype == jnp.float32 and float(jnp.abs(gradient).sum()) == 4096 * D


def test_an_unknown_lookup_is_refused():
    module = Embedding(8, 4, lookup="onehot")
    with pytest.raises((ValueError, TypeError), match="onehot"):
        module.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
