"""Folders of Hugging Face: `model.safetensors`, or shards and their index, and `config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paxlike.weights.foreign import (
    CONFIG,
    ForeignFolder,
    Tensor,
    TorchTensor,
    load_torch,
    read_json,
)
from paxlike.weights.safetensors_file import read_header

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLE, _PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

# Keys of config.json -> the knob that says the same here.
_KNOBS = {
    "vocab_size": "VOCAB_SIZE",
    "hidden_size": "MODEL_DIMS",
    "n_embd": "MODEL_DIMS",
    "num_hidden_layers": "NUM_LAYERS",
    "n_layer": "NUM_LAYERS",
    "num_attention_heads": "NUM_HEADS",
    "n_head": "NUM_HEADS",
    "num_key_value_heads": "NUM_KV_HEADS",
    "head_dim": "DIMS_PER_HEAD",
    "intermediate_size": "HIDDEN_DIMS",
    "n_inner": "HIDDEN_DIMS",
    "n_positions": "MAX_SEQ_LEN",
    "rms_norm_eps": "RMS_NORM_EPSILON",
    "layer_norm_epsilon": "LAYERNORM_EPSILON",
    "rope_theta": "ROPE_THETA",
    "rope_scaling": "ROPE_SCALING",
    "tie_word_embeddings": "SEPARATE_EMBEDDING",
    "hidden_act": "ACTIVATION",
    "sliding_window": "SLIDING_WINDOW",
}
# What says nothing about the model's arithmetic; a row may be shorter than the model allows.
_NOT_COMPARED = {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"} | {
    "max_position_embeddings"
}
_ACTIVATIONS = {"swish": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
# Names that mean the same.
_SYNONYMS = {"hidden_activation": "hidden_act", "activation_function": "hidden_act"}


def open_hugging_face(path: Path) -> ForeignFolder:
    """Reads the headers of all shards; `ValueError` in one line for what is not there or damaged."""
    config = read_json(path / CONFIG) if (path / CONFIG).is_file() else None
    return ForeignFolder(path, "huggingface", _tensors(path), config)


def check_config(
    found: Mapping[str, Any], expected: Mapping[str, Any], *, source: str | Path
) -> list[str]:
    """Compares a `config.json` with what the model is; returns the keys that it does not mention.

    Raises `ValueError` in one line that names the key, both values, and the knob to set. Both forms of the
    rotation are understood: `rope_theta` and `rope_scaling`, and the `rope_parameters` of newer files.
    """
    theirs, ours = _normal(found), _normal(expected)
    missing = []
    for key, value in ours.items():
        if key in _NOT_COMPARED:
            continue
        if key not in theirs:
            missing.append(key)
        elif not _same(theirs[key], value):
            raise ValueError(
                f"{key} is {theirs[key]!r} in {source} and {value!r} in this model: "
                f"{_remedy(key, theirs[key])}"
            )
    return missing


def _remedy(key: str, value: Any) -> str:
    if key == "model_type":
        return "take a config of that family"
    if key == "tie_word_embeddings":
        value = not value
    return f"set {_KNOBS[key]}={value}" if key in _KNOBS else "take a config that agrees"


def _normal(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` in one spelling, what is implied made explicit."""
    flat = {_SYNONYMS.get(key, key): value for key, value in config.items()}
    flat |= {_SYNONYMS.get(k, k): v for k, v in (flat.pop("text_config", None) or {}).items()}
    flat |= _rotation(flat.pop("rope_parameters", None), flat.pop("rope_scaling", None))
    heads = flat.get("num_attention_heads")
    if heads and "hidden_size" in flat:
        if flat.get("head_dim") is None:
            flat["head_dim"] = flat["hidden_size"] // heads
        if flat.get("num_key_value_heads") is None:
            flat["num_key_value_heads"] = heads
    if "n_embd" in flat and flat.get("n_inner") is None:
        flat["n_inner"] = 4 * flat["n_embd"]
    if "hidden_act" in flat:
        flat["hidden_act"] = _ACTIVATIONS.get(flat["hidden_act"], flat["hidden_act"])
    if flat.pop("use_sliding_window", True) is False:
        flat["sliding_window"] = None
    flat.setdefault("sliding_window", None)
    if flat.get("model_type") == "mistral":  # LLaMA with a window, and without one just that.
        flat["model_type"] = "llama"
    return flat


def _rotation(parameters: Any, scaling: Any) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` (None for none) and `rope_local_base_freq`, from either form."""
    given = dict(parameters or scaling or {})
    if "full_attention" in given:
        local = given.get("sliding_attention") or {}
        found = _rotation(given["full_attention"], None)
        return found | (
            {"rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else {}
        )
    theta = {"rope_theta": given.pop("rope_theta")} if "rope_theta" in given else {}
    kind = given.pop("type", None)
    kind = given.pop("rope_type", kind) or "default"
    if kind == "yarn":  # What a file need not say.
        given = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, **given}
        given = {key: value for key, value in given.items() if value is not None}
    return theta | {"rope_scaling": None if kind == "default" else {"rope_type": kind, **given}}


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, int | float) and isinstance(right, int | float):
        return math.isclose(left, right, rel_tol=1e-9)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    return left == right


def _tensors(path: Path) -> dict[str, Tensor]:
    if (path / INDEX).is_file():
        return _shards(path, INDEX)
    if (path / SINGLE).is_file():
        return dict(read_header(path / SINGLE))
    if (path / _PICKLE_INDEX).is_file():
        return _shards(path, _PICKLE_INDEX)
    if (path / _PICKLE).is_file():
        return _pickled(path / _PICKLE)
    raise ValueError(
        f"no weights in {path}: {SINGLE}, {INDEX}, {_PICKLE} or consolidated.00.pth is expected there"
    )


def _shards(path: Path, index: str) -> dict[str, Tensor]:
    where = read_json(path / index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{path / index} has no weight_map: copy it again")
    files = sorted(set(where.values()))
    if absent := [name for name in files if not (path / name).is_file()]:
        raise ValueError(
            f"{len(absent)} of {len(files)} shards in {index} are not in {path}, {absent[0]} first: copy them"
        )
    read = read_header if index == INDEX else _pickled
    found: dict[str, Tensor] = {}
    for name in files:
        found |= read(path / name)
    if absent := [name for name in where if name not in found]:
        raise ValueError(
            f"{where[absent[0]]} in {path} lacks {absent[0]}, which {index} puts there"
        )
    return found


def _pickled(path: Path) -> dict[str, Tensor]:
    return {name: TorchTensor(value) for name, value in load_torch(path).items()}
