"""Attention in tiles against the plain reference: values, gradients, memory, meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxlike import parallel
from paxlike.ops import attention as ops

# Compiles in half of the time.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
OPTIONS = {
    "causal": {},
    "documents": {"segments": True},
    "window": {"window": 11},
    "a window of one block": {"window": 8, "length": 32},
    "window, documents, cap, scale": {
        "window": 19,
        "segments": True,
        "logit_cap": 1.5,
        "scale": 0.9,
    },
    "not causal": {"causal": False},
    "not causal, documents, cap": {"causal": False, "segments": True, "logit_cap": 2.0},
    "not causal, other keys": {"causal": False, "keys": 21},
    "one head for all": {"kv_heads": 1, "segments": True},
    "shorter than a block": {"length": 5},
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr("paxlike.ops.chunked_attention.BLOCK", 8)


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_reference(name):
    """Values and gradients, the last blocks not full, grouped heads."""
    options = {"causal": True, **OPTIONS[name]}
    arrays, segments = _arrays(options)
    got = _both(functools.partial(_attend, "chunked", segments, options), arrays)
    expected = _both(functools.partial(_attend, "reference", segments, options), arrays)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6 * np.abs(b).max())


@pytest.mark.parametrize("shape", [(1, 4, 1), (1, 1, 4), (2, 1, 2)])
def test_on_a_mesh_nothing_is_gathered(shape):
    """Rows and heads do not meet, so their devices have nothing to say to each other."""
    arrays, segments = _arrays({"rows": 4, "kv_heads": 4, "heads": 4, "segments": True})
    expected = _both(functools.partial(_attend, "reference", segments, {"causal": True}), arrays)
    mesh = parallel.Mesh(ici=shape).build(jax.devices()[:4])

    def spread(q, k, v):
        q, k, v = (parallel.shard(a, "batch", None, "act_heads", None) for a in (q, k, v))
        documents = parallel.shard(segments, "batch", None)
        y = _attend("chunked", documents, {"causal": True}, q, k, v)
        return parallel.shard(y, "batch", None, "act_heads", None)

    with parallel.activate(mesh):
        place = parallel.named_sharding(mesh, ("batch", None, "act_heads", None))
        gradients = jax.jit(_with_gradients(spread), out_shardings=place)
        compiled = gradients.lower(*(jax.device_put(a, place) for a in arrays)).compile(FAST)
        got = compiled(*(jax.device_put(a, place) for a in arrays))
    text = compiled.as_text()
    for kind in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
        assert f" {kind}(" not in text, kind
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6 * np.abs(b).max())


def test_memory_grows_with_the_length_not_with_its_square(monkeypatch):
    monkeypatch.setattr("paxlike.ops.chunked_attention.BLOCK", 128)

    def temporaries(name, length):
        q = jax.ShapeDtypeStruct((1, length, 2, 16), "float32")
        run = _with_gradients(functools.partial(_attend, name, None, {"causal": True}))
        compiled = jax.jit(lambda q, k, v: run(q, k, v)[1:]).lower(q, q, q).compile(FAST)
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries("chunked", 1024), temporaries("chunked", 4096)
    assert long < 4.2 * short
    assert temporaries("reference", 4096) > 3.9**2 * temporaries("reference", 1024) / 1.5
    assert long < temporaries("reference", 4096) / 10


def test_16_bits_are_summed_in_float32():
    arrays, segments = _arrays({"segments": True}, dtype=jnp.bfloat16)
    run = functools.partial(_attend, "chunked", segments, {"causal": True})
    got = run(*arrays)
    expected = _attend(
        "reference", segments, {"causal": True}, *(a.astype(jnp.float32) for a in arrays)
    )
    assert got.dtype == jnp.bfloat16
    assert np.abs(np.asarray(got, np.float32) - expected).max() < 2**-7 * np.abs(expected).max()
    program = str(jax.make_jaxpr(_with_gradients(run))(*arrays))
    assert "bf16" in program
    products = [line for line in program.splitlines() if "dot_general[" in line]
    assert len(products) == 7  # two forward; the scores again and four backward


def test_a_policy_that_keeps_its_result_does_not_run_it_again():
    """As remat in a block: with the result kept, the backward pass has 5 products, not 7."""
    arrays, _ = _arrays({})

    def block(q, k, v):
        return jnp.sum(_attend("chunked", None, {"causal": True}, q, k, v))

    def products(policy):
        gradient = jax.grad(jax.checkpoint(block, policy=policy), argnums=(0, 1, 2))
        return str(jax.make_jaxpr(gradient)(*arrays)).count("dot_general[")

    policies = jax.checkpoint_policies
    assert products(policies.save_only_these_names("context")) == 7
    assert products(policies.nothing_saveable) == 9
    # Sealed: a policy that keeps products keeps none of a tile.
    assert products(policies.dots_saveable) == 9


def _attend(name, segments, options, q, k, v):
    known = {key: options[key] for key in ("window", "logit_cap", "scale") if key in options}
    causal = options.get("causal", True)
    return ops.attention(q, k, v, causal=causal, segments=segments, implementation=name, **known)


def _with_gradients(function):
    def run(q, k, v):
        def objective(q, k, v):
            y = function(q, k, v)
            weights = jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
            return jnp.sum(y.astype(jnp.float32) * weights), y

        gradients = jax.value_and_grad(objective, argnums=(0, 1, 2), has_aux=True)
        (_, y), of_inputs = gradients(q, k, v)
        return y, *of_inputs

    return run


def _both(function, arrays):
    return jax.jit(_with_gradients(function)).lower(*arrays).compile(FAST)(*arrays)


def _arrays(options, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    rows, length = options.get("rows", 2), options.get("length", 37)
    keys, heads = options.get("keys", length), options.get("heads", 4)
    kv_heads = options.get("kv_heads", 2)
    draw = lambda t, h: jnp.asarray(1.5 * rng.standard_normal((rows, t, h, 8)), dtype)
    segments = jnp.asarray(np.sort(rng.integers(1, 4, (rows, length)), axis=1), jnp.int32)
    arrays = draw(length, heads), draw(keys, kv_heads), draw(keys, kv_heads)
    return arrays, segments if options.get("segments") else None
