"""Adapters in the format of Hugging Face's PEFT: `adapter_config.json` beside `adapter_model.safetensors`.

PEFT keeps A as (rank, inputs) and B as (outputs, rank), a pair for each layer and projection; here they are (inputs,
rank) and (rank, outputs), stacked over the repeats of a stack, and the three of a combined projection are together.
DoRA's magnitude is stored there as it is, here as its distance from the norm of the frozen weight's column: to convert
it, the frozen weights are needed.

The adapter of a projection has the path `stack/period_{j}/mixer/query/lora/a`; layer = repeat * len(period) + j
(`weights.maps`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from paxlike.weights.maps import layers_of
from paxlike.weights.safetensors_file import Writer, read_header

PyTree = Any
Arrays = dict[str, np.ndarray]
CONFIG, ARRAYS = "adapter_config.json", "adapter_model.safetensors"

# Projection -> module of a Hugging Face layer; several for a combined projection.
LLAMA: Mapping[str, tuple[str, ...]] = {
    "mixer/query": ("self_attn.q_proj",),
    "mixer/key": ("self_attn.k_proj",),
    "mixer/value": ("self_attn.v_proj",),
    "mixer/qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mixer/out": ("self_attn.o_proj",),
    "ffn/gate": ("mlp.gate_proj",),
    "ffn/ffn1": ("mlp.up_proj",),
    "ffn/ffn2": ("mlp.down_proj",),
}
LLAMA_LAYER = "base_model.model.model.layers.{layer}"
_ROTATED = ("q_proj", "k_proj")
_MODULE = re.compile(r"(?:.*/)?period_(\d+)/([^/]+/[^/]+)")
_SUFFIXES = {"a": ("lora_A.weight",), "b": ("lora_B.weight",)}
# PEFT writes the first and reads both.
_MAGNITUDE = ("lora_magnitude_vector", "lora_magnitude_vector.weight")


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """What `adapter_config.json` says that changes the numbers.

    Attributes:
      rank, alpha: scale = alpha / rank, or alpha / sqrt(rank) for `rslora`.
      kind: `lora`, `rslora` or `dora`.
      dropout: on the adapters' inputs while training.
      targets: names of the adapted modules, `q_proj` and so on.
      base_model: name or path of the model that the adapters are for.
    """

    rank: int
    alpha: float
    kind: str = "lora"
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    base_model: str | None = None


@dataclasses.dataclass(frozen=True)
class _Place:
    """One adapter of one layer: where its arrays are here, and the module's name there."""

    path: str  # of the projection
    repeat: int
    part: int | None
    module: str
    interleaved: bool  # its outputs are pairs side by side here, and in two halves there

    @property
    def index(self) -> tuple[int, ...]:
        """Which part of the stacked arrays is this adapter's."""
        return (self.repeat,) if self.part is None else (self.repeat, self.part)


