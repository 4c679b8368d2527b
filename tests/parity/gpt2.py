"""Hugging Face's GPT-2 and paxlike's, the same model twice: construction, and a name map between their weights.

Both keep weights as (inputs, outputs): Hugging Face's `Conv1D` is not transposed. paxlike stacks the layers, splits the
projections into heads by reshaping, and stores the gain of a LayerNorm as its distance from 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from paxlike.layers.attention import Attention
from paxlike.layers.block import Block
from paxlike.layers.embedding import Embedding, LearnedPosition
from paxlike.layers.feedforward import FeedForward
from paxlike.layers.norm import LayerNorm
from paxlike.layers.stack import Stack
from paxlike.models.decoder import Decoder

# Hugging Face's name (`*` is the layer) -> paxlike's path.
NAMES = {
    "transformer.wte.weight": "embedding/table",
    "transformer.wpe.weight": "position/table",
    "transformer.h.*.ln_1.weight": "stack/period_0/mixer_norm/scale",
    "transformer.h.*.ln_1.bias": "stack/period_0/mixer_norm/bias",
    "transformer.h.*.attn.c_attn.weight": "stack/period_0/mixer/qkv/kernel",
    "transformer.h.*.attn.c_attn.bias": "stack/period_0/mixer/qkv/bias",
    "transformer.h.*.attn.c_proj.weight": "stack/period_0/mixer/out/kernel",
    "transformer.h.*.attn.c_proj.bias": "stack/period_0/mixer/out/bias",
    "transformer.h.*.ln_2.weight": "stack/period_0/ffn_norm/scale",
    "transformer.h.*.ln_2.bias": "stack/period_0/ffn_norm/bias",
    "transformer.h.*.mlp.c_fc.weight": "stack/period_0/ffn/ffn1/kernel",
    "transformer.h.*.mlp.c_fc.bias": "stack/period_0/ffn/ffn1/bias",
    "transformer.h.*.mlp.c_proj.weight": "stack/period_0/ffn/ffn2/kernel",
    "transformer.h.*.mlp.c_proj.bias": "stack/period_0/ffn/ffn2/bias",
    "transformer.ln_f.weight": "norm/scale",
    "transformer.ln_f.bias": "norm/bias",
}
TIED = "lm_head.weight"  # the same tensor as transformer.wte.weight


def hugging_face(
    *,
    num_layers: int,
    width: int,
    num_heads: int,
    vocab_size: int,
    max_length: int,
    seed: int = 0,
    std: float = 0.2,
) -> GPT2LMHeadModel:
    """A GPT-2 in float32 without dropout; every parameter random, gains around 1, so that no term vanishes."""
    config = GPT2Config(
        n_layer=num_layers,
        n_embd=width,
        n_head=num_heads,
        vocab_size=vocab_size,
        n_positions=max_length,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if _is_gain(name) else 0.0, std, generator=generator)
    return model


def decoder(config: GPT2Config, *, scan: bool = True, remat: str = "SAVE_EVERYTHING") -> Decoder:
    """paxlike's model of the same shape."""
    block = Block(
        mixer=Attention(config.n_head, config.n_embd // config.n_head),
        ffn=FeedForward(config.n_inner or 4 * config.n_embd),
        mixer_norm=LayerNorm(config.layer_norm_epsilon),
        ffn_norm=LayerNorm(config.layer_norm_epsilon),
    )
    return Decoder(
        embedding=Embedding(config.vocab_size, config.n_embd),
        position=LearnedPosition(config.n_positions),
        stack=Stack((block,), config.n_layer, remat=remat, scan=scan),
        norm=LayerNorm(config.layer_norm_epsilon),
    )


def to_paxlike(state: Mapping[str, torch.Tensor], like: Any) -> Any:
    """The weights of `state` as a tree of the structure, shapes and shardings of `like` (arrays or abstract arrays)."""
    names = {path: name for name, path in NAMES.items()}
    unknown = {_pattern(name) for name in state} - set(NAMES) - {TIED}
    if unknown:
        raise ValueError(f"no place in paxlike's tree for {sorted(unknown)}")

    def fill(path, leaf):
        name = names[jax.tree_util.keystr(path, simple=True, separator="/")]
        layers = (
            [name.replace("*", str(layer)) for layer in range(leaf.shape[0])]
            if "*" in name
            else [name]
        )
        value = np.stack([state[layer].detach().numpy() for layer in layers]).reshape(leaf.shape)
        value = value - 1.0 if _is_gain(name) else value
        return jax.device_put(value, getattr(leaf, "sharding", None))

    return jax.tree_util.tree_map_with_path(fill, like)


def to_hugging_face(params: Any, like: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The inverse of `to_paxlike`: arrays by the names, and with the shapes, of `like`."""
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }

    def one(name: str, tensor: torch.Tensor) -> np.ndarray:
        value = leaves[NAMES[_pattern(name)]]
        value = value[int(name.split(".")[2])] if ".h." in name else value
        return value.reshape(tensor.shape) + (1.0 if _is_gain(name) else 0.0)

    return {name: one(name, tensor) for name, tensor in like.items() if name != TIED}


def _pattern(name: str) -> str:
    """The key of `NAMES` for a name with a layer number in it."""
    parts = name.split(".")
    return ".".join("*" if part.isdigit() else part for part in parts)


def _is_gain(name: str) -> bool:
    return ".ln_" in name and name.endswith(".weight")
