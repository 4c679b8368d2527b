"""Tiny models of every family that shares LLaMA's parts: Hugging Face's class with random weights, and our config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fiddle as fdl
import jax
import torch
import transformers

from configs import deepseek, llama, mixtral
from paxlike import parallel
from paxlike.train.state import abstract_variables
from paxlike.weights import import_params

SMALL = {
    "NUM_HEADS": 4, "NUM_KV_HEADS": 2, "DIMS_PER_HEAD": 16, "MODEL_DIMS": 48, "HIDDEN_DIMS": 80, "VOCAB_SIZE": 102,
    "MAX_SEQ_LEN": 64, "FPROP_DTYPE": "float32", "ICI_MESH_SHAPE": (1, 1, 1), "DCN_MESH_SHAPE": (1, 1, 1),
}  # fmt: skip

# Of rows of 16 tokens, so that some pairs are left alone and others are stretched.
YARN = {
    "ROPE_SCALING_FACTOR": 4.0, "ROPE_ORIGINAL_LEN": 16, "ROPE_BETA_FAST": 2.0, "ROPE_BETA_SLOW": 0.1,
}  # fmt: skip

# name -> the config it is a small one of, and what else is changed.
FAMILIES: dict[str, tuple[type[llama.Llama], dict[str, Any]]] = {
    "llama2": (llama.LLaMA7B, {"NUM_LAYERS": 3, "NUM_KV_HEADS": 4}),
    "llama2-combined": (llama.LLaMA7B, {"NUM_LAYERS": 2, "NUM_KV_HEADS": 4, "COMBINE_QKV": True}),
    "llama2-unrolled": (llama.LLaMA70B, {"NUM_LAYERS": 3, "USE_REPEATED_LAYER": False}),
    "llama3.1": (llama.LLaMA3_1_8B, {"NUM_LAYERS": 3, "ROPE_ORIGINAL_LEN": 16}),
    "llama3.2": (llama.LLaMA3_2_1B, {"NUM_LAYERS": 2}),
    "mqa": (llama.LLaMA7B, {"NUM_LAYERS": 2, "NUM_KV_HEADS": None, "USE_MQA": True}),
    "mistral": (llama.Mistral7B, {"NUM_LAYERS": 3, "SLIDING_WINDOW": 7}),
    "qwen2.5": (
        llama.Qwen2_5_7B,
        {"NUM_LAYERS": 3, "ROPE_SCALING": "yarn", **YARN},
    ),
    "qwen2.5-tied": (llama.Qwen2_5_0_5B, {"NUM_LAYERS": 2}),
    "qwen3": (llama.Qwen3_8B, {"NUM_LAYERS": 3}),
    "gemma2": (
        llama.Gemma2_2B,
        {"NUM_LAYERS": 4, "SLIDING_WINDOW": 7, "QUERY_PRE_ATTN_SCALAR": 25},
    ),
    "gemma3": (
        llama.Gemma3_12B,
        {"NUM_LAYERS": 8, "SLIDING_WINDOW": 7, "LOCAL_LAYERS_PER_GLOBAL": 2},  # two periods and two layers
    ),
    "mixtral": (mixtral.Mixtral8x7B, {"NUM_LAYERS": 3, "NUM_EXPERTS": 6}),
    "qwen3-moe": (
        mixtral.Qwen3_30B_A3B,
        {"NUM_LAYERS": 3, "NUM_EXPERTS": 8, "NUM_EXPERTS_PER_TOKEN": 3, "EXPERT_HIDDEN_DIMS": 40},
    ),
    "deepseek-v3": (
        deepseek.DeepSeekV3,
        {"NUM_LAYERS": 3, "NUM_KV_HEADS": None, "FIRST_DENSE_LAYERS": 1, "QUERY_RANK": 20, "KEY_RANK": 24,
         "DIMS_PER_HEAD": 20, "ROPE_DIMS_PER_HEAD": 8, "VALUE_DIMS_PER_HEAD": 16, "EXPERT_HIDDEN_DIMS": 40,
         "NUM_EXPERTS": 8, "NUM_EXPERTS_PER_TOKEN": 3, "EXPERT_GROUPS": 4, "EXPERT_GROUPS_PER_TOKEN": 2,
         **YARN, "ROPE_MSCALE": 1.3},
    ),
    "deepseek-v2": (
        deepseek.DeepSeekV2Lite,
        {"NUM_LAYERS": 3, "NUM_KV_HEADS": None, "KEY_RANK": 24, "DIMS_PER_HEAD": 20, "ROPE_DIMS_PER_HEAD": 8,
         "VALUE_DIMS_PER_HEAD": 16, "EXPERT_HIDDEN_DIMS": 40, "NUM_EXPERTS": 8, "NUM_EXPERTS_PER_TOKEN": 3,
         **YARN},
    ),
}  # fmt: skip


def config(name: str, **changes: Any) -> llama.Llama:
    """The tiny config of a family."""
    kind, own = FAMILIES[name]
    return kind(**{**SMALL, **own, **changes})


def reference(small: llama.Llama, *, seed: int = 0) -> transformers.PreTrainedModel:
    """Hugging Face's class for `small`; every weight is random and no gain is 1, so that no term vanishes."""
    settings = small.hugging_face_config()
    kind = settings.pop("architectures")[0]
    made = transformers.AutoConfig.for_model(
        settings.pop("model_type"),
        **settings,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation="eager",
    )
    model = getattr(transformers, kind)(made).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = name.endswith("norm.weight") and not small.NORM_ZERO_CENTERED
            parameter.normal_(1.0 if gain else 0.0, 0.15, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.3, generator=generator)
        if not small.SEPARATE_EMBEDDING:
            model.tie_weights()
    return model


def load(folder: Path, small: llama.Llama, mesh_shape: tuple[int, int, int] = (1, 1, 1)):
    """Our model and the weights of `folder` on a mesh: model, params, mesh."""
    tree = small.experiment()  # its data need not be there
    model, description = fdl.build(tree.model), fdl.build(tree.weights)
    count = mesh_shape[0] * mesh_shape[1] * mesh_shape[2]
    mesh = parallel.Mesh(ici=mesh_shape).build(jax.devices()[:count])
    with parallel.activate(mesh):
        abstract = abstract_variables(model, mesh)["params"]
        params = import_params(folder, abstract, description)
    return model, params, mesh