def read_config(folder: Path) -> PeftConfig:
    """The options of the adapters in `folder`.

    Raises:
      ValueError: the folder has none, or an option that would change the numbers and is not known here.
    """
    file = Path(folder) / CONFIG
    if not file.exists():
        raise ValueError(f"{folder} has no {CONFIG}: it is no folder of PEFT adapters")
    raw = json.loads(file.read_text())
    if raw.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type is {raw.get('peft_type')!r}; only LORA can be read")
    refused = ("rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "lora_bias")
    for name in refused:
        if raw.get(name):
            raise ValueError(f"{file}: {name}={raw[name]!r} is not supported")
    if raw.get("bias", "none") != "none":
        raise ValueError(f"{file}: bias={raw['bias']!r} is not supported; train with bias='none'")
    if raw.get("use_dora") and raw.get("use_rslora"):
        raise ValueError(f"{file}: use_dora and use_rslora together are not supported")
    kind = "dora" if raw.get("use_dora") else "rslora" if raw.get("use_rslora") else "lora"
    targets = raw.get("target_modules") or ()
    return PeftConfig(
        rank=int(raw["r"]),
        alpha=float(raw["lora_alpha"]),
        kind=kind,
        dropout=float(raw.get("lora_dropout") or 0.0),
        targets=(targets,) if isinstance(targets, str) else tuple(targets),
        base_model=raw.get("base_model_name_or_path"),
    )


def import_peft(
    folder: Path,
    params: PyTree,
    *,
    modules: Mapping[str, tuple[str, ...]] = LLAMA,
    layer: str = LLAMA_LAYER,
    rope_layout: str = "half",
) -> PyTree:
    """`params` (of a model with adapters, arrays or numpy arrays) with the adapters of `folder`, as numpy arrays.

    `rope_layout` is that of the model here; Hugging Face's is `half`.

    Raises:
      ValueError: a tensor is missing, left over or of another shape.
    """
    config, stored = read_config(folder), _load(Path(folder) / ARRAYS)
    named = _named(params)
    left = dict(stored)
    new: Arrays = {}
    for place in _places(named, modules, layer, rope_layout):
        for leaf, suffixes in _leaves(config.kind).items():
            name = f"{place.path}/lora/{leaf}"
            if name not in named:
                raise ValueError(f"{folder} is of kind {config.kind}; the model has no {name}")
            there = [f"{place.module}.{suffix}" for suffix in suffixes]
            module = next((each for each in there if each in left), None)
            if module is None:
                raise ValueError(f"{folder}/{ARRAYS} has no tensor {there[0]}")
            if name not in new:
                new[name] = np.array(named[name], np.float32)
            _write(new[name], left.pop(module), place, leaf, module, named)
    if left:
        raise ValueError(
            f"{folder}/{ARRAYS}: the model has no adapter for {min(left)}; {len(left)} tensors are left over"
        )
    return _replaced(params, new)


def export_peft(
    params: PyTree,
    folder: Path,
    config: PeftConfig,
    *,
    modules: Mapping[str, tuple[str, ...]] = LLAMA,
    layer: str = LLAMA_LAYER,
    rope_layout: str = "half",
) -> list[str]:
    """Writes the adapters of `params` into `folder`; returns the names of the tensors.

    Raises:
      ValueError: `params` has no adapters, or adapters of another rank or kind than `config` says.
    """
    named = _named(params)
    tensors: Arrays = {}
    places = list(_places(named, modules, layer, rope_layout))
    for place in places:
        rank = named[f"{place.path}/lora/a"].shape[-1]
        if rank != config.rank:
            raise ValueError(f"{place.path} has an adapter of rank {rank}, not {config.rank}")
        if (f"{place.path}/lora/magnitude" in named) != (config.kind == "dora"):
            raise ValueError(f"the adapter of {place.path} is not of the kind '{config.kind}'")
        for leaf, suffixes in _leaves(config.kind).items():
            tensors[f"{place.module}.{suffixes[0]}"] = _read(named, place, leaf)
    targets = sorted({place.module.rsplit(".", 1)[1] for place in places})
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _save(tensors, folder / ARRAYS)
    (folder / CONFIG).write_text(json.dumps(_config(config, targets), indent=2) + "\n")
    return list(tensors)


def _config(config: PeftConfig, targets: list[str]) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base_model,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.kind == "rslora",
        "use_dora": config.kind == "dora",
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _leaves(kind: str) -> dict[str, tuple[str, ...]]:
    return {**_SUFFIXES, "magnitude": _MAGNITUDE} if kind == "dora" else dict(_SUFFIXES)


def _places(named: Mapping[str, Any], modules, layer, rope_layout) -> Iterator[_Place]:
    """Every adapter of every layer."""
    paths = [name.removesuffix("/lora/a") for name in named if name.endswith("/lora/a")]
    if not paths:
        raise ValueError("the parameters have no adapters (no name ends with lora/a)")
    targets_of: dict[str, tuple[str, ...]] = {}
    for path in paths:
        match = _MODULE.fullmatch(path)
        if match is None or match.group(2) not in modules:
            raise ValueError(f"no Hugging Face module is known for the adapter of {path}")
        targets_of[path] = modules[match.group(2)]
    # Also blocks without an adapter count.
    numbers = layers_of({name: leaf.shape for name, leaf in named.items()})
    for path, targets in targets_of.items():
        first, length = numbers[f"{path}/lora/a"]
        for repeat in range(named[f"{path}/lora/a"].shape[0]):
            prefix = layer.format(layer=first + repeat * length)
            for part, target in enumerate(targets):
                turned = rope_layout == "interleaved" and target.endswith(_ROTATED)
                index = part if len(targets) > 1 else None
                yield _Place(path, repeat, index, f"{prefix}.{target}", turned)


def _read(named: Mapping[str, Any], place: _Place, leaf: str) -> np.ndarray:
    value = np.asarray(named[f"{place.path}/lora/{leaf}"][place.index], np.float32)
    if leaf == "magnitude":
        value = value + _norms(named, place)
    if place.interleaved and leaf != "a":
        value = np.concatenate([value[..., 0::2], value[..., 1::2]], axis=-1)
    if leaf == "magnitude":
        return value.reshape(-1)
    rows = value.reshape(-1, value.shape[-1]) if leaf == "a" else value.reshape(value.shape[0], -1)
    return np.ascontiguousarray(rows.T)


def _write(
    target: np.ndarray, found: np.ndarray, place: _Place, leaf: str, module: str, named
) -> None:
    shape = target[place.index].shape
    wanted = {
        "a": (shape[-1], math.prod(shape[:-1])),
        "b": (math.prod(shape[1:]), shape[0]),
        "magnitude": (math.prod(shape),),
    }[leaf]
    if leaf == "magnitude":
        found = found.reshape(-1)
    if found.shape != wanted:
        raise ValueError(f"{module} has shape {list(found.shape)}, the model wants {list(wanted)}")
    value = found.astype(np.float32).T.reshape(shape)
    if place.interleaved and leaf != "a":
        value = np.stack(np.split(value, 2, axis=-1), axis=-1).reshape(shape)
    if leaf == "magnitude":
        value = value - _norms(named, place)
    target[place.index] = value


def _norms(named: Mapping[str, Any], place: _Place) -> np.ndarray:
    """Norms of the columns of the frozen weight, in the shape of the magnitude."""
    name = f"{place.path}/kernel"
    if name not in named:
        raise ValueError(
            f"the magnitude of {place.path} needs its float weight, and {name} is not there"
        )
    kernel = np.asarray(named[name][place.repeat], np.float32)
    a = named[f"{place.path}/lora/a"].shape
    num_inputs = len(a) - 2 - (place.part is not None)
    if place.part is not None:
        kernel = np.take(kernel, place.part, axis=num_inputs)
    return np.sqrt(np.sum(np.square(kernel), axis=tuple(range(num_inputs))))


def _named(tree: PyTree, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix.rstrip("/"): tree}
    return {
        k: v for name, value in tree.items() for k, v in _named(value, f"{prefix}{name}/").items()
    }


def _replaced(tree: PyTree, new: Mapping[str, Any], prefix: str = "") -> PyTree:
    if not isinstance(tree, Mapping):
        return new.get(prefix.rstrip("/"), tree)
    return {name: _replaced(value, new, f"{prefix}{name}/") for name, value in tree.items()}


def _load(file: Path) -> Arrays:
    if not file.exists():
        raise ValueError(
            f"{file.parent} has no {file.name}; PEFT's older .bin files cannot be read"
        )
    return {name: tensor.read((...,)) for name, tensor in read_header(file).items()}


def _save(tensors: Arrays, file: Path) -> None:
    with Writer(file, {name: (each.shape, each.dtype) for name, each in tensors.items()}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
