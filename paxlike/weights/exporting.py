"""Our parameters as a folder of Hugging Face: safetensors shards, their index and `config.json`.

The places of all tensors are laid out first; then each is written as soon as it is read, in whatever order is cheap to
read. The folder gets its name when it is complete.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np

from paxlike.checkpoint import arrays
from paxlike.weights.foreign import CONFIG
from paxlike.weights.hugging_face import INDEX, SINGLE
from paxlike.weights.importing import Report
from paxlike.weights.maps import Description, Piece, plan
from paxlike.weights.safetensors_file import Writer

Dtype = Literal["float32", "bfloat16"]
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
DEFAULT_SHARD_SIZE = "5GB"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def export_params(
    params: Any,
    folder: str | Path,
    description: Description,
    *,
    dtype: Dtype = "float32",
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    report: Report | None = None,
) -> None:
    """Writes `params` to `folder` so that Hugging Face's `from_pretrained` loads it.

    The leaves of `params` are arrays, or anything with `shape` and `leaf[index]`: they are read one layer at a time.
    `report(done, total)` is called after each tensor. Raises `ValueError` in one line for a folder that is not
    empty, a description without `config`, and parameters that the family has no tensor for.
    """
    folder = Path(folder).absolute()
    named = arrays.named_leaves(params)
    _check(folder, named, description, dtype)
    limit = num_bytes(max_shard_size)
    pieces = [
        piece
        for each in plan(description, {name: leaf.shape for name, leaf in named.items()}).values()
        for piece in each
    ]
    shards = _shards(pieces, DTYPES[dtype].itemsize, limit)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        _write_tensors(unfinished, shards, pieces, named, DTYPES[dtype], report)
        _write_index(unfinished, shards, DTYPES[dtype].itemsize)
        text = json.dumps(_config(description, dtype), indent=2) + "\n"
        (unfinished / CONFIG).write_text(text)
        unfinished.rename(folder)  # Onto nothing, or an empty folder.
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def num_bytes(size: str | int) -> int:
    """`"5GB"`, `"200MB"` or a number as bytes; `ValueError` for anything else, or none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B)?", str(size).strip(), re.I)
    number = float(match[1]) * _UNITS[(match[2] or "").upper()] if match else 0
    if number < 1:
        raise ValueError(f"max_shard_size={size!r} is no size: write it as 5GB, 200MB or bytes")
    return int(number)


def _check(folder: Path, named: Mapping[str, Any], description: Description, dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is none of {', '.join(DTYPES)}")
    if not folder.parent.is_dir():
        raise ValueError(f"{folder.parent} is not a folder: make it, or choose another output")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: choose another output folder, or empty it")
    if not description.config:
        raise ValueError(
            f"the weights of {description.family} here have no config: without {CONFIG} nothing could load them"
        )
    for name, leaf in named.items():
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise ValueError(
                f"parameter {name} is spread over several processes: save a checkpoint and convert that"
            )


def _shards(pieces: list[Piece], itemsize: int, limit: int) -> dict[str, list[Piece]]:
    """File -> its tensors: in the order of the model, each file filled up to `limit`."""
    files: list[list[Piece]] = [[]]
    used = 0
    for piece in sorted(pieces, key=_position):
        size = math.prod(piece.shape) * itemsize
        if files[-1] and used + size > limit:
            files.append([])
            used = 0
        files[-1].append(piece)
        used += size
    if len(files) == 1:
        return {SINGLE: files[0]}
    stem = SINGLE.removesuffix(".safetensors")
    total = len(files)
    return {
        f"{stem}-{number:05d}-of-{total:05d}.safetensors": each
        for number, each in enumerate(files, start=1)
    }


def _position(piece: Piece) -> tuple[int, int]:
    """Tables first, then the layers, then the rest."""
    if layer := re.search(r"\.(\d+)\.", piece.tensor):
        return 1, int(layer[1])
    return (
        (0, 0) if piece.parameter.endswith("/table") and "head" not in piece.parameter else (2, 0)
    )


def _write_tensors(
    folder: Path,
    shards: Mapping[str, list[Piece]],
    pieces: list[Piece],
    named: Mapping[str, Any],
    dtype: np.dtype,
    report: Report | None,
) -> None:
    with contextlib.ExitStack() as stack:
        writer_of: dict[str, Writer] = {}
        for file, members in shards.items():
            content = {piece.tensor: (piece.foreign_shape, dtype) for piece in members}
            writer = stack.enter_context(Writer(folder / file, content))
            writer_of |= dict.fromkeys(content, writer)
        # By parameter, as they are stored here; the files take them in any order.
        for done, piece in enumerate(pieces, start=1):
            writer_of[piece.tensor].write(piece.tensor, _value(piece, named[piece.parameter]))
            if report is not None:
                report(done, len(pieces))


def _value(piece: Piece, leaf: Any) -> np.ndarray:
    """The foreign tensor of a piece, in float32 where an offset is added."""
    index = tuple(slice(None) if fixed is None else fixed for fixed in piece.at)
    value = np.asarray(leaf[index])
    if piece.offset:
        value = value.astype(np.float32) + np.float32(piece.offset)
    return piece.rearrangement.put(value)


def _write_index(folder: Path, shards: Mapping[str, list[Piece]], itemsize: int) -> None:
    if len(shards) == 1:
        return
    total = sum(math.prod(piece.shape) for each in shards.values() for piece in each) * itemsize
    where = {piece.tensor: file for file, members in shards.items() for piece in members}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2)
    with (folder / INDEX).open("w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def _config(description: Description, dtype: Dtype) -> dict[str, Any]:
    """`dtype` under both its names: the older one is what older readers know."""
    return {**description.config, "torch_dtype": dtype, "dtype": dtype}
