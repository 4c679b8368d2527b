"""What is left of a run that ended badly: exit codes, `processes/failure.txt`, stacks."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import time
import traceback
from pathlib import Path

EXIT_HUNG = 84
"""Exit code of a run in which nothing moved for too long."""
EXIT_LOST = 85
"""Exit code of a process that ended because another one of the run had died or failed."""

FOLDER = "processes"
FAILURE_FILE = "failure.txt"
_LAST_LINES = 40
# What the libraries below say when the process at the other end is gone: a consequence, not a cause.
_CONSEQUENCES = (
    "gloo",
    "nccl",
    "connection closed by peer",
    "connection reset by peer",
    "socket closed",
    "coordination service",
    "barrier",
    "waited",
)


def processes_folder(directory: Path) -> Path:
    """Where a run keeps what its processes say."""
    return Path(directory) / FOLDER


def log_path(directory: Path, rank: int) -> Path:
    """The file of what process `rank` prints."""
    return processes_folder(directory) / f"rank_{rank:05d}.log"


def is_consequence(error: BaseException) -> bool:
    """Whether it is what a process sees when another one is lost."""
    text = f"{type(error).__name__} {error}".lower()
    kinds = ("JaxRuntimeError", "XlaRuntimeError", "TimeoutError")
    return type(error).__name__ in kinds and any(word in text for word in _CONSEQUENCES)


def code_of(error: BaseException) -> int:
    """Exit code of a process that ends with it; 2: wrong use, or a file or a disk."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, ValueError | OSError) else 1


def last_lines(path: Path, number: int = _LAST_LINES) -> list[str]:
    """The end of what the latest start wrote to a rank's log; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 32768))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    start = max((n for n, line in enumerate(lines) if line.startswith("== process ")), default=-1)
    return lines[start + 1 :][-number:]


def write_failure(directory: Path, lines: list[str], *, only_first: bool = False) -> bool:
    """Writes `failure.txt`; with `only_first` not where another process has. Says whether it did."""
    path = processes_folder(directory) / FAILURE_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x" if only_first else "w") as file:
            file.write("\n".join([time.strftime("%Y-%m-%d %H:%M:%S %Z"), *lines]) + "\n")
        return True
    except OSError:  # what cannot be written has been printed
        return False


def clear_failure(directory: Path) -> None:
    """Removes what an earlier start left."""
    with contextlib.suppress(OSError):
        (processes_folder(directory) / FAILURE_FILE).unlink(missing_ok=True)


def dump_stacks(path: Path | None, why: str) -> None:
    """Appends the Python stacks of all threads to `path`; to standard error where there is none."""
    try:
        file = open(2, "w", closefd=False) if path is None else path.open("a")  # noqa: SIM115
        with file:
            file.write(f"== stacks: {why}\n")
            file.flush()
            faulthandler.dump_traceback(file=file, all_threads=True)
    except (OSError, ValueError):
        pass


def main_thread_at() -> str:
    """Where the main thread is, innermost first: functions of this package only, where there are any."""
    import threading

    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    frames = traceback.extract_stack(frame)[::-1] if frame else []
    here = str(Path(__file__).resolve().parent.parent)
    ours = [each for each in frames if each.filename.startswith(here)] or list(frames)
    return " < ".join(
        f"{each.name} ({Path(each.filename).name}:{each.lineno})" for each in ours[:3]
    )


def leave(code: int) -> None:
    """Ends this process now: a thread that waits inside a collective cannot be joined."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
