"""Tiny random models of Hugging Face, and the abstract parameters of the same models here, made by hand."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from paxlike.checkpoint import arrays
from paxlike.weights import GemmaWeights, GPT2Weights, LlamaWeights

WIDTH, HIDDEN, LAYERS, HEADS, GROUPS, SIZE, VOCABULARY = 32, 48, 4, 4, 2, 8, 64
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": SIZE,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """How one family is made on both sides."""

    config_class: str
    options: dict[str, Any]
    description: type = LlamaWeights
    period: int = 1
    bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    post_norm: bool = False


FAMILIES = {
    "llama": Family("LlamaConfig", {"tie_word_embeddings": False}),
    "mistral": Family("MistralConfig", {"tie_word_embeddings": False, "sliding_window": 8}),
    "qwen2": Family("Qwen2Config", {"tie_word_embeddings": True}, bias=True, tied=True),
    "qwen3": Family("Qwen3Config", {"tie_word_embeddings": False}, qk_norm=True),
    "gemma2": Family("Gemma2Config", {}, GemmaWeights, period=2, tied=True, post_norm=True),
    "gemma3": Family(
        "Gemma3TextConfig", {}, GemmaWeights, period=2, qk_norm=True, tied=True, post_norm=True
    ),
}


def hugging_face(config: Any, *, seed: int = 0, dtype: str = "float32") -> Any:
    """The model of a config, every parameter random, gains included."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name or (".ln_" in name and name.endswith("weight")) else 0.0
            parameter.copy_(mean + 0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def family_config(name: str) -> Any:
    """Hugging Face's config of a family, tiny."""
    import transformers

    family = FAMILIES[name]
    return getattr(transformers, family.config_class)(**(COMMON | family.options))


def gpt2_config() -> Any:
    """GPT-2, tiny."""
    from transformers import GPT2Config

    return GPT2Config(
        n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS, vocab_size=VOCABULARY, n_positions=16
    )


def description(name: str, config: Any | None = None, **options: Any) -> Any:
    """The description of a family's weights."""
    kind = GPT2Weights if name == "gpt2" else FAMILIES[name].description
    return kind(config={} if config is None else json.loads(config.to_json_string()), **options)


def shapes(name: str, *, combine_qkv: bool = False, layers: int = LAYERS) -> dict[str, tuple]:
    """Path -> shape of every parameter here."""
    if name == "gpt2":
        return _gpt2_shapes()
    family = FAMILIES[name]
    r, d, h, g, k, f = layers // family.period, WIDTH, HEADS, GROUPS, SIZE, HIDDEN
    found: dict[str, tuple] = {"embedding/table": (VOCABULARY, d), "norm/scale": (d,)}
    if not family.tied:
        found["head/table"] = (VOCABULARY, d)
    for j in range(family.period):
        block = {f"{norm}/scale": (r, d) for norm in ("mixer_norm", "ffn_norm")}
        if family.post_norm:
            block |= {f"{norm}/scale": (r, d) for norm in ("mixer_post_norm", "ffn_post_norm")}
        if combine_qkv:
            block["mixer/qkv/kernel"] = (r, d, 3, h, k)
        else:
            for part, heads in {"query": h, "key": g, "value": g}.items():
                block[f"mixer/{part}/kernel"] = (r, d, heads, k)
                if family.bias:
                    block[f"mixer/{part}/bias"] = (r, heads, k)
        if family.qk_norm:
            block |= {f"mixer/{part}_norm/scale": (r, k) for part in ("query", "key")}
        block |= {"mixer/out/kernel": (r, h, k, d), "ffn/gate/kernel": (r, d, f)}
        block |= {"ffn/ffn1/kernel": (r, d, f), "ffn/ffn2/kernel": (r, f, d)}
        found |= {f"stack/period_{j}/{path}": shape for path, shape in block.items()}
    return found


def _gpt2_shapes() -> dict[str, tuple]:
    r, d, h, k, f = LAYERS, WIDTH, HEADS, SIZE, 4 * WIDTH
    block = {
        "mixer_norm/scale": (r, d),
        "mixer_norm/bias": (r, d),
        "mixer/qkv/kernel": (r, d, 3, h, k),
        "mixer/qkv/bias": (r, 3, h, k),
        "mixer/out/kernel": (r, h, k, d),
        "mixer/out/bias": (r, d),
        "ffn_norm/scale": (r, d),
        "ffn_norm/bias": (r, d),
        "ffn/ffn1/kernel": (r, d, f),
        "ffn/ffn1/bias": (r, f),
        "ffn/ffn2/kernel": (r, f, d),
        "ffn/ffn2/bias": (r, d),
    }
    model = {"embedding/table": (VOCABULARY, d), "position/table": (16, d)}
    model |= {"norm/scale": (d,), "norm/bias": (d,)}
    return model | {f"stack/period_0/{path}": shape for path, shape in block.items()}


# How each dimension is cut, by the end of the path: as the rules of the layers do it.
_SPECS = {
    "table": P("tensor", "fsdp"),
    "query/kernel": P(None, "fsdp", "tensor"),
    "key/kernel": P(None, "fsdp", "tensor"),
    "value/kernel": P(None, "fsdp", "tensor"),
    "qkv/kernel": P(None, "fsdp", None, "tensor"),
    "out/kernel": P(None, "tensor", None, "fsdp"),
    "gate/kernel": P(None, "fsdp", "tensor"),
    "ffn1/kernel": P(None, "fsdp", "tensor"),
    "ffn2/kernel": P(None, "tensor", "fsdp"),
}


def abstract(
    named: dict[str, tuple], *, mesh: tuple[int, int] = (1, 1), dtype: Any = np.float32
) -> Any:
    """The tree of abstract arrays on a mesh of (fsdp, tensor)."""
    devices = np.array(jax.devices()[: mesh[0] * mesh[1]]).reshape(mesh)
    jax_mesh = jax.sharding.Mesh(devices, ("fsdp", "tensor"))
    leaves = {}
    for path, shape in named.items():
        spec = next((s for end, s in _SPECS.items() if path.endswith(end)), P())
        leaves[path] = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(jax_mesh, spec))
    return arrays.nested(leaves)


def assert_same(left: Any, right: Any) -> None:
    """Equal bit for bit."""
    left, right = arrays.named_leaves(left), arrays.named_leaves(right)
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert np.asarray(left[name]).tobytes() == np.asarray(right[name]).tobytes(), name
