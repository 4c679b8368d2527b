"""ZeRO: who keeps what, what travels, the same losses; offload to the host; sums of microbatches in 16 bits."""

import math
import re

import fiddle as fdl
import jax
import numpy as np
import pytest
import tiny
from collectives import collectives

from configs.gpt import Quickstart
from paxlike import parallel
from paxlike.checkpoint import Checkpointer
from paxlike.parallel import Zero
from paxlike.train.matrices import named
from paxlike.train.state import check_offload

NET = tiny.model(layers=2)
STAGES = {
    "1": ((1, 4, 1), Zero(1)),
    "2": ((1, 4, 1), Zero(2)),
    "2, over data": ((4, 1, 1), Zero(2, ("data",))),
    "3, state over data too": ((2, 2, 1), Zero(3, ("data", "fsdp"))),
}


@pytest.fixture(scope="module")
def reference():
    return tiny.Trainer(net=NET, opt=tiny.optimizer(ema_decay=0.9)).losses()


@pytest.fixture(scope="module")
def trainers():
    made = {}

    def make(name):
        if name not in made:
            shape, zero = STAGES[name]
            made[name] = tiny.Trainer(
                shape, net=NET, opt=tiny.optimizer(ema_decay=0.9), zero=zero, microbatches=2
            )
        return made[name]

    return make


def on_a_device(tree):
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def whole(tree):
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def kernels(tree):
    return [x for name, x in named(tree).items() if name.endswith(("kernel", "table"))]


@pytest.mark.parametrize("name", STAGES)
def test_same_losses_as_one_device(name, trainers, reference):
    np.testing.assert_allclose(trainers(name).losses(), reference, rtol=1e-5)


@pytest.mark.parametrize("name", STAGES)
def test_bytes_on_a_device(name, trainers):
    trainer, (shape, zero) = trainers(name), STAGES[name]
    abstract, parts = trainer.abstract, math.prod(shape)
    of_params = shape[1] if zero.stage == 3 else 1
    assert on_a_device(kernels(abstract.params)) == whole(kernels(abstract.params)) / of_params
    for tree in (abstract.opt_state, abstract.ema):
        assert kernels(tree) and on_a_device(kernels(tree)) == whole(kernels(tree)) / parts
    expected = on_a_device([abstract, trainer.factory.spec])
    memory = trainer.compiled.memory_analysis()
    assert memory.argument_size_in_bytes == pytest.approx(expected, rel=0.01)
    assert memory.alias_size_in_bytes >= on_a_device(abstract)  # nothing is copied


def test_stage_2_holds_a_part_of_the_gradient_between_microbatches(trainers):
    """The loop over microbatches carries sharded sums in stage 2 and whole ones in stage 1."""
    size = {
        name: trainers(name).compiled.memory_analysis().temp_size_in_bytes for name in ("1", "2")
    }
    params = whole(trainers("1").abstract.params)
    assert size["1"] - size["2"] > 0.5 * params


@pytest.mark.parametrize("name", ["1", "2"])
def test_new_parameters_are_gathered_once_and_weights_never(name, trainers):
    found, params = collectives(trainers(name).compiled), trainers(name).abstract.params
    sizes = [x.size for x in kernels(params)]
    assert sorted(n for one in found["all-gather"] for n in one.sizes if n >= min(sizes)) == sorted(
        sizes
    )
    assert not found["all-to-all"] and not found["collective-permute"]


