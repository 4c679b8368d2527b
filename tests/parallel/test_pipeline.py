"""The pipeline: the numbers of one device, the program that was meant, and what does not fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from collectives import KINDS, collectives
from parallel import meshes, nets

from paxlike import parallel
from paxlike.layers.lora import Lora
from paxlike.layers.stack import Pipeline
from paxlike.parallel.pipeline import _rounds_of_sends

ROWS = 16


def gpt(microbatches=4, repeats=1, **options):
    return nets.gpt(Pipeline(microbatches, repeats), **options)


def llama(microbatches=4, repeats=1, *, layers=4, **options):
    """Blocks that alternate between a window and none."""
    options["pipeline"] = Pipeline(microbatches, repeats)
    return nets.llama(windows=(8, None), tied=False, repeats=layers, **options)


def packed():
    return nets.packed(ROWS)


def plain(rows=ROWS):
    return nets.plain(rows)


CASES = {
    "two stages, dropout, unrolled": (
        gpt(2, layers=2, dropout=0.1, scan=False, remat="SAVE_EVERYTHING"),
        plain,
        {"pipeline": 2},
    ),
    "four stages": (gpt(8, remat="SAVE_DOT_ONLY"), packed, {"pipeline": 4}),
    "with tensor, twice around": (
        llama(4, 2, remat="SAVE_NOTHING"),
        packed,
        {"pipeline": 2, "tensor": 2},
    ),
    "with fsdp, twice around, dropout": (
        gpt(4, 2, dropout=0.1, remat="SAVE_NOTHING"),
        plain,
        {"pipeline": 2, "data": 1, "fsdp": 2},
    ),
    "with data, three times around": (
        llama(2, 3, layers=6),
        plain,
        {"data": 2, "pipeline": 2},
    ),
    "with context, dropout": (
        gpt(4, 2, dropout=0.1, remat="SAVE_NOTHING"),
        packed,
        {"pipeline": 2, "context": 2},
    ),
    "with adapters and their dropout": (
        gpt(2, 2, remat="SAVE_NOTHING", adapters={"qkv": Lora(4, dropout=0.3), "out": Lora(2)}),
        plain,
        {"pipeline": 2, "fsdp": 2},
    ),
    "with tensor and sequence": (
        llama(2, scan=False, remat="context"),
        plain,
        {"pipeline": 2, "tensor": 2},
        parallel.rules_with(residual_length=("context", "tensor")),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_one_device(name):
    net, batch, sizes, *rules = CASES[name]
    params = meshes.init(net)
    expected = meshes.loss_and_gradients(net, params, batch(), {"data": 1})
    found = meshes.loss_and_gradients(net, params, batch(), sizes, *rules)
    meshes.assert_same(found, expected, 2e-6)


def test_sixteen_bit_activations():
    """XLA:CPU dies of some 16-bit reductions in such programs."""
    net, sizes = gpt(4, 2, dtype="bfloat16"), {"pipeline": 2, "tensor": 2}
    params = meshes.init(net)
    exact = meshes.loss_and_gradients(gpt(4, 2), params, plain(), {"data": 1})
    rounded = meshes.loss_and_gradients(net, params, plain(), {"data": 1})
    found = meshes.loss_and_gradients(net, params, plain(), sizes)
    np.testing.assert_allclose(found[0], rounded[0], rtol=1e-3)
    assert meshes.distance(found[1], exact[1]) < 1.5 * meshes.distance(rounded[1], exact[1])


def test_a_stage_has_its_layers_only_and_sends_activations_only():
    net = gpt(4, width=64, remat="SAVE_NOTHING")
    program = meshes.compiled(net, plain(), {"pipeline": 2})
    sent = collectives(program)
    found = {kind: sum(sum(one.sizes) for one in sent[kind]) for kind in KINDS}
    activations = ROWS * tiny.LENGTH * 64  # of the whole batch
    # Each pass: all rows come to the stages and go back (a CPU reduces all of them and keeps its part).
    assert found["all-gather"] == 2 * activations
    assert found["collective-permute"] == 2 * activations // 4, "one microbatch a tick"
    assert found["all-to-all"] == found["reduce-scatter"] == 0
    # The table (as input and as output), the positions and the last norm are on all stages: their gradients are
    # summed, those of the layers are not.
    shared, scalars = (2 * tiny.VOCAB + tiny.LENGTH + 2) * 64, 2
    assert found["all-reduce"] == 2 * activations + shared + scalars
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(meshes.init(net)))
    layers = sum(leaf.nbytes for leaf in jax.tree.leaves(meshes.init(net)["stack"]))
    batch = sum(leaf.nbytes for leaf in plain().values())
    held = program.memory_analysis().argument_size_in_bytes
    assert held == whole - layers // 2 + batch // 2


@pytest.mark.parametrize("once", [True, False])
def test_weights_are_gathered_once_or_in_every_tick(once):
    net = gpt(4, width=64, remat="SAVE_NOTHING")
    pipeline = Pipeline(4, gather_once=once)
    net = net.clone(stack=net.stack.clone(pipeline=pipeline))
    gathers = collectives(meshes.compiled(net, plain(), {"pipeline": 2, "fsdp": 2}))["all-gather"]
    inside = [one for one in gathers if "/while/body/" in one.name]
    assert len(gathers) > len(inside) and bool(inside) != once
    params = meshes.init(net)
    expected = meshes.loss_and_gradients(net, params, plain(), {"data": 1})
    found = meshes.loss_and_gradients(net, params, plain(), {"pipeline": 2, "fsdp": 2})
    meshes.assert_same(found, expected, 2e-6)


@pytest.mark.parametrize("repeats", [1, 2])
def test_weights_are_not_kept_once_for_each_tick(repeats):
    """Rows long enough to fill 4 and 16 microbatches: more ticks must not take more memory."""
    few, many = (
        meshes.compiled(
            gpt(count, repeats, width=64, remat="SAVE_NOTHING"), plain(32), {"pipeline": 2}
        )
        for count in (4, 16)
    )
    few, many = (c.memory_analysis().temp_size_in_bytes for c in (few, many))
    assert many < few


def test_a_batch_that_no_pipeline_fits_is_evaluated_without_one():
    net = gpt(4)
    params, batch = meshes.init(net), plain(2)
    sizes = {"pipeline": 2}
    with parallel.activate(meshes.build(sizes)):
        assert Pipeline(4).fitting(16) == Pipeline(4)
        assert Pipeline(4).fitting(6) == Pipeline(2), "3 rows each"
        assert Pipeline(4).fitting(3) is None
        odd = jnp.asarray(batch["tokens"][:1])
        found = jax.jit(lambda p: net.apply({"params": p}, odd).hidden)(params)
        with pytest.raises(ValueError, match="1 rows do not make NUM_MICROBATCHES=4 parts over 2"):
            jax.eval_shape(lambda p: net.apply({"params": p}, odd, train=True).hidden, params)
    expected = jax.jit(lambda p: net.apply({"params": p}, odd).hidden)(params)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stages", range(2, 7))
@pytest.mark.parametrize("repeats", range(1, 5))
def test_weights_change_places_in_as_few_turns_as_there_are_repeats(stages, repeats):
    rounds = _rounds_of_sends(stages, repeats)
    assert len(rounds) == repeats
    for sends in rounds:
        assert len({a for a, *_ in sends}) == len({b for _, b, *_ in sends}) == stages
    groups = {(a * repeats + slot, there * stages + b) for s in rounds for a, b, slot, there in s}
    assert groups == {(g, g) for g in range(stages * repeats)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"stages": 4, "layers": 6, "microbatches": 4},
            r"6 repeats .* NUM_STAGES=4 x CIRCULAR_REPEAT=1; use a multiple of 4, or 3 stages",
        ),
        (
            {"stages": 2, "layers": 6, "microbatches": 2, "repeats": 2},
            r"NUM_STAGES=2 x CIRCULAR_REPEAT=2; use a multiple of 4, or 1 stages",
        ),
        (
            {"stages": 4, "layers": 8, "microbatches": 6},
            r"NUM_MICROBATCHES=6 is not a multiple of NUM_STAGES=4; use 8, or more: .* 3 /",
        ),
        (
            {"stages": 1, "layers": 8, "microbatches": 1, "repeats": 2},
            r"CIRCULAR_REPEAT=2 needs a pipeline",
        ),
        (
            {"stages": 2, "layers": 8, "microbatches": 2, "repeats": 0},
            r"CIRCULAR_REPEAT=0 must be",
        ),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        parallel.check_pipeline(
            arguments.pop("stages"), **dataclasses.replace(_Sizes(), **arguments).__dict__
        )
    assert "\n" not in str(error.value)


@dataclasses.dataclass
class _Sizes:
    layers: int = 4
    microbatches: int = 4
    repeats: int = 1


def test_bubble():
    assert parallel.bubble(1, 4) == 0
    assert parallel.bubble(4, 4) == pytest.approx(3 / 7)
    assert parallel.bubble(4, 8, 2) == pytest.approx(3 / 19)
