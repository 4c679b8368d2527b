"""Folders of Meta's LLaMA: `consolidated.NN.pth`, one for each of the devices it was cut for, and `params.json`.

Matrices that make several outputs are cut along those (the first axis), matrices that sum them along their inputs (the
second). The token table is cut along the width in LLaMA-2 and along the vocabulary in LLaMA-3; the length of a norm
tells which.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from paxlike.weights.foreign import (
    META_CONFIG,
    ForeignFolder,
    Tensor,
    TorchTensor,
    load_torch,
    read_json,
)
from paxlike.weights.rearrange import Index, Shape

_SHARD = re.compile(r"consolidated\.(\d+)\.pth")
_CUT_ALONG_INPUTS = re.compile(r".*\.(wo|w2)\.weight")
_TABLE, _NORM = "tok_embeddings.weight", "norm.weight"
# params.json -> config.json
_CONFIG = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "vocab_size": "vocab_size",
}


@dataclasses.dataclass(frozen=True)
class Joined:
    """A tensor in parts, one behind the other along `axis`."""

    parts: tuple[Tensor, ...]
    axis: int

    @property
    def shape(self) -> Shape:
        """Of the whole tensor."""
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(shape)

    @property
    def dtype(self) -> np.dtype:
        """As it is stored."""
        return self.parts[0].dtype

    def read(self, index: Index) -> np.ndarray:
        """A box, out of the parts that it touches."""
        asked, found, begin = index[self.axis], [], 0
        for part in self.parts:
            size = part.shape[self.axis]
            start, stop = max(asked.start - begin, 0), min(asked.stop - begin, size)
            if start < stop:
                local = (*index[: self.axis], slice(start, stop), *index[self.axis + 1 :])
                found.append(part.read(local))
            begin += size
        return found[0] if len(found) == 1 else np.concatenate(found, axis=self.axis)


def is_meta(path: Path) -> bool:
    """Whether `path` has files of that name."""
    return any(_SHARD.fullmatch(entry.name) for entry in path.iterdir())


def open_meta(path: Path) -> ForeignFolder:
    """Maps all shards; `ValueError` in one line for what is not there or does not fit together."""
    numbers = sorted(
        int(match[1])
        for match in (_SHARD.fullmatch(entry.name) for entry in path.iterdir())
        if match
    )
    if numbers != list(range(len(numbers))):
        absent = next(n for n in range(len(numbers)) if n not in numbers)
        raise ValueError(
            f"consolidated.{absent:02d}.pth is not in {path}, where number {numbers[-1]} is: copy it"
        )
    shards = [load_torch(path / f"consolidated.{number:02d}.pth") for number in numbers]
    first = shards[0]
    for number, shard in enumerate(shards):
        if different := sorted(shard.keys() ^ first.keys()):
            raise ValueError(
                f"consolidated.{number:02d}.pth and consolidated.00.pth in {path} differ in "
                f"{different[0]}: they are of different models"
            )
    width = first[_NORM].shape[0] if _NORM in first else None
    tensors = {
        name: _joined(name, [TorchTensor(shard[name]) for shard in shards], width) for name in first
    }
    return ForeignFolder(path, "meta", tensors, _config(path), META_CONFIG)


def _joined(name: str, parts: list[TorchTensor], width: int | None) -> Tensor:
    if len(parts) == 1 or len(parts[0].shape) < 2:
        return parts[0]
    by_width = name == _TABLE and parts[0].shape[1] != width
    return Joined(tuple(parts), 1 if by_width or _CUT_ALONG_INPUTS.fullmatch(name) else 0)


def _config(path: Path) -> Mapping[str, Any] | None:
    if not (path / META_CONFIG).is_file():
        return None
    given = read_json(path / META_CONFIG)
    found = {_CONFIG[key]: value for key, value in given.items() if key in _CONFIG}
    if found.get("vocab_size", -1) < 0:  # LLaMA-2 leaves it to the tokenizer.
        found.pop("vocab_size", None)
    if not given.get("use_scaled_rope", False):
        found["rope_scaling"] = None
    return found
