"""Rows that are sent to their experts and back: the same as gathered ones and as one device; what does not fit."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from paxlike import parallel
from paxlike.layers.experts import Matrices
from paxlike.layers.moe import MoE, Router
from paxlike.layers.sequence import Sequence
from paxlike.ops import dispatch, exchange, platform
from paxlike.ops.exchange import Exchange
from paxlike.ops.routing import Choice
from paxlike.ops.sown import SUMMARIES
from tests.parallel import meshes

EXPERTS, ROWS, LENGTH, K, WIDTH = 8, 4, 6, 3, 4
BOTH = parallel.rules_with(expert=("fsdp", "expert"), expert_embed=None)


def test_slices_go_where_they_should():
    """Against numpy: each device's slice for each other, with gaps between them and what was there before."""
    rng = np.random.default_rng(0)
    n, r, p = 4, 9, 20
    operand, output = rng.standard_normal((n, r, 2)), rng.standard_normal((n, p, 2))
    sizes = rng.integers(0, 4, (n, n))
    begins = rng.integers(0, r - 4, (n, n))
    into = np.cumsum(sizes + 1, axis=0) - sizes  # a row is left alone before each slice
    expected = output.copy()
    for i in range(n):
        for j in range(n):
            rows = operand[i, begins[i, j] : begins[i, j] + sizes[i, j]]
            expected[j, into[i, j] : into[i, j] + sizes[i, j]] = rows

    def on_device(*arrays):
        return exchange.ragged_all_to_all(*(a[0] for a in arrays), axes=("expert",))[None]

    arrays = (operand, output, begins, sizes, into, sizes.T)
    mesh = meshes.build({"expert": n})
    send = jax.shard_map(
        on_device, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False
    )
    found = jax.jit(send)(*(jnp.asarray(a) for a in arrays))
    np.testing.assert_array_equal(found, np.float32(expected))


