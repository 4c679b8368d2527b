"""Which tensor of another program is which parameter here: one table per family, read in both directions.

A row names a parameter, the tensor, and how one becomes the other. Everything else comes from the tree of abstract
parameters: sizes, the number of layers, whether biases, norms of queries and keys, or an output table are there.
Layer `l` is block `l % n` of repeat `l // n`, where a period has n blocks; the layers of a `prefix` come
first, those of a `tail` last.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from paxlike.weights.rearrange import Rearrangement, Shape, rearrangement

Origin = Literal["huggingface", "meta"]
STACKS = ("prefix", "stack", "tail")  # of a model, in the order of its layers
_BLOCK = re.compile(rf"({'|'.join(STACKS)})/period_(\d+)/(.+)")


@dataclasses.dataclass(frozen=True)
class Row:
    """A parameter (inside a block, or of the model) and the tensor it is.

    Attributes:
      parameter: path; that of a block without `stack/period_{j}/` (or `prefix/...`, `tail/...`).
      tensor: name in Hugging Face's files, `{l}` the layer and `{e}` the expert, which are counted by the leading
        dimensions of the parameter.
      layout: see `paxlike.weights.rearrange`.
      meta: name in Meta's files, None where Meta's models have no such tensor.
      offset: what their value is above ours.
      copied: every expert is a copy of the one tensor.
    """

    parameter: str
    tensor: str
    layout: str
    meta: str | None = None
    offset: float = 0.0
    copied: bool = False


@dataclasses.dataclass(frozen=True)
class Piece:
    """One whole foreign tensor and its place.

    Attributes:
      parameter: path of the parameter.
      at: for each dimension of the parameter a fixed index, or None where the piece fills it.
      tensor: name of the foreign tensor.
      shape: of the piece, the dimensions without fixed index.
      rearrangement, offset: how it is made from the tensor.
    """

    parameter: str
    at: tuple[int | None, ...]
    tensor: str
    shape: Shape
    rearrangement: Rearrangement
    offset: float

    @property
    def foreign_shape(self) -> Shape:
        """The shape that the foreign tensor must have."""
        return self.rearrangement.foreign_shape(self.shape)


_QKV_BLOCK = (
    Row("mixer/query/kernel", "q_proj.weight", "(h r) d -> d h r", "wq.weight"),
    Row("mixer/key/kernel", "k_proj.weight", "(h r) d -> d h r", "wk.weight"),
    Row("mixer/value/kernel", "v_proj.weight", "(h k) d -> d h k", "wv.weight"),
    Row("mixer/query/bias", "q_proj.bias", "(h r) -> h r"),
    Row("mixer/key/bias", "k_proj.bias", "(h r) -> h r"),
    Row("mixer/value/bias", "v_proj.bias", "(h k) -> h k"),
    Row("mixer/qkv/kernel", "q_proj.weight", "(h r) d -> d 0 h r", "wq.weight"),
    Row("mixer/qkv/kernel", "k_proj.weight", "(h r) d -> d 1 h r", "wk.weight"),
    Row("mixer/qkv/kernel", "v_proj.weight", "(h k) d -> d 2 h k", "wv.weight"),
    Row("mixer/qkv/bias", "q_proj.bias", "(h r) -> 0 h r"),
    Row("mixer/qkv/bias", "k_proj.bias", "(h r) -> 1 h r"),
    Row("mixer/qkv/bias", "v_proj.bias", "(h k) -> 2 h k"),
    Row("mixer/out/kernel", "o_proj.weight", "d (h k) -> h k d", "wo.weight"),
    Row("mixer/out/bias", "o_proj.bias", "d -> d"),
    Row("mixer/query_norm/scale", "q_norm.weight", "r -> r"),
    Row("mixer/key_norm/scale", "k_norm.weight", "r -> r"),
)
_GATED_BLOCK = (
    Row("ffn/gate/kernel", "gate_proj.weight", "f d -> d f", "w1.weight"),
    Row("ffn/ffn1/kernel", "up_proj.weight", "f d -> d f", "w3.weight"),
    Row("ffn/ffn2/kernel", "down_proj.weight", "d f -> f d", "w2.weight"),
    Row("ffn/gate/bias", "gate_proj.bias", "f -> f"),
    Row("ffn/ffn1/bias", "up_proj.bias", "f -> f"),
    Row("ffn/ffn2/bias", "down_proj.bias", "d -> d"),
)


def _inside(rows: Sequence[Row], tensor: str, meta: str) -> tuple[Row, ...]:
    """`rows` with the tensors in a module of a layer."""
    return tuple(
        dataclasses.replace(
            row, tensor=f"{tensor}.{row.tensor}", meta=row.meta and f"{meta}.{row.meta}"
        )
        for row in rows
    )


_PROJECTIONS = _inside(_QKV_BLOCK, "model.layers.{l}.self_attn", "layers.{l}.attention") + _inside(
    _GATED_BLOCK, "model.layers.{l}.mlp", "layers.{l}.feed_forward"
)
_TABLES = (
    Row("embedding/table", "model.embed_tokens.weight", "v d -> v d", "tok_embeddings.weight"),
    Row("norm/scale", "model.norm.weight", "d -> d", "norm.weight"),
    Row("head/table", "lm_head.weight", "v d -> v d", "output.weight"),
)


def _norms(layer: str = "model.layers.{l}", **names: str) -> tuple[Row, ...]:
    return tuple(
        Row(f"{ours}/scale", f"{layer}.{theirs}.weight", "d -> d") for ours, theirs in names.items()
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaWeights:
    """LLaMA, and what has its names: Mistral, Qwen2 (biases), Qwen3 (norms of queries and keys).

    Attributes:
      config: what Hugging Face's `config.json` says about this model: compared on import, written on export.
      rope_interleaved: the model rotates neighbours (Meta's order) rather than halves (Hugging Face's).
    """

    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rope_interleaved: bool = False

    family: ClassVar[str] = "LLaMA"
    rows: ClassVar[tuple[Row, ...]] = (
        *_TABLES,
        Row(
            "mixer_norm/scale",
            "model.layers.{l}.input_layernorm.weight",
            "d -> d",
            "layers.{l}.attention_norm.weight",
        ),
        Row(
            "ffn_norm/scale",
            "model.layers.{l}.post_attention_layernorm.weight",
            "d -> d",
            "layers.{l}.ffn_norm.weight",
        ),
        *_PROJECTIONS,
    )
    # How other files spell the start of a name; the first one is that of the rows.
    prefixes: ClassVar[tuple[str, ...]] = (
        "model.",
        "language_model.model.",
        "model.language_model.",
    )
    # Tensors that are no weights of the language model.
    ignored: ClassVar[str] = r".*rotary_emb.*inv_freq|rope\.freqs"
    output: ClassVar[str] = "lm_head.weight"
    table: ClassVar[str] = "model.embed_tokens.weight"
    # Parameters that have no tensor and start anew.
    fresh: ClassVar[str | None] = None


def _experts(tensor: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """A router and its experts."""
    return (
        Row("ffn/router/kernel", f"{tensor}.gate.weight", "e d -> d e"),
        Row("ffn/gate/kernel", f"{tensor}.experts.{{e}}.{gate}.weight", "f d -> d f"),
        Row("ffn/ffn1/kernel", f"{tensor}.experts.{{e}}.{up}.weight", "f d -> d f"),
        Row("ffn/ffn2/kernel", f"{tensor}.experts.{{e}}.{down}.weight", "d f -> f d"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtralWeights(LlamaWeights):
    """Mixtral: LLaMA with experts in the place of its feed-forward layers."""

    family: ClassVar[str] = "Mixtral"
    rows: ClassVar[tuple[Row, ...]] = (
        *_TABLES,
        *_norms(mixer_norm="input_layernorm", ffn_norm="post_attention_layernorm"),
        *_inside(_QKV_BLOCK, "model.layers.{l}.self_attn", "layers.{l}.attention"),
        *_experts("model.layers.{l}.block_sparse_moe", "w1", "w3", "w2"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenMoeWeights(LlamaWeights):
    """Qwen3 with experts."""

    family: ClassVar[str] = "Qwen3-MoE"
    rows: ClassVar[tuple[Row, ...]] = (
        *_TABLES,
        *_norms(mixer_norm="input_layernorm", ffn_norm="post_attention_layernorm"),
        *_inside(_QKV_BLOCK, "model.layers.{l}.self_attn", "layers.{l}.attention"),
        *_experts("model.layers.{l}.mlp", "gate_proj", "up_proj", "down_proj"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpcycledWeights(LlamaWeights):
    """A model with experts out of one without: every expert is a copy of the feed-forward layer, routers are new.

    Komatsuzaki et al. 2022 (sparse upcycling). To be read only.
    """

    family: ClassVar[str] = "LLaMA (upcycled)"
    rows: ClassVar[tuple[Row, ...]] = (
        *_TABLES,
        *_norms(mixer_norm="input_layernorm", ffn_norm="post_attention_layernorm"),
        *_inside(_QKV_BLOCK, "model.layers.{l}.self_attn", "layers.{l}.attention"),
        *(
            dataclasses.replace(row, copied=True)
            for row in _inside(_GATED_BLOCK[:3], "model.layers.{l}.mlp", "layers.{l}.feed_forward")
        ),
    )
    fresh: ClassVar[str | None] = r".*/ffn/router/kernel"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSeekWeights(LlamaWeights):
    """DeepSeek-V2 and V3: latent attention, shared experts, dense layers first."""

    family: ClassVar[str] = "DeepSeek"
    rows: ClassVar[tuple[Row, ...]] = (
        *_TABLES,
        *_norms(mixer_norm="input_layernorm", ffn_norm="post_attention_layernorm"),
        *_inside(
            (
                Row("mixer/query/kernel", "q_proj.weight", "(h k) d -> d h k"),
                Row("mixer/query_a/kernel", "q_a_proj.weight", "a d -> d a"),
                Row("mixer/query_latent_norm/scale", "q_a_layernorm.weight", "a -> a"),
                Row("mixer/query_b/kernel", "q_b_proj.weight", "(h k) a -> a h k"),
                Row("mixer/key_a/kernel", "kv_a_proj_with_mqa.weight", "a d -> d a"),
                Row("mixer/key_latent_norm/scale", "kv_a_layernorm.weight", "a -> a"),
                Row("mixer/key_b/kernel", "kv_b_proj.weight", "(h k) a -> a h k"),
                Row("mixer/out/kernel", "o_proj.weight", "d (h k) -> h k d"),
            ),
            "model.layers.{l}.self_attn",
            "",
        ),
        *_inside(_GATED_BLOCK, "model.layers.{l}.mlp", ""),
        *_experts("model.layers.{l}.mlp", "gate_proj", "up_proj", "down_proj"),
        Row("ffn/choice_bias", "model.layers.{l}.mlp.gate.e_score_correction_bias", "e -> e"),
        Row(
            "ffn/shared/gate/kernel",
            "model.layers.{l}.mlp.shared_experts.gate_proj.weight",
            "f d -> d f",
        ),
        Row(
            "ffn/shared/ffn1/kernel",
            "model.layers.{l}.mlp.shared_experts.up_proj.weight",
            "f d -> d f",
        ),
        Row(
            "ffn/shared/ffn2/kernel",
            "model.layers.{l}.mlp.shared_experts.down_proj.weight",
            "d f -> f d",
        ),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaWeights(LlamaWeights):
    """Gemma-2 and Gemma-3 (text): norms before and behind each half; gains as distance from 1, as here."""

    family: ClassVar[str] = "Gemma"
    rows: ClassVar[tuple[Row, ...]] = (
        *_TABLES,
        *_norms(
            mixer_norm="input_layernorm",
            mixer_post_norm="post_attention_layernorm",
            ffn_norm="pre_feedforward_layernorm",
            ffn_post_norm="post_feedforward_layernorm",
        ),
        *_PROJECTIONS,
    )
    ignored: ClassVar[str] = r".*(vision_tower|multi_modal_projector)\..*|.*rotary_emb.*inv_freq"


def _layer_norm(ours: str, theirs: str) -> tuple[Row, Row]:
    """The gain is stored as its distance from 1 here."""
    return (
        Row(f"{ours}/scale", f"{theirs}.weight", "d -> d", offset=1.0),
        Row(f"{ours}/bias", f"{theirs}.bias", "d -> d"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Weights:
    """GPT-2 (Radford et al. 2019). Hugging Face keeps its matrices as (inputs, outputs), as here.

    Gains are stored as their distance from 1: exact in float32 for gains between 0.5 and 2, otherwise to 6e-8.

    Attributes:
      config: what Hugging Face's `config.json` says about this model: compared on import, written on export.
    """

    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    rope_interleaved: ClassVar[bool] = False
    family: ClassVar[str] = "GPT-2"
    rows: ClassVar[tuple[Row, ...]] = (
        Row("embedding/table", "transformer.wte.weight", "v d -> v d"),
        Row("position/table", "transformer.wpe.weight", "n d -> n d"),
        *_layer_norm("norm", "transformer.ln_f"),
        Row("head/table", "lm_head.weight", "v d -> v d"),
        *_layer_norm("mixer_norm", "transformer.h.{l}.ln_1"),
        *_layer_norm("ffn_norm", "transformer.h.{l}.ln_2"),
        Row("mixer/qkv/kernel", "transformer.h.{l}.attn.c_attn.weight", "d (c h k) -> d c h k"),
        Row("mixer/qkv/bias", "transformer.h.{l}.attn.c_attn.bias", "(c h k) -> c h k"),
        Row("mixer/out/kernel", "transformer.h.{l}.attn.c_proj.weight", "(h k) d -> h k d"),
        Row("mixer/out/bias", "transformer.h.{l}.attn.c_proj.bias", "d -> d"),
        Row("ffn/ffn1/kernel", "transformer.h.{l}.mlp.c_fc.weight", "d f -> d f"),
        Row("ffn/ffn1/bias", "transformer.h.{l}.mlp.c_fc.bias", "f -> f"),
        Row("ffn/ffn2/kernel", "transformer.h.{l}.mlp.c_proj.weight", "f d -> f d"),
        Row("ffn/ffn2/bias", "transformer.h.{l}.mlp.c_proj.bias", "d -> d"),
    )
    prefixes: ClassVar[tuple[str, ...]] = ("transformer.", "")
    # Masks that old files carry.
    ignored: ClassVar[str] = r".*\.attn\.(bias|masked_bias)"
    output: ClassVar[str] = "lm_head.weight"
    table: ClassVar[str] = "transformer.wte.weight"


Description = LlamaWeights | GPT2Weights


def plan(
    description: Description, shapes: Mapping[str, Shape], *, origin: Origin = "huggingface"
) -> dict[str, list[Piece]]:
    """The pieces of each parameter, by its path, in the order of `shapes`.

    Raises `ValueError` in one line for a parameter that the family has no tensor for.
    """
    found, numbered = {}, layers_of(shapes)
    for path, shape in shapes.items():
        match, numbers = _BLOCK.fullmatch(path), numbered.get(path)
        inside = match[3] if match else path
        found[path] = _pieces(description, path, inside, tuple(shape), numbers, origin)
    return found


def layers_of(shapes: Mapping[str, Shape]) -> dict[str, tuple[int, int]]:
    """Path of a parameter inside a block -> layer of its first repeat, and layers of a repeat."""
    blocks = {path: match for path in shapes if (match := _BLOCK.fullmatch(path))}
    found: dict[str, tuple[int, int]] = {}
    start = 0
    for stack in STACKS:
        mine = {path: int(match[2]) for path, match in blocks.items() if match[1] == stack}
        period = len(set(mine.values()))
        found |= {path: (start + block, period) for path, block in mine.items()}
        start += period * max((shapes[path][0] for path in mine), default=0)
    return found


def _pieces(
    description: Description,
    path: str,
    inside: str,
    shape: Shape,
    numbers: tuple[int, int] | None,
    origin: Origin,
) -> list[Piece]:
    """`numbers`: layer of the first repeat, and layers of a repeat; None where the parameter is in no block."""
    rows = [
        row
        for row in description.rows
        if row.parameter == inside and ("{l}" in row.tensor) == bool(numbers)
    ]
    if len({"{e}" in row.tensor for row in rows}) == 2:  # experts, or one layer of the same names
        many = len(shape) == 4
        rows = [row for row in rows if ("{e}" in row.tensor) == many]
    names = [row.tensor if origin == "huggingface" else row.meta for row in rows]
    if not rows or None in names:
        where = "Meta's LLaMA" if origin == "meta" else f"{description.family} of Hugging Face"
        raise ValueError(
            f"parameter {path} of shape {list(shape)} has no tensor in {where}: "
            "this model is of another family"
        )
    if numbers is None:
        return [
            _piece(description, path, shape, row, name, (), origin)
            for row, name in zip(rows, names)
        ]
    pieces = []
    for repeat in range(shape[0]):
        layer = numbers[0] + repeat * numbers[1]
        for row, name in zip(rows, names):
            for expert in range(shape[1]) if "{e}" in row.tensor or row.copied else (None,):
                lead = (repeat,) if expert is None else (repeat, expert)
                tensor = str(name).format(l=layer, e=expert)
                pieces.append(_piece(description, path, shape, row, tensor, lead, origin))
    return pieces


def _piece(
    description: Description,
    path: str,
    shape: Shape,
    row: Row,
    tensor: str | None,
    lead: tuple[int, ...],
    origin: Origin,
) -> Piece:
    how = rearrangement(
        row.layout,
        theirs_interleaved=origin == "meta",
        ours_interleaved=description.rope_interleaved,
    )
    at = how.at(lead=lead)
    if len(at) != len(shape):
        raise ValueError(
            f"parameter {path} has shape {list(shape)}, which is not the form of "
            f"{description.family}: {len(at)} dimensions are expected"
        )
    rest = tuple(size for size, fixed in zip(shape, at) if fixed is None)
    return Piece(path, at, str(tensor), rest, how, row.offset)
