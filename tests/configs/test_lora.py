"""LoRA as a change of a config: which projections have adapters, what is trained, and what is refused."""

import fiddle as fdl
import jax
import pytest

from configs.gpt import GPT
from configs.llama import LLaMA7B
from configs.llama_architecture import Llama
from configs.lora import LoraKnobs
from paxlike import parallel
from paxlike.train.state import StateFactory, abstract_variables, num_parameters


class Tiny(LoraKnobs, Llama):
    """A LLaMA of two layers."""

    USE_LORA = True
    NUM_LAYERS = 2
    NUM_HEADS = 4
    NUM_KV_HEADS = 2
    MODEL_DIMS = 16
    HIDDEN_DIMS = 32
    VOCAB_SIZE = 64
    MAX_SEQ_LEN = 16
    USE_REPEATED_LAYER = True
    ICI_MESH_SHAPE = (1, 1, 1)
    TRAIN_FILES = "none.txt"


class TinyGPT(LoraKnobs, GPT):
    """A GPT of two layers, combined projections."""

    USE_LORA = True
    NUM_LAYERS = 2
    NUM_HEADS = 2
    MODEL_DIMS = 16
    HIDDEN_DIMS = 32
    TRAIN_FILES = "none.txt"


class Lora7B(LLaMA7B):
    """LLaMA 7B with Pax's rank."""

    USE_LORA = True
    LORA_RANK = 32


class Alternating(Tiny):
    """Local and global layers in turn."""

    SLIDING_WINDOW = 4
    LOCAL_LAYERS_PER_GLOBAL = 1


def adapted(config):
    """Paths of the projections with adapters."""
    leaves = jax.tree_util.tree_leaves_with_path(params(config))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return {name.removesuffix("/lora/a") for name in names if name.endswith("/lora/a")}


def params(config):
    model = fdl.build(config.experiment()).model
    mesh = parallel.Mesh(ici=(1, 1, 1)).build(jax.devices()[:1])
    with parallel.activate(mesh):
        return abstract_variables(model, mesh)["params"]


ATTENTION = {f"stack/period_0/mixer/{name}" for name in ("query", "key", "value", "out")}
MLP = {f"stack/period_0/ffn/{name}" for name in ("gate", "ffn1", "ffn2")}


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("all", ATTENTION | MLP),
        ("attention", ATTENTION),
        ("mlp", MLP),
        (r"mixer/(query|value)$", {f"stack/period_0/mixer/{n}" for n in ("query", "value")}),
        ("out", {"stack/period_0/mixer/out"}),
    ],
)
def test_targets(target, expected):
    assert adapted(Tiny(LORA_TARGET_LAYERS=target)) == expected


def test_a_combined_projection_is_one_target():
    names = {"mixer/qkv", "mixer/out", "ffn/ffn1", "ffn/ffn2"}
    assert adapted(TinyGPT()) == {f"stack/period_0/{name}" for name in names}


def test_blocks_of_a_period_are_told_apart():
    assert adapted(Alternating(LORA_TARGET_LAYERS="period_1/mixer/query")) == {
        "stack/period_1/mixer/query"
    }


@pytest.mark.parametrize("combined", [False, True])
def test_llama_7b_at_rank_32_trains_as_many_parameters_as_in_pax(combined):
    config = Lora7B(COMBINE_QKV=combined)
    optimizer = fdl.build(config.experiment()).optimizer
    tree = params(config)
    assert num_parameters(optimizer.select(tree)) == 79_953_920
    assert num_parameters(tree) == num_parameters(params(LLaMA7B())) + 79_953_920


def test_only_adapters_are_trained_and_have_moments():
    experiment = fdl.build(Tiny().experiment())
    mesh = parallel.Mesh(ici=(1, 1, 1)).build(jax.devices()[:1])
    spec = {"tokens": jax.ShapeDtypeStruct((2, 16), "int32")}
    with parallel.activate(mesh):
        state = StateFactory(experiment.model, experiment.optimizer, spec, mesh).abstract()
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state[0].mu)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    assert len(names) == 14 and all("/lora/" in name for name in names)


def test_knobs_reach_the_layers():
    config = Tiny(
        LORA_RANK=4,
        LORA_ALPHA=6.0,
        LORA_DROPOUT=0.1,
        LORA_KIND="rslora",
        LORA_INIT="base",
        LORA_BASE="nf4",
    )
    block = fdl.build(config.experiment()).model.stack.period[0]
    lora = block.ffn.adapters["gate"]
    assert (lora.rank, lora.alpha, lora.dropout) == (4, 6.0, 0.1)
    assert (lora.kind, lora.init, lora.base) == ("rslora", "base", "nf4")
    assert lora.scale == 3.0
    assert block.mixer.adapters["out"] == lora


def test_without_lora_the_tree_is_that_of_the_base():
    class Plain(Tiny):
        """No adapters."""

        USE_LORA = False

    experiment = fdl.build(Plain().experiment())
    assert experiment.optimizer.trainable is None and not adapted(Plain())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"LORA_RANK": 0}, "LORA_RANK=0 must be at least 1; USE_LORA=False trains without"),
        ({"LORA_DROPOUT": 1.5}, r"LORA_DROPOUT=1.5 is not in \[0, 1\)"),
        (
            {"LORA_TARGET_LAYERS": "attn"},
            "LORA_TARGET_LAYERS='attn' matches no projection; there are stack/period_0/mixer/query",
        ),
        (
            {"LORA_TARGET_LAYERS": "mixer/("},
            r"LORA_TARGET_LAYERS='mixer/\(' is not all, attention or mlp, and no regex",
        ),
        (
            {"LORA_BASE": "int8", "USE_FP8": True},
            "LORA_BASE='int8' and USE_FP8=True are two ways to store a weight: choose one",
        ),
    ],
)
def test_what_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Tiny(**changes).experiment()
