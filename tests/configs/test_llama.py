"""The LLaMA family: published sizes, golden trees, wrong knobs; parity with Hugging Face is in tests/parity."""

import pathlib

import fiddle as fdl
import jax
import pytest

from configs import flags, llama
from paxlike import parallel
from paxlike.train.state import abstract_variables, num_parameters
from tests.configs.golden_files import compare, tree_of_parameters, variables

GOLDEN = pathlib.Path(__file__).parent / "golden"

# Parameters as published with the weights (counted from their shapes).
SIZES = {
    "LLaMA7B": 6_738_415_616,
    "LLaMA13B": 13_015_864_320,
    "LLaMA70B": 68_976_648_192,
    "LLaMA3_1_8B": 8_030_261_248,
    "LLaMA3_1_70B": 70_553_706_496,
    "LLaMA3_2_1B": 1_235_814_400,
    "Mistral7B": 7_241_732_096,
    "Qwen2_5_7B": 7_615_616_512,
    "Qwen2_5_0_5B": 494_032_768,
    "Qwen3_8B": 8_190_735_360,
    "Qwen3_0_6B": 596_049_920,
    "Gemma2_2B": 2_614_341_888,
    "Gemma2_9B": 9_241_705_984,
    "Gemma2_27B": 27_227_128_320,
    "Gemma3_1B": 999_885_952,
    "Gemma3_4B": 3_880_263_168,
    "Gemma3_12B": 11_766_034_176,
    "Gemma3_27B": 27_009_346_304,
}


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_are_exact(name):
    assert num_parameters(variables(getattr(llama, name)())["params"]) == SIZES[name]


@pytest.mark.parametrize("name", ["LLaMA7B", "LLaMA70B", "Qwen2_5_7B", "Gemma3_12B"])
def test_golden(name, request):
    config = getattr(llama, name)()
    compare(GOLDEN / f"{name}.txt", flags.flat_text(config.experiment()) + "\n", request)
    compare(GOLDEN / f"{name}.params.txt", tree_of_parameters(config), request)


def test_one_weight_for_queries_keys_and_values_has_as_many_parameters():
    separate, combined = (
        num_parameters(variables(llama.LLaMA7B(NUM_LAYERS=2, COMBINE_QKV=value))["params"])
        for value in (False, True)
    )
    assert separate == combined


def test_periods():
    gemma = llama.Gemma3_12B().experiment().model.stack
    assert [block.mixer.window for block in gemma.period] == [1024] * 5 + [None]
    assert [block.mixer.rope.theta for block in gemma.period] == [1e4] * 5 + [1e6]
    assert [block.mixer.rope.scaling is None for block in gemma.period] == [True] * 5 + [False]
    assert gemma.repeats == 8
    (block,) = llama.Mistral7B().experiment().model.stack.period
    assert block.mixer.window == 4096


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("LLaMA7B", {"NUM_KV_HEADS": 5}, "NUM_HEADS=32 is not a multiple of NUM_KV_HEADS=5"),
        ("LLaMA7B", {"NUM_KV_HEADS": 0}, "NUM_KV_HEADS=0 must be at least 1"),
        ("LLaMA70B", {"USE_MQA": True}, "USE_MQA=True is one key/value head, not NUM_KV_HEADS=8"),
        ("LLaMA70B", {"COMBINE_QKV": True}, "COMBINE_QKV=True needs as many .* not 8 of 64"),
        ("LLaMA7B", {"LOCAL_LAYERS_PER_GLOBAL": 1}, "LOCAL_LAYERS_PER_GLOBAL=1 needs a SLIDING_W"),
        (
            "Gemma2_2B",
            {
                "NUM_LAYERS": 5,
                "MESH_AXES": ("pipeline", "fsdp", "tensor"),
                "ICI_MESH_SHAPE": (2, 1, 1),
            },
            "NUM_LAYERS=5 leaves 1 over of periods of 2 blocks",
        ),
        ("LLaMA7B", {"HIDDEN_DIMS": 0}, "HIDDEN_DIMS=0 must be at least 1"),
        (
            "LLaMA3_1_8B",
            {"ROPE_MSCALE": 0.7, "ROPE_MSCALE_ALL_DIM": 0.7},
            "ROPE_MSCALE=0.7 has no effect with ROPE_SCALING=llama3: leave it out, or set ROPE_SCALING=yarn$",
        ),
        (
            "Gemma3_12B",
            {"ROPE_ORIGINAL_LEN": 16},
            "ROPE_ORIGINAL_LEN=16 has no effect with ROPE_SCALING=linear: .* set ROPE_SCALING=llama3 or yarn$",
        ),
        (
            "LLaMA7B",
            {"ROPE_SCALING_FACTOR": 2.0},
            "FACTOR=2.0 has no effect with ROPE_SCALING=None",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_anything_is_made(name, changes, message):
    with pytest.raises(ValueError, match=message):
        getattr(llama, name)(**changes).experiment()


def test_rope_of_odd_heads_is_refused_with_the_knob():
    model = fdl.build(llama.LLaMA7B(DIMS_PER_HEAD=7, NUM_LAYERS=1).experiment()).model
    mesh = parallel.Mesh(ici=(1, 1, 1)).build(jax.devices()[:1])
    with parallel.activate(mesh), pytest.raises(ValueError, match="DIMS_PER_HEAD=7 must be even"):
        abstract_variables(model, mesh)
