"""Plans on virtual CPU devices: what is read from the compiled program equals what arithmetic says."""

import json

import jax
import pytest

from configs import flags
from paxlike import parallel
from paxlike.ops import platform
from paxlike.plan import planner, report, target
from paxlike.plan.chips import CHIPS, find_chip
from paxlike.plan.hlo import Collective
from paxlike.plan.timeline import collective_seconds

CPU = find_chip("cpu")
# Sizes that no two of are equal, so that a number of bytes tells which array it is.
KNOBS = {
    "NUM_LAYERS": 3,
    "NUM_HEADS": 4,
    "DIMS_PER_HEAD": 16,
    "MODEL_DIMS": 64,
    "HIDDEN_DIMS": 192,
    "VOCAB_SIZE": 512,
    "MAX_SEQ_LEN": 32,
    "PERCORE_BATCH_SIZE": 2,
    "USE_REPEATED_LAYER": True,
    "CHECKPOINT_POLICY": "SAVE_NOTHING",
    "FPROP_DTYPE": "float32",
}
LAYER = 64 * 3 * 64 + 64 * 64 + 2 * 64 * 192  # elements of the matrices of a block


def experiment(config="Synthetic126M", **knobs):
    import fiddle as fdl

    given = [f"--fdl.{name}={value}" for name, value in {**KNOBS, **knobs}.items()]
    argv = ["main.py", f"--fdl_config={config}", "--fdl.DCN_MESH_SHAPE=[1,1,1]", *given]
    return fdl.build(flags.resolve(flags.split(argv)[0], {}).tree)


def made(mesh, **knobs):
    return planner.plan(experiment(ICI_MESH_SHAPE=mesh, **knobs), CPU)


@pytest.fixture(scope="module")
def plans():
    return {
        name: made(mesh)
        for name, mesh in {
            "data": "[4,1,1]",
            "fsdp": "[1,4,1]",
            "tensor": "[1,1,4]",
        }.items()
    }


def moved(plan, kind, *axes):
    found = [t for t in plan.estimate.collectives.values() if (t.kind, t.axes) == (kind, axes)]
    return sum(t.bytes for t in found)


def test_optimizer_bytes_per_device_are_one_nth(plans):
    whole = plans["data"].memory
    assert whole.parameters == 4 * plans["data"].num_parameters
    assert whole.moments == 2 * whole.parameters + 4, "two moments and a counter"
    assert whole.gradients == whole.parameters
    part = plans["fsdp"].memory
    matrices = 4 * (3 * LAYER + 512 * 64 + 32 * 64)
    rest = whole.parameters - matrices  # norms and biases are whole everywhere
    assert part.parameters == matrices // 4 + rest
    assert part.moments == 2 * part.parameters + 4
    # Over tensor also the biases of queries, keys, values and of the hidden layer; positions are whole.
    split = 4 * (3 * (LAYER + 3 * 64 + 192) + 512 * 64)
    assert plans["tensor"].memory.parameters == whole.parameters - split * 3 // 4


def test_fsdp_gathers_every_matrix_in_each_pass_and_reduces_its_gradient(plans):
    plan = plans["fsdp"]
    blocks, tables = 4 * 3 * LAYER, 4 * 512 * 64
    # Forward and again backward, as SAVE_NOTHING keeps no gathered weight; the tables once.
    gathered = moved(plan, "all-gather", "fsdp")
    assert gathered == 2 * blocks + tables + 4 * 32 * 64
    # The CPU has no reduce-scatter: what is scattered on a GPU is reduced here.
    reduced = moved(plan, "all-reduce", "fsdp") + moved(plan, "reduce-scatter", "fsdp")
    small = reduced - (blocks + 2 * tables + 4 * 32 * 64)
    assert 0 <= small < 10000, "norms, biases and scalars"
    assert {axes for _, axes, _ in plan.estimate.collectives} == {("fsdp",)}


