"""Configs with experts: published sizes, Pax's numbers, golden trees, wrong knobs."""

import pathlib
import re

import fiddle as fdl
import jax
import jax.numpy as jnp
import pytest

from configs import deepseek, flags, glam, mixtral
from paxlike.log.flops import matmul_flops
from paxlike.ops import attention
from paxlike.ops.routing import capacity
from paxlike.train.state import num_parameters
from tests.configs.golden_files import compare, tree_of_parameters, variables

GOLDEN = pathlib.Path(__file__).parent / "golden"
ONE = {"ICI_MESH_SHAPE": (1, 1, 1), "DCN_MESH_SHAPE": (1, 1, 1)}
# Of GLaM: Pax's, 1.922 B and 1.143 T; of the others as published, counted in Hugging Face's classes of the published
# `config.json` (DeepSeek-V3: without multi-token prediction, and with 58 x 256 biases that are no parameters there).
SIZES = {
    "PileGLaM126M64E": 1_921_670_400,
    "PileGLaM64B64E": 1_142_891_356_160,
    "Mixtral8x7B": 46_702_792_704,
    "Mixtral8x22B": 140_620_634_112,
    "Qwen3_30B_A3B": 30_532_122_624,
    "Qwen3_235B_A22B": 235_093_634_560,
    "DeepSeekV2Lite": 15_706_484_224,
    "DeepSeekV3": 671_026_404_352 + 58 * 256,
}
# Of a token: without the experts that it does not go to.
ACTIVE = {
    "Mixtral8x7B": 12_879_925_248,
    "Qwen3_30B_A3B": 3_353_032_704,
    "DeepSeekV2Lite": 2_661_150_208,
    "DeepSeekV3": 37_552_297_472,
}


def config(name, **changes):
    room = next((m for m in (glam, deepseek) if hasattr(m, name)), mixtral)
    return getattr(room, name)(**changes)


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_are_exact(name):
    assert num_parameters(variables(config(name))["params"]) == SIZES[name]


@pytest.mark.parametrize("name", ACTIVE)
def test_flops_are_those_of_the_parameters_of_a_token(name):
    found, model = variables(config(name)), fdl.build(config(name).experiment()).model

    def flops(length):
        def forward(variables):
            with attention.plain():
                return model.apply(variables, jnp.zeros((1, length), jnp.int32)).logits()

        return matmul_flops(forward, found)

    leaves = jax.tree_util.tree_leaves_with_path(found["params"])
    name_of = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    others = [leaf for path, leaf in leaves if not re.search("kernel|head/table", name_of(path))]
    # 2 FLOPs a parameter and token; scores grow with the square of the length.
    assert (4 * flops(1) - flops(2)) / 4 + num_parameters(others) == ACTIVE[name]


@pytest.mark.parametrize("name", ["PileGLaM126M64E", "PileGLaM64B64E", "Mixtral8x7B"])
def test_golden(name, request):
    compare(GOLDEN / f"{name}.txt", flags.flat_text(config(name).experiment()) + "\n", request)
    compare(GOLDEN / f"{name}.params.txt", tree_of_parameters(config(name)), request)


@pytest.mark.parametrize(
    ("name", "changes", "group", "places", "weight"),
    [
        ("PileGLaM126M64E", {"PERCORE_BATCH_SIZE": 4}, 8192, 256, 0.01 / 6),
        ("PileGLaM126M64E", {}, 16384, 512, 0.01 / 6),
        ("PileGLaM64B64E", {"MAX_SEQ_LEN": 1024}, 32768, 1024, 0.01 / 32),
    ],
)
def test_groups_capacity_and_weight_are_those_of_pax(name, changes, group, places, weight):
    experts, dense = config(name, **changes).experiment().model.stack.period
    router = fdl.build(experts.ffn.router)
    assert router.group_size == group
    assert capacity(group, 64, router.capacity_factor) == places
    assert router.balance_weight == pytest.approx(weight, rel=1e-12)
    assert (experts.ffn.gated, experts.ffn.activation) == (False, "relu")
    assert (dense.ffn.gated, dense.ffn.activation) == (True, "gelu")


