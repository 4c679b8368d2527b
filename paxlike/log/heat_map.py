"""A table that changes with time as a picture: what each expert of each layer was given, for TensorBoard.

Time runs to the right, a column for each summary; layers stand one below the other, a row for each expert.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np

MAX_COLUMNS = 256
_SIZE = 3  # pixels of a column and of a row
_LINE = (90, 90, 90)
# Dark blue to yellow by way of green, read well by colour-blind readers too (anchors as in matplotlib's viridis).
_COLORS = np.array(
    [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], np.float64
)


def heat_map(tables: Sequence[np.ndarray], *, largest: float) -> bytes:
    """A PNG of tables (layers, experts), oldest first; `largest` and above is the brightest colour.

    Of many tables the picture has at most `MAX_COLUMNS`, evenly chosen, the last one among them.
    """
    chosen = np.unique(np.linspace(0, len(tables) - 1, MAX_COLUMNS).round().astype(int))
    stacked = np.stack([np.asarray(tables[i], np.float64) for i in chosen], axis=-1)
    levels = np.clip(np.nan_to_num(stacked) / largest, 0.0, 1.0) * (len(_COLORS) - 1)
    below = np.minimum(levels.astype(int), len(_COLORS) - 2)
    part = (levels - below)[..., None]
    pixels = _COLORS[below] * (1.0 - part) + _COLORS[below + 1] * part
    pixels = pixels.round().astype(np.uint8).repeat(_SIZE, axis=1).repeat(_SIZE, axis=2)
    line = np.full((1, pixels.shape[2], 3), _LINE, np.uint8)
    rows = [part for layer in pixels for part in (layer, line)][:-1]
    return _png(np.concatenate(rows))


def _png(pixels: np.ndarray) -> bytes:
    """An image (height, width, 3) of bytes as a PNG file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    height, width, _ = pixels.shape
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            chunk(b"IDAT", zlib.compress(lines.tobytes())),
            chunk(b"IEND", b""),
        ]
    )
