"""Attention over devices against the plain reference: values and gradients, alone and inside another map."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxlike import parallel
from paxlike.ops import attention as ops
from paxlike.ops.context_attention import context_attention

# Compiles in half of the time.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
OPTIONS = {
    "ring, window": ("ring", {"window": 5}),
    "ring, window, cap, documents": ("ring", {"window": 12, "logit_cap": 1.5, "segments": True}),
    "ring, not causal": ("ring", {"causal": False, "scale": 0.9, "segments": True}),
    "gathered, window, cap": ("all_gather", {"window": 5, "logit_cap": 1.5}),
    "gathered, not causal": ("all_gather", {"causal": False, "segments": True}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_attention_over_devices_equals_the_reference(name, monkeypatch):
    """Values and gradients, with grouped heads; two blocks of queries in a chunk."""
    monkeypatch.setattr("paxlike.ops.context_attention.QUERY_BLOCK", 2)
    kind, options = OPTIONS[name]
    options = {"causal": True, **options}
    rng = np.random.default_rng(0)
    draw = lambda heads: jnp.asarray(rng.standard_normal((2, 32, heads, 8)), jnp.float32)
    q, k, v, weights = draw(4), draw(2), draw(2), draw(4)
    segments = jnp.asarray(np.sort(rng.integers(1, 4, (2, 32)), axis=1), jnp.int32)
    segments = segments if options.pop("segments", False) else None

    def whole(q, k, v):
        with ops.plain():
            return ops.attention(q, k, v, segments=segments, **options)

    def spread(q, k, v):
        context = parallel.current_context(kind)
        q, k, v, documents = (
            None if a is None else context.arrange(a) for a in (q, k, v, segments)
        )
        y = context_attention(q, k, v, context=context, segments=documents, **options)
        return context.restore(y)

    def both(function):
        objective = lambda *a: (jnp.sum((y := function(*a)) * weights), y)
        gradients = jax.value_and_grad(objective, argnums=(0, 1, 2), has_aux=True)
        (_, y), gradients = jax.jit(gradients).lower(q, k, v).compile(FAST)(q, k, v)
        return y, *gradients

    expected = both(whole)
    mesh = parallel.Mesh(ici=(4,), axes=("context",)).build(jax.devices()[:4])
    with parallel.activate(mesh):
        got = both(spread)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max())


def test_16_bits_are_summed_in_float32():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 32, 2, 8)), jnp.bfloat16) for _ in range(3))
    wide = (a.astype(jnp.float32) for a in (q, k, v))
    expected = np.asarray(ops.attention(*wide, causal=True))
    mesh = parallel.Mesh(ici=(2,), axes=("context",)).build(jax.devices()[:2])
    with parallel.activate(mesh):
        context = parallel.current_context("ring")

        def spread(*inputs):
            there = (context.arrange(a) for a in inputs)
            return context.restore(context_attention(*there, context=context, causal=True))

        got = jax.jit(spread).lower(q, k, v).compile(FAST)(q, k, v)
    assert got.dtype == jnp.bfloat16
    assert np.abs(np.asarray(got, np.float32) - expected).max() < 2**-7 * np.abs(v).max()


def test_ring_inside_another_map_over_devices():
    """As a stage of a pipeline: the other axis is already a map, and there is a loop and rematerialisation."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 1, 16, 2, 4)), jnp.float32) for _ in range(3))
    whole = lambda q, k, v: jnp.stack(
        [ops.attention(*x, causal=True) for x in zip(q, k, v, strict=True)]
    )
    mesh = parallel.Mesh(ici=(2, 2), axes=("pipeline", "context")).build(jax.devices()[:4])

    def spread(q, k, v):
        context = parallel.current_context("ring")
        one = jax.checkpoint(lambda x: context_attention(*x, context=context, causal=True))
        stages = jax.sharding.PartitionSpec("pipeline")
        stage = jax.shard_map(
            lambda x: jax.lax.map(one, x),
            in_specs=(stages,),
            out_specs=stages,
            axis_names={"pipeline"},
            check_vma=False,
        )
        y = stage(tuple(jax.vmap(context.arrange)(a) for a in (q, k, v)))
        return jax.vmap(context.restore)(y)

    def gradients(function):
        total = jax.grad(lambda *a: jnp.sum(jnp.square(function(*a))), argnums=(0, 1, 2))
        return jax.jit(total).lower(q, k, v).compile(FAST)(q, k, v)

    expected = gradients(whole)
    with parallel.activate(mesh):
        got = gradients(spread)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max())