def test_data_reduces_every_gradient_once_and_gathers_nothing(plans):
    plan = plans["data"]
    assert {kind for kind, *_ in plan.estimate.collectives} == {"all-reduce"}
    scalars = moved(plan, "all-reduce", "data") - 4 * plan.num_parameters - 4 * 512 * 64
    assert 0 <= scalars < 100, "the table is reduced for the look-up and for the loss"


def test_tensor_reduces_activations_twice_per_block_and_pass(plans):
    plan = plans["tensor"]
    residual = 4 * plan.tokens * 64
    # Forward and backward two for each block; recomputed only the first, as nothing in the backward pass needs the sum
    # behind the feed-forward layer. One for the look-up, one for the derivative of the loss.
    small = moved(plan, "all-reduce", "tensor") - (3 * (2 + 2 + 1) + 2) * residual
    assert 0 <= small < 4000, "of each token what softmax and loss need, and scalars"
    assert {axes for _, axes, _ in plan.estimate.collectives} == {("tensor",)}


def test_executed_flops_are_the_models_and_the_recomputation(plans):
    for plan in plans.values():
        assert plan.flops < plan.traced_flops < plan.flops * 1.5
        # No device does the work of another: what is compiled adds up to what was traced.
        assert plan.estimate.flops * 4 == plan.traced_flops


def test_time_is_at_least_each_part_and_at_most_their_sum(plans):
    for plan in plans.values():
        estimate = plan.estimate
        assert (
            estimate.seconds_with_full_overlap
            <= estimate.step_seconds
            <= estimate.seconds_without_overlap + 1e-9
        )
        assert estimate.product_seconds + estimate.memory_seconds < estimate.compute_seconds
        assert 0 < plan.mfu < 1


def test_compile_time_does_not_grow_with_depth():
    texts = []
    for layers in (2, 12):
        program = planner.lower(experiment(ICI_MESH_SHAPE="[1,4,1]", NUM_LAYERS=layers), CPU)
        texts.append(program.lowered.as_text())
    assert len(texts[1]) < 1.02 * len(texts[0])