def test_checkpoints_go_from_stage_to_stage(trainers, tmp_path):
    first, second = trainers("2"), trainers("3, state over data too")
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(4, first.state, data={}, config="{}", wait=True, force=True)
        restored = checkpointer.restore(second.abstract).state
    jax.tree.map(np.testing.assert_array_equal, restored, first.state)
    place = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
    assert place(restored) == place(second.abstract)
    second.state, batch = restored, first.data[0]
    losses = [trainer.step(batch)["loss"].value() for trainer in (first, second)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_state_lies_inside_the_own_part_of_the_parameters():
    """The axes of the parameters come first, so that slicing needs no exchange."""
    rules = Zero(3, ("data", "fsdp")).state_rules(None)
    assert rules["embed"] == ("fsdp", "data")
    assert Zero().state_rules(None)["embed"] == ("fsdp",)
    assert Zero(2).parameter_rules(None)["embed"] is None
    own = {**parallel.DEFAULT_RULES, "embed": ("expert", "fsdp")}
    assert Zero(3, ("fsdp", "data")).state_rules(own)["embed"] == ("expert", "fsdp", "data")
    assert Zero(1, ("data",)).state_rules(own)["embed"] == ("expert", "data")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Zero(4), "ZERO_STAGE=4 is none of 1, 2, 3"),
        (lambda: Zero(2, ("data", "data")), "ZERO_AXES=['data', 'data'] must name one or more"),
        (lambda: Zero(3, ("data",)), "leaves out fsdp, over which ZERO_STAGE=3 shards"),
        (
            lambda: Zero(2, ("rows",)).check({"data": 4, "fsdp": 1}),
            "ZERO_AXES=['rows']: the mesh has no axis 'rows'; its axes are data, fsdp",
        ),
        (
            lambda: Zero(2).check({"data": 4, "fsdp": 1}),
            "ZERO_STAGE=2 has no effect: ZERO_AXES=['fsdp'] are one device on data=4 x fsdp=1",
        ),
        (
            lambda: tiny.Trainer(
                (4, 1, 1), net=tiny.model(width=6, heads=2), zero=Zero(2, ("data",))
            ),
            "state 'opt_state/0/mu/embedding/table' of shape (256, 6): its dimension 'embed' = 6 does not divide over "
            "the mesh axis data = 4; use data = 2",
        ),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 1)], ids=str)
def test_the_optimizer_state_can_wait_on_the_host(shape, reference):
    """A CPU has this kind of memory too, but its compiler does not count it apart: the kinds are what is tested."""
    check_offload()
    trainer = tiny.Trainer(shape, net=NET, opt=tiny.optimizer(ema_decay=0.9), offload=True)
    np.testing.assert_allclose(trainer.losses(), reference, rtol=1e-5)
    for x in jax.tree.leaves(trainer.state.opt_state):
        assert x.sharding.memory_kind == ("pinned_host" if x.ndim else "device")
    assert {x.sharding.memory_kind for x in jax.tree.leaves(trainer.state.params)} == {"device"}


def test_offload_is_refused_where_there_is_no_such_memory(monkeypatch):
    class Device:
        device_kind = "toaster"

        def addressable_memories(self):
            return [type("Memory", (), {"kind": "device"})]

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    with pytest.raises(
        ValueError, match="needs the memory kind pinned_host, and toaster has device"
    ):
        check_offload()


def test_gradients_can_be_added_in_16_bits():
    options = {"net": tiny.model(layers=1), "microbatches": 4, "data": tiny.batches(1)}
    half = tiny.Trainer(accumulation_dtype="bfloat16", **options)
    full = tiny.Trainer(**options)
    memory = [t.compiled.memory_analysis().temp_size_in_bytes for t in (half, full)]
    assert memory[1] - memory[0] > 0.4 * 2 * sum(
        x.size for x in jax.tree.leaves(full.abstract.params)
    )
    losses = [[t.step(t.data[0])["loss"].value() for _ in range(20)] for t in (half, full)]
    assert losses[0][-1] < losses[0][0] - 0.3
    np.testing.assert_allclose(*losses, rtol=1e-2)


def built(**knobs):
    return fdl.build(Quickstart(**knobs).experiment())


def test_knobs_reach_the_experiment_and_are_checked():
    experiment = built(
        ZERO_STAGE=1, ZERO_AXES=("fsdp", "data"), NUM_MICROBATCHES=2, OFFLOAD_OPTIMIZER_STATE=True
    )
    assert experiment.zero == Zero(1, ("fsdp", "data")) and experiment.offload_optimizer_state
    assert built().zero == Zero()
    four = {"ICI_MESH_SHAPE": (4, 1, 1), "DCN_MESH_SHAPE": (1, 1, 1)}
    with pytest.raises(ValueError, match="ZERO_STAGE=2 has no effect"):
        built(ZERO_STAGE=2, **four).check()
    with pytest.raises(ValueError, match="has no effect with NUM_MICROBATCHES=1"):
        built(GRADIENT_ACCUMULATION_DTYPE="bfloat16", **four).check()
    built(GRADIENT_ACCUMULATION_DTYPE="bfloat16", NUM_MICROBATCHES=2, **four).check()