def inputs(*, skewed=False):
    """x, experts, gates, kernels; the last token of a row is padding, and most tokens want a few experts if skewed."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((ROWS, LENGTH, WIDTH)).astype(np.float32)
    scores = rng.standard_normal((ROWS, LENGTH, EXPERTS)) - 4.0 * skewed * (np.arange(EXPERTS) > 3)
    experts = np.argsort(-scores, axis=-1)[..., :K].astype(np.int32)
    experts[:, -1] = EXPERTS
    gates = rng.random((ROWS, LENGTH, K)).astype(np.float32) * (experts < EXPERTS)
    names = {"ffn1": (EXPERTS, WIDTH, 6), "ffn2": (EXPERTS, 6, WIDTH)}
    return x, experts, gates, {n: rng.standard_normal(s, np.float32) for n, s in names.items()}


def sorted_by_expert(x, experts, gates, kernels, how):
    """A sum over the results, the results, which choices had a place."""

    def compute(rows, sizes, matrices, reference):
        inner = jnp.tanh(matrices["ffn1"].grouped(rows, sizes, reference=reference))
        return matrices["ffn2"].grouped(inner, sizes, reference=reference)

    matrices = {name: Matrices(kernel) for name, kernel in kernels.items()}
    y, kept = dispatch.by_sorting(
        x, experts, gates, matrices, compute, num_experts=EXPERTS, exchange=how
    )
    return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape))), (y, kept)


def run(sizes, rules, how, x, experts, gates, kernels):
    """((sum, (results, places)), gradients), on the host."""
    differentiate = jax.value_and_grad(sorted_by_expert, argnums=(0, 2, 3), has_aux=True)
    with parallel.activate(meshes.build(sizes), rules):
        compute = jax.jit(
            functools.partial(differentiate, how=how), compiler_options=meshes.IN_HASTE
        )
        return jax.device_get(compute(x, experts, gates, kernels))


@functools.cache
def of_one_device():
    return run({"expert": 1}, None, None, *inputs())


@pytest.mark.parametrize(
    ("sizes", "rules"),
    [
        ({"fsdp": 2, "expert": 2}, BOTH),
        ({"tensor": 2, "expert": 2}, None),
    ],
    ids=lambda value: "x".join(value) if isinstance(value, dict) and len(value) < 4 else "",
)
def test_it_makes_no_difference_where_experts_are(sizes, rules):
    found = run(sizes, rules, Exchange("all_to_all"), *inputs())
    assert found[0][1][1] is None
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(of_one_device()), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_what_does_not_fit_is_left_out_where_it_is_sent():
    x, experts, gates, kernels = inputs(skewed=True)
    sizes, factor = {"expert": 4}, 1.25
    (_, (y, kept)), gradients = run(
        sizes, None, Exchange("all_to_all", factor), x, experts, gates, kernels
    )
    # A device has two experts and a row of six tokens with three experts each, so places for 22.5, up to 24 rows: as
    # many for each (sender, expert) as fit, first choices first, then earlier tokens.
    expected = np.ones_like(kept)
    for device in range(4):
        mine = [2 * device, 2 * device + 1]
        counts = [np.sum(experts[row] == expert) for row in range(ROWS) for expert in mine]
        most = max(m for m in range(20) if sum(min(c, m) for c in counts) <= 24)
        for row in range(ROWS):
            for expert in mine:
                queue = [
                    (j, t) for j in range(K) for t in range(LENGTH) if experts[row, t, j] == expert
                ]
                for j, t in queue[most:]:
                    expected[row, t, j] = False
    real = experts < EXPERTS
    assert 0 < np.sum(~expected) < np.sum(real) / 2
    np.testing.assert_array_equal(kept[real], expected[real])
    left = np.where(expected, experts, EXPERTS), np.where(expected, gates, 0)
    one = run({"expert": 1}, None, None, x, *left, kernels)
    np.testing.assert_allclose(y, one[0][1][0], atol=2e-5)
    for ours, theirs in zip(jax.tree.leaves(gradients[2]), jax.tree.leaves(one[1][2]), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_a_layer_says_what_found_no_place():
    x, _, _, kernels = inputs()
    how = Exchange("all_to_all", 1.0)
    layer = MoE(EXPERTS, 6, Router(Choice(k=2)), use_bias=False, exchange=how)
    x = np.abs(x)
    router = np.random.default_rng(2).standard_normal((WIDTH, EXPERTS)).astype(np.float32)
    router[:, :2] += 0.5  # two experts are wanted by most
    params = {name: {"kernel": kernel} for name, kernel in (kernels | {"router": router}).items()}

    def run_layer(**sequence):
        apply = lambda x: layer.apply(
            {"params": jax.tree.map(jnp.asarray, params)},
            x,
            Sequence(**sequence),
            mutable=[SUMMARIES],
        )
        return jax.device_get(jax.jit(apply, compiler_options=meshes.IN_HASTE)(x))

    with parallel.activate(meshes.build({"expert": 2, "context": 2}), None):
        some, sown = run_layer(train=True)
        whole, _ = run_layer(cache_length=8)  # generating drops no token
    found = sown[SUMMARIES]["moe"]
    over = found["over_capacity_1"] + found["over_capacity_2"]
    assert over == pytest.approx(found["dispatch_1"] + 2 * found["dispatch_0"])
    same = np.all(np.abs(some - whole) < 2e-5, axis=-1)
    assert np.mean(same) == pytest.approx(float(found["dispatch_2"])) and np.mean(same) < 1


@pytest.mark.parametrize(
    ("how", "places"),
    [
        (Exchange("all_to_all"), 4 * 6 * 2),  # each token to both experts of one device
        (Exchange("all_to_all", 1.25), 24),  # 18 x 1.25, in eights
    ],
    ids=str,
)
def test_a_gpu_is_asked_for_a_ragged_all_to_all_of_so_many_rows(how, places):
    x, experts, gates, kernels = inputs()
    loss = lambda *arrays: sorted_by_expert(*arrays, how)[0]
    with parallel.activate(meshes.build({"expert": 4}), None):
        with platform.traced_for(platform.Hardware("cuda", 9.0)):
            traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 3))).trace(
                x, experts, gates, kernels
            )
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    sent = re.findall(r"@ragged_all_to_all\(.*: \(tensor<(\d+)x4xf32>, tensor<(\d+)x4xf32>", text)
    # There, back, and the same for gradients.
    there, back = ("18", str(places)), (str(places), "18")
    assert sorted(sent) == sorted([there, back, there, back])
    assert not re.search(r"all_gather.*x4xf32", text)
