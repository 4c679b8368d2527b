"""The search: what is tried, what is refused and why, and that the best is what a person can paste."""

import dataclasses

import fiddle as fdl
import pytest

from configs import flags
from paxlike import parallel
from paxlike.ops.attention_kernels import recording
from paxlike.plan import command, planner, report
from paxlike.plan.chips import CHIPS
from paxlike.plan.search import activations, candidates, lay_out, search

H100 = CHIPS["h100"]
CPU = CHIPS["cpu"]
ARGV = [
    "main.py",
    "--fdl_config=Synthetic126M",
    *(
        f"--fdl.{name}={value}"
        for name, value in {
            "ICI_MESH_SHAPE": "[1,4,1]",
            "DCN_MESH_SHAPE": "[1,1,1]",
            "NUM_LAYERS": 2,
            "NUM_HEADS": 2,
            "DIMS_PER_HEAD": 16,
            "MODEL_DIMS": 32,
            "HIDDEN_DIMS": 128,
            "VOCAB_SIZE": 256,
            "MAX_SEQ_LEN": 32,
            "PERCORE_BATCH_SIZE": 2,
            "USE_REPEATED_LAYER": True,
            "FPROP_DTYPE": "float32",
        }.items()
    ),
]


def change(knobs):
    more = [f"--fdl.{name}={value}" for name, value in knobs.items()]
    return fdl.build(flags.resolve(flags.split([*ARGV, *more])[0], {}).tree)


def test_fast_axes_lie_inside_the_nodes():
    laid = {
        (1, 256, 1): ((1, 8, 1), (1, 32, 1)),
        (4, 16, 4): ((1, 2, 4), (4, 8, 1)),
        (1, 16, 16): ((1, 1, 8), (1, 16, 2)),
        (2, 2, 1): ((2, 2, 1), (1, 1, 1)),
        (16, 1, 1): ((8, 1, 1), (2, 1, 1)),
    }
    for shape, (ici, dcn) in laid.items():
        mesh = lay_out(dict(zip(parallel.AXES, shape, strict=True)), H100)
        assert (mesh.ici, mesh.dcn) == (ici, dcn)
    with pytest.raises(ValueError, match="cannot fill nodes of 8 h100"):
        lay_out({"data": 3, "fsdp": 3, "tensor": 4}, H100)


def test_every_mesh_is_tried_and_other_axes_stay():
    mesh = parallel.Mesh((1, 2, 1, 1), axes=("other", "data", "fsdp", "tensor"))
    found = [c for c in candidates(mesh, 8, 8, H100, ["A", "B"]) if not isinstance(c, str)]
    shapes = {tuple(c.mesh.shape.values()) for c in found}
    assert len(shapes) == 10 and {shape[0] for shape in shapes} == {1}
    of_tensor = [c.num_microbatches for c in found if c.mesh.shape["tensor"] == 8]
    assert sorted(set(of_tensor)) == [1, 2, 4, 8] and len(of_tensor) == 8
    of_data = [c.num_microbatches for c in found if c.mesh.shape["data"] == 8]
    assert set(of_data) == {1}, "one row for each shard"
    with pytest.raises(ValueError, match="8 devices do not divide by 3"):
        list(candidates(dataclasses.replace(mesh, ici=(3, 2, 1, 1)), 8, 8, H100, [None]))
    assert list(candidates(parallel.Mesh((1,), axes=("data",)), 8, 4, H100, [None])) == [
        "the 4 rows of a step do not divide over data"
    ]


def test_pipelines_are_tried_where_their_stages_divide_the_layers():
    items = list(candidates(parallel.Mesh((8, 1, 1)), 8, 16, H100, ["A"], repeats=12))
    refused = [item for item in items if isinstance(item, str)]
    assert refused == ["12 repeats of the blocks do not divide over 8 pipeline stages"]
    found = [item for item in items if not isinstance(item, str)]
    assert {candidate.stages for candidate in found} == {1, 2, 4}
    (eight,) = [c for c in found if c.stages == 2 and c.mesh.shape["tensor"] == 4][-1:]
    assert eight.num_microbatches == 16, "a multiple of the stages, of at least one row each"
    assert eight.flags == (
        "--fdl.ICI_MESH_SHAPE=[2,1,1,4] --fdl.DCN_MESH_SHAPE=[1,1,1,1] --fdl.NUM_MICROBATCHES=16 "
        "--fdl.NUM_STAGES=2 --fdl.CHECKPOINT_POLICY=A"
    )
    without = [c for c in found if c.stages == 1]
    assert all("NUM_STAGES" not in c.knobs and "pipeline" not in c.mesh.shape for c in without)
    (other,) = list(
        candidates(parallel.Mesh((1, 1), axes=("context", "data")), 2, 2, H100, ["A"], repeats=2)
    )[-1:]
    assert other.knobs["MESH_AXES"] == "[pipeline,context,data]"