@pytest.mark.parametrize("name", ["SyntheticGLaM126M64E", "LambadaGLaM64B64E"])
def test_the_others_differ_in_data_alone(name):
    base = "PileGLaM126M64E" if "126M" in name else "PileGLaM64B64E"
    model = lambda of: flags.flat_text(config(of, **ONE).experiment().model)
    assert model(name) == model(base)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Mixtral8x7B", {"NUM_EXPERTS_PER_TOKEN": 9}, "NUM_EXPERTS_PER_TOKEN=9 is not between 1 a"),
        ("Mixtral8x7B", {"NUM_EXPERTS": 0}, "NUM_EXPERTS=0 must be at least 1"),
        (
            "PileGLaM126M64E",
            {"NUM_EXPERTS": 48},
            r"NUM_EXPERTS=48 does not divide over fsdp = 64; use 48 devices there, or a multiple of 64",
        ),
        (
            "PileGLaM126M64E",
            {"EXPERT_CAPACITY_FACTOR": 0.001},
            r"EXPERT_CAPACITY_FACTOR=0.001 x 16384 .* less than one token",
        ),
        (
            "PileGLaM126M64E",
            {"MOE_GROUPS": 100},
            "MOE_GROUPS=100 does not divide the batch of 512 rows x 2048 tokens",
        ),
        ("PileGLaM126M64E", {"NUM_LAYERS": 3}, "NUM_LAYERS=3 is odd"),
        (
            "PileGLaM126M64E",
            {"EXPERT_AXES": ("tensor",)},
            "EXPERT_AXES=.'tensor'.: experts go over",
        ),
        ("Mixtral8x7B", {"EXPERT_GROUPS": 3}, "NUM_EXPERTS=8 is not a multiple of EXPERT_GROUPS=3"),
        ("Mixtral8x7B", {"MOE_DISPATCH": "einsum"}, "no effect without EXPERT_CAPACITY_FACTOR"),
        ("Mixtral8x7B", {"ROUTER": "experts"}, "need an EXPERT_CAPACITY_FACTOR"),
        (
            "PileGLaM126M64E",
            {"MOE_EXCHANGE": "all_to_all"},
            "has no effect with EXPERT_CAPACITY_FA",
        ),
        (
            "Mixtral8x7B",
            {"EXPERT_BUFFER_FACTOR": 1.5},
            "EXPERT_BUFFER_FACTOR=1.5 has no effect with MOE_EXCHANGE=gather: set MOE_EXCHANGE=all_to",
        ),
        (
            "Mixtral8x7B",
            {"EXPERT_BUFFER_FACTOR": 0.9, "MOE_EXCHANGE": "all_to_all"},
            "EXPERT_BUFFER_FACTOR=0.9 must be at least 1: less than the mean would be dropped",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(name, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        config(name, **changes).experiment()
    assert "\n" not in str(error.value).split("\n\nFiddle context")[0]


def test_dense_layers_come_in_front_of_a_pipeline():
    changes = {"NUM_STAGES": 2, "ICI_MESH_SHAPE": (2, 1, 4, 1), "DCN_MESH_SHAPE": (1, 1, 1, 1)}
    model = deepseek.DeepSeekV2Lite(**changes, NUM_MICROBATCHES=4).experiment().model
    assert (model.prefix.repeats, model.prefix.pipeline) == (1, None)
    assert (model.stack.repeats, model.stack.pipeline.num_microbatches) == (26, 4)
    assert "num_experts" not in dir(model.prefix.period[0].ffn)
    with pytest.raises(ValueError, match="25 repeats of the stack's blocks do not divide over NUM"):
        deepseek.DeepSeekV2Lite(**changes, FIRST_DENSE_LAYERS=2).experiment()


@pytest.mark.parametrize(("target", "adapted"), [("attention", False), ("mlp", True)])
def test_adapters_on_experts_or_on_attention_only(target, adapted):
    changes = {"USE_LORA": True, "LORA_TARGET_LAYERS": target, "NUM_LAYERS": 2}
    tree = variables(config("Mixtral8x7B", **changes))["params"]["stack"]["period_0"]
    assert ("lora" in tree["ffn"]["gate"]) == adapted
    assert ("lora" in tree["mixer"]["query"]) != adapted
    if adapted:
        assert tree["ffn"]["ffn2"]["lora"]["a"].shape == (2, 8, 14336, 8)
