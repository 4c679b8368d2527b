"""The knobs of FP8 and Transformer Engine: which layers they reach, and what is refused."""

import sys

import fiddle as fdl
import pytest

from configs import flags, glam
from configs.fp8 import product
from paxlike.ops import te
from paxlike.ops.fp8 import Fp8
from tests.configs.test_gpt import shrink

SIZES = {"MODEL_DIMS": 32, "HIDDEN_DIMS": 64, "DIMS_PER_HEAD": 16}


def layers(**changes):
    """Name of each layer of the block -> how it multiplies."""
    tree = shrink("Synthetic126M", **SIZES, **changes).experiment()
    (block,) = tree.model.stack.period
    made = {}
    for half in ("mixer", "ffn"):
        chosen = getattr(getattr(block, half), "dot_general_cls", None) or {}
        made |= {f"{half}/{name}": fdl.build(product) for name, product in chosen.items()}
    return made


def test_nothing_by_default():
    assert layers() == {}


def test_the_layers_of_the_blocks():
    names = {"mixer/qkv", "mixer/out", "ffn/ffn1", "ffn/ffn2"}
    assert layers(USE_FP8=True) == dict.fromkeys(names, Fp8("delayed", 1024, 0))
    assert layers(USE_FP8=True, FP8_LAYERS="all").keys() == names


def test_some_of_them_and_how():
    found = layers(USE_FP8=True, FP8_LAYERS="ffn/|mixer/out", FP8_RECIPE="current", FP8_MARGIN=1)
    assert found == dict.fromkeys(("mixer/out", "ffn/ffn1", "ffn/ffn2"), Fp8("current", 1024, 1))
    two = layers(USE_FP8=True, FP8_LAYERS="ffn1$", FP8_AMAX_HISTORY=16)
    assert two == {"ffn/ffn1": Fp8("delayed", 16, 0)}


def experts(**changes):
    """Name of each layer of experts of a GLaM -> how it multiplies."""
    tree = glam.SyntheticGLaM126M64E(USE_FP8=True, **changes).experiment()
    block, _ = tree.model.stack.period
    return sorted(getattr(block.ffn, "dot_general_cls", None) or {})


def test_experts_with_and_without_capacity(monkeypatch):
    for changes in ({}, {"MOE_DISPATCH": "sort"}, {"EXPERT_CAPACITY_FACTOR": None}):
        assert experts(**changes) == experts(FP8_LAYERS="ffn/", **changes) == ["ffn1", "ffn2"]
        assert experts(FP8_LAYERS="mixer", **changes) == []
    monkeypatch.setattr(te, "engine", lambda: None)
    assert experts(USE_TE=True) == []
    with pytest.raises(ValueError, match="'ffn' names .*/ffn/ffn1, but Transformer Eng") as error:
        experts(USE_TE=True, FP8_LAYERS="ffn")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"FP8_LAYERS": "moe/"}, "FP8_LAYERS=moe/ has no effect with USE_FP8=False and USE_TE"),
        ({"FP8_RECIPE": "current"}, "FP8_RECIPE=current has no effect with USE_FP8=False"),
        ({"FP8_MARGIN": 1}, "FP8_MARGIN=1 has no effect with USE_FP8=False"),
        (
            {"USE_FP8": True, "FP8_RECIPE": "current", "FP8_AMAX_HISTORY": 16},
            "FP8_AMAX_HISTORY=16 has no effect with FP8_RECIPE=current",
        ),
        (
            {"USE_FP8": True, "FP8_RECIPE": "mxfp8"},
            "FP8_RECIPE=mxfp8 is Transformer Engine's: it needs USE_TE=True",
        ),
        (
            {"USE_FP8": True, "USE_TE": True, "FP8_RECIPE": "mxfp8", "FP8_MARGIN": 2},
            "FP8_MARGIN=2 has no effect with FP8_RECIPE=mxfp8 with USE_TE=True",
        ),
        ({"USE_FP8": True, "FP8_AMAX_HISTORY": 0}, "FP8_AMAX_HISTORY=0 must be at least 1"),
        ({"USE_FP8": True, "FP8_LAYERS": "moe/"}, "'moe/' matches no layer; there are .*ffn/ffn1"),
        ({"USE_FP8": True, "FP8_LAYERS": "("}, "is not blocks or all, and no regex"),
        ({"USE_TE": True}, "USE_TE=True, but Transformer Engine is not installed .*: set USE_TE="),
        ({"TE_FUSED": True}, "TE_FUSED=True has no effect with USE_TE=False"),
        ({"USE_FP8": True, "TE_FUSED": False}, "TE_FUSED=False has no effect with USE_TE=False"),
    ],
)
def test_contradictions_are_one_line(changes, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    monkeypatch.setitem(sys.modules, "transformer_engine.jax", None)
    with pytest.raises(ValueError, match=message) as error:
        layers(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "fused"),
    [
        ({}, False),
        ({"USE_FP8": True}, None),
        ({"USE_FP8": True, "TE_FUSED": False}, False),
        ({"TE_FUSED": True}, True),
    ],
)
def test_norms_are_part_of_products_as_transformer_engine_has_it(changes, fused):
    """By default in FP8 alone; `True` says where it cannot be."""
    assert product(shrink("Synthetic126M", USE_TE=True, **changes)).fused is fused


def test_variables_of_pax():
    from configs import gpt

    environ = {"ENABLE_TE": "1", "ENABLE_FP8": "1", "NVTE_FUSED_ATTN": "1"}
    wanted = {"USE_TE": True, "USE_FP8": True, "USE_CUDNN_FLASH_ATTENTION": True}
    assert flags.environment_knobs(environ, gpt.Pile126M) == (wanted, [])