def test_policies_that_keep_more_have_more_bytes_and_fewer_flops():
    names = ("SAVE_NOTHING", "SAVE_DOT_WITH_NO_BATCH_DIM", "SAVE_EVERYTHING")
    kept = [activations(change({"CHECKPOINT_POLICY": name}), CPU) for name in names]
    inputs = 2 * 32 * 32 * 4  # of two blocks: length, width, float32
    assert inputs < kept[0].bytes < kept[1].bytes < kept[2].bytes
    assert kept[0].bytes < 4 * inputs, (
        "and at the ends of the model what the loss, norm and look-up need"
    )
    # The forward pass is a third of the work and is done twice.
    assert kept[0].flops > kept[1].flops >= kept[2].flops
    assert kept[0].flops == pytest.approx(kept[2].flops * 4 / 3, rel=0.25)


def test_a_gpu_is_planned_with_fused_attention_though_there_is_none():
    narrow = change({"FPROP_DTYPE": "bfloat16"})
    fused, plain = activations(narrow, H100), activations(narrow, CPU)
    scores = 2 * 2 * 32 * 32  # of two layers and heads, which the fused form does not keep
    assert fused.bytes < plain.bytes - 2 * scores
    assert fused.flops > 0.9 * plain.flops
    with recording() as choices:  # of a size that jax itself would refuse without a GPU
        activations(change({"FPROP_DTYPE": "bfloat16", "DIMS_PER_HEAD": 192}), H100)
    assert {choice.kernel.name for choice in choices} == {"cudnn"}


@pytest.fixture(scope="module")
def found():
    return search(
        change({}),
        change,
        CPU,
        num_devices=4,
        policies=["SAVE_NOTHING", "SAVE_EVERYTHING"],
        max_compiles=2,
    )


def test_the_best_is_the_fastest_that_fits(found):
    assert len(found.compiled) == 2
    seconds = [plan.estimate.step_seconds for _, plan in found.compiled if plan.fits]
    assert seconds == sorted(seconds)
    candidate, plan = found.best
    assert plan is found.compiled[0][1]
    # What is printed to be pasted makes the same plan again.
    again = planner.plan(change(dict(candidate.knobs)), CPU)
    assert again.mesh == plan.mesh and again.memory == plan.memory
    assert again.rows == plan.rows == 8


def test_refusals_are_grouped(found):
    reason = "'heads' = 2 does not divide over tensor"
    stages = "2 repeats of the blocks do not divide over 4 pipeline stages"
    assert set(found.refused) == {reason, stages}
    # tensor=4 for 8, 4, 2 and 1 rows a microbatch, two policies.
    assert len(found.refused[reason]) == 8
    text = report.search_table(found)
    assert "8 refused: 'heads' = 2 does not divide over tensor" in text
    assert f"{len(found.later)} not compiled" in text


def test_what_cannot_fit_is_not_compiled(monkeypatch):
    def compiled(*args, **kwargs):
        raise AssertionError("nothing should be compiled")

    monkeypatch.setattr(planner, "plan", compiled)
    small = dataclasses.replace(CPU, memory_bytes=60_000)
    none = search(
        change({}), change, small, num_devices=4, policies=["SAVE_NOTHING"], max_compiles=3
    )
    assert none.best is None and not none.compiled and not none.later
    assert any("state and gradients alone" in reason for reason in none.refused)


def test_a_search_says_what_is_missing():
    with pytest.raises(ValueError, match="--search_compiles=0 must be at least 1"):
        command.search(change({}), change, command.Options("cpu"), policy=None, max_compiles=0)
    with pytest.raises(ValueError, match="a search needs --devices=N"):
        open_mesh = change({"ICI_MESH_SHAPE": "[-1,1,1]"})
        command.search(open_mesh, change, command.Options("cpu"), policy=None, max_compiles=1)
    odd = change({"PERCORE_BATCH_SIZE": 0.3})
    with pytest.raises(ValueError, match=r"0.3 x 4 devices = 1.2 rows is not a whole number"):
        command.search(odd, change, command.Options("cpu"), policy=None, max_compiles=1)
