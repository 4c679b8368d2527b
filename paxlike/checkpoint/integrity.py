"""Every file of a checkpoint with its size and CRC-32: tells a damaged checkpoint from a whole one.

The list is written into the unfinished folder just before the rename that completes it, in the
thread that saves: a kill at any moment leaves both the checkpoint and its list, or neither.
CRC-32 finds accidents (truncation, flipped bytes, lost blocks), not forgery.
"""

from __future__ import annotations

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MANIFEST = "manifest.json"
# Orbax writes these two after the list is made; nothing of ours is read from them.
_UNLISTED = {MANIFEST, "_CHECKPOINT_METADATA", "commit_success.txt"}
_BLOCK_BYTES = 1 << 22


def write_manifest(folder: Path, *, checksums: bool = True) -> None:
    """Lists the files below `folder` in its `manifest.json`; without `checksums` by size only."""
    names = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name not in _UNLISTED
    )
    sums = _checksums([folder / name for name in names]) if checksums else [None] * len(names)
    files = {
        name: [(folder / name).stat().st_size, crc] for name, crc in zip(names, sums, strict=True)
    }
    text = json.dumps({"version": 1, "files": files}, indent=1)
    (folder / MANIFEST).write_text(text)


def damage(folder: Path, *, checksums: bool = True, part: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with the checkpoint in `folder`, in a few words; None when it is whole.

    Sizes of all files are compared, and with `checksums` the contents; `part=(i, n)` reads every
    n-th file from the i-th on, so that n processes share the work.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        expected = {name: (int(size), crc) for name, (size, crc) in files.items()}
    except OSError as error:
        return f"{MANIFEST}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    if not expected:
        return f"{MANIFEST} lists no files"
    for name, (size, _) in expected.items():
        try:
            found = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
    if not checksums:
        return None
    mine = [name for name, (_, crc) in sorted(expected.items()) if crc is not None][
        part[0] :: part[1]
    ]
    try:
        found_sums = _checksums([folder / name for name in mine])
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    for name, crc in zip(mine, found_sums, strict=True):
        if crc != expected[name][1]:
            return f"{name} has CRC-32 {crc} instead of {expected[name][1]}"
    return None


def _checksums(paths: list[Path]) -> list[str]:
    # zlib releases the interpreter lock on large blocks: threads use the cores and hide the disk.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(_crc32, paths))


def _crc32(path: Path) -> str:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


def has_checksums(folder: Path) -> bool:
    """Whether the list of files carries checksums, not sizes only."""
    files = json.loads((folder / MANIFEST).read_text())["files"]
    return all(crc is not None for _, crc in files.values())
