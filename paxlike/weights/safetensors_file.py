"""The safetensors format: a length, a JSON header with name, type, shape and place of each tensor, then the bytes.

Format: https://github.com/huggingface/safetensors#format. Parts of a tensor are read through a memory map that lives
only as long as the read, and written at their place in any order: memory holds what is asked for and no more. The
types include bfloat16 and FP8, which plain numpy lacks.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from paxlike.weights.rearrange import Shape

_LENGTH_BYTES = 8
# A header of more than this is no header; the format allows no more either.
_MAX_HEADER_BYTES = 100_000_000
_ALIGNMENT = 8
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: file, type, shape, and the byte it begins at."""

    path: Path
    dtype: np.dtype
    shape: Shape
    offset: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, index: tuple[Any, ...]) -> np.ndarray:
        """A copy of that box of the tensor; `(...,)` is all of it."""
        if not self.num_bytes:
            return np.zeros(self.shape, self.dtype)[index]
        # Numpy maps only its own types.
        raw = np.dtype(f"u{self.dtype.itemsize}")
        mapped = np.memmap(self.path, raw, "r", self.offset, self.shape)
        return np.array(mapped[index]).view(self.dtype)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, by name; nothing else is read.

    Raises `ValueError` in one line for what is no safetensors file, or not all of one.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if not 2 <= length <= min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
            raise ValueError(
                f"{path} of {size} bytes is not a safetensors file, or only its beginning (or a "
                "Git LFS pointer): copy it again"
            )
        text = file.read(length)
    try:
        header = json.loads(text)
        start = _LENGTH_BYTES + length
        tensors = {
            name: _stored(path, entry, start)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the header of {path} cannot be read ({error}): copy it again") from error
    end = max((each.offset + each.num_bytes for each in tensors.values()), default=0)
    if end > size:
        raise ValueError(f"{path} ends after {size} of {end} bytes: copy it again")
    return tensors


def _stored(path: Path, entry: Mapping[str, Any], start: int) -> StoredTensor:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"type {entry['dtype']} is none of {', '.join(_DTYPES)}")
    first, last = entry["data_offsets"]
    stored = StoredTensor(path, _DTYPES[entry["dtype"]], tuple(entry["shape"]), start + first)
    if last - first != stored.num_bytes:
        raise ValueError(f"shape {entry['shape']} does not fill {last - first} bytes")
    return stored


class Writer:
    """A file whose tensors are known and still to be filled, in any order; a context."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[Shape, np.dtype]]):
        """Makes the file in its full size; `tensors` gives shape and type of each."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._places: dict[str, int] = {}
        end = 0
        for name, (shape, dtype) in tensors.items():
            size = math.prod(shape) * np.dtype(dtype).itemsize
            header[name] = {
                "dtype": _NAMES[np.dtype(dtype)],
                "shape": list(shape),
                "data_offsets": [end, end + size],
            }
            self._places[name] = end
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._start = _LENGTH_BYTES + len(text)
        self._tensors = dict(tensors)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        self._file.truncate(self._start + end)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def write(self, name: str, value: np.ndarray) -> None:
        """Writes one whole tensor at its place, in the type that was announced."""
        shape, dtype = self._tensors[name]
        if value.shape != shape:
            raise ValueError(f"{name} has shape {value.shape}; {shape} was announced")
        value = np.ascontiguousarray(value.astype(dtype, copy=False))
        self._file.seek(self._start + self._places[name])
        self._file.write(value.reshape(-1).view(np.uint8).data)

    def close(self) -> None:
        """Sees that all is on the disk."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