def test_nothing_is_allocated_and_nothing_is_read(monkeypatch, tmp_path):
    text = experiment(
        "Pile126M",
        ICI_MESH_SHAPE="[1,4,1]",
        VOCAB_PATH=tmp_path / "absent.model",
        TRAIN_FILES=tmp_path / "absent.jsonl",
    )
    before = len(jax.live_arrays())
    program = planner.lower(text, CPU)
    assert len(jax.live_arrays()) == before
    assert {leaf.shape for leaf in program.spec.values()} == {(8, 32)}


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"ICI_MESH_SHAPE": "[-1,1,1]"}, "say how many with --devices=N"),
        ({"ICI_MESH_SHAPE": "[1,1,8]"}, "set JAX_NUM_CPU_DEVICES=8"),
        ({"ICI_MESH_SHAPE": "[4,1,1]", "PERCORE_BATCH_SIZE": 0.5}, "do not divide over"),
        (
            {"config": "Lambada126M", "MAX_SEQ_LEN": 128, "ICI_MESH_SHAPE": "[4,1,1]"},
            "no training step to plan",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(knobs, message):
    with pytest.raises(ValueError, match=message) as error:
        planner.plan(experiment(**knobs), CPU)
    assert "\n" not in str(error.value)


def test_number_of_devices_fills_the_mesh():
    plan = planner.plan(experiment(ICI_MESH_SHAPE="[-1,1,2]"), CPU, num_devices=4)
    assert plan.mesh == {"data": 2, "fsdp": 1, "tensor": 2}
    with pytest.raises(ValueError, match="needs 4 devices .* there are 8"):
        planner.plan(experiment(ICI_MESH_SHAPE="[1,4,1]"), CPU, num_devices=8)


def test_text_and_json_tell_the_same(plans):
    plan = plans["fsdp"]
    text = report.text(plan, num_tokens=1e9, gpu_hours=100)
    assert "Synthetic126M on 4 x cpu, 1 node(s) of 4: data=1 fsdp=4 tensor=1" in text
    assert "not to be trusted" in text and "fits: " in text
    assert f"{plan.estimate.step_seconds:.4f}" in text
    loaded = json.loads(report.as_json(plan, command="x"))
    assert loaded["memory"]["parameters"] == plan.memory.parameters and loaded["memory"]["fits"]
    assert loaded["estimate"]["step_seconds"] == plan.estimate.step_seconds
    assert {c["kind"] for c in loaded["estimate"]["collectives"]} >= {"all-gather"}


def test_a_budget_is_consistent(plans):
    plan = plans["data"]
    found = report.budget(plan, 1e9, None)
    assert found["days"] * 86400 * plan.tokens_per_second == pytest.approx(1e9)
    back = report.budget(plan, None, found["device_hours"])
    assert back["budget_tokens"] == pytest.approx(1e9)
    # The model itself, counted by 6 N T, within what attention and the vocabulary add at this size.
    both = report.budget(plan, 1e9, found["device_hours"])["budget_parameters"]
    assert both == pytest.approx(plan.num_parameters, rel=0.5)


def test_links_and_networks():
    chip, eight = CHIPS["h100"], tuple(range(8))
    inside = Collective("c", "all-gather", 8 << 30, (eight,))
    seconds, across = collective_seconds(inside, chip=chip, nodes=[0] * 8, efficiency=1.0)
    assert not across and seconds == pytest.approx((7 << 30) / 450e9 + 15e-6)
    # Two nodes: half of the array comes from the other one, over the adapters of all four devices of a node.
    nodes = [0] * 4 + [1] * 4
    seconds, across = collective_seconds(inside, chip=chip, nodes=nodes, efficiency=1.0)
    assert across and seconds == pytest.approx((4 << 30) / (4 * 50e9) + 40e-6)
    # The same number of devices, one of each of eight nodes: one adapter only.
    spread = collective_seconds(inside, chip=chip, nodes=list(range(8)), efficiency=1.0)[0]
    assert spread == pytest.approx((7 << 30) / 50e9 + 40e-6)


def test_chips_are_found_by_name():
    with pytest.raises(ValueError, match=r"--chip=h10 is none of h100, .*; did you mean h100\?"):
        find_chip("h10")
    for chip in CHIPS.values():
        assert chip.peak_flops("bfloat16") > 0 and chip.peak_flops("float32") > 0
        assert chip.memory_bytes > 2**30


def test_a_missing_compiler_is_named_with_the_remedy(monkeypatch):
    def absent(name):
        if name == "jax":
            return "0.10.2"
        raise target.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(target.importlib.metadata, "version", absent)
    with pytest.raises(ValueError, match="pip install jax-cuda13-plugin==0.10.2 .*--chip=cpu"):
        target.check_compiler(CHIPS["h100"])
    with pytest.raises(ValueError, match=r'pip install "jax\[tpu\]==0.10.2"'):
        target.check_compiler(CHIPS["v5p"])
    target.check_compiler(CPU)


def test_nodes_follow_the_mesh():
    h100 = CHIPS["h100"]
    sizes = {
        ((1, 8, 1), (1, 32, 1)): 8,
        ((1, 64, 1), (1, 1, 1)): 8,
        ((1, 4, 1), (2, 1, 1)): 4,
        ((1, 1, 4), (1, 1, 1)): 4,
        ((1, 16, 1), (4, 1, 1)): 8,
        ((1, 12, 1), (1, 1, 1)): 6,
    }
    for (ici, dcn), per_node in sizes.items():
        assert target.devices_per_node(parallel.Mesh(ici, dcn), h100) == per_node


def test_ops_take_the_forms_of_the_planned_hardware():
    assert platform.is_cpu() and not platform.is_nvidia()
    with platform.traced_for(platform.Hardware("cuda", 9.0)):
        assert platform.is_nvidia() and not platform.is_cpu()
        assert platform.compute_capability() == 9.0 and platform.name() == "gpu"
        with platform.traced_for(platform.Hardware("tpu")):
            assert platform.name() == "tpu" and not platform.is_nvidia()
    assert platform.is_cpu()
