"""Files that only grow, record by record, and stay readable when the disk is full.

A run is often looked at because something went wrong, so its log is the last thing that may be
damaged by what went wrong. Every record is one `write` without a buffer; a record that does not fit
is taken back, so the file ends at a record border whatever happens, and what was written before the
failure is on disk when the process is killed.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import tempfile
from typing import Any

import numpy as np

_PROBE_BYTES = 4096


def check_writable(directory: str | os.PathLike, *, needed_bytes: int = 1 << 20) -> pathlib.Path:
    """Creates `directory` where it is missing and proves that files can be written in it.

    Meant to be called before anything is allocated: a run that cannot log should end at once, not
    after an hour at its first summary.

    Args:
        directory: a folder of a mounted file system.
        needed_bytes: free space below which the folder counts as full.

    Raises:
        ValueError: one line with the path, the reason, the free space and the remedy.
    """
    if "://" in str(directory):
        raise ValueError(
            f"log folder {str(directory)!r} is an address, not a path: mount the bucket as a "
            "folder and give that folder as --job_log_dir"
        )
    path = pathlib.Path(directory).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Only a real write sees quotas, full disks and read-only mounts; os.access does not.
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"\0" * _PROBE_BYTES)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise ValueError(
            f"cannot write to the log folder {str(path)!r}: {error.strerror or error} "
            f"({_free_space(path)}); give another --job_log_dir or make room there"
        ) from None
    if shutil.disk_usage(path).free < needed_bytes:
        raise ValueError(
            f"the log folder {str(path)!r} is on a full disk ({_free_space(path)}, "
            f"{_megabytes(needed_bytes)} needed); give another --job_log_dir or make room there"
        )
    return path


class AppendFile:
    """A file that whole records are appended to; a record is written entirely or not at all."""

    def __init__(self, path: str | os.PathLike):
        """Opens `path` for appending, making its folder; raises OSError."""
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Open as long as this object lives.
        self._file = open(self.path, "ab+", buffering=0)  # noqa: SIM115

    def append(self, record: bytes) -> None:
        """Appends `record` in one write; raises OSError after taking a partial record back."""
        before = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(record)
            if written != len(record):  # the disk filled up in the middle: ask for the reason
                self._file.write(record[written:])
        except OSError:
            os.ftruncate(self._file.fileno(), before)
            raise

    def ends_with(self, suffix: bytes) -> bool:
        """Whether the file is empty or its last bytes are `suffix`."""
        size = os.fstat(self._file.fileno()).st_size
        return size == 0 or os.pread(self._file.fileno(), len(suffix), size - len(suffix)) == suffix

    def close(self) -> None:
        """Closes the file; closing twice is allowed."""
        self._file.close()


def to_jsonable(value: Any) -> Any:
    """`value` as something the json module writes.

    Arrays become numbers or lists, what JSON does not know its `str`, and numbers that are not
    finite None.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, dict):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_jsonable(item) for item in value]
    if isinstance(value, np.ndarray | np.generic) or hasattr(value, "__array__"):
        return to_jsonable(np.asarray(value, dtype=_plain_dtype(value)).tolist())
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return str(value)


def _plain_dtype(value: Any) -> Any:
    # bfloat16 and the float8 types come back from tolist() as numpy scalars, not as Python floats.
    dtype = np.asarray(value).dtype
    return np.float32 if dtype.kind == "V" or dtype.name.startswith(("bfloat", "float8")) else dtype


def _free_space(path: pathlib.Path) -> str:
    """The free space at the nearest existing folder above `path`, in words."""
    for folder in (path, *path.absolute().parents):
        try:
            return f"{_megabytes(shutil.disk_usage(folder).free)} free"
        except OSError:
            continue
    return "free space unknown"


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
