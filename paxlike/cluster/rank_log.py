"""A copy of all that one process of several prints, C++ included, in `processes/rank_00003.log`.

Standard output and error go through a `tee` of the operating system each, at the level of file
descriptors. It is a process of its own, so that the last words of one that is killed are kept; it
ends by itself with the last writer.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path

from paxlike.cluster.failure import log_path
from paxlike.cluster.identity import Identity

_COPIERS: list[subprocess.Popen] = []  # kept, so that Python does not warn that they still run


def keep(directory: Path, rank: int) -> Path | None:
    """Begins the copy; returns its file, or None where it cannot be written (the run says so itself)."""
    path = log_path(directory, rank)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
            file.write(f"== process {rank}, {Identity.here()}, {now}\n")
        for descriptor in (1, 2):
            _copy(descriptor, path)
    except OSError as error:
        print(f"warning: {path} cannot be written: {error}", file=sys.stderr)
        return None
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not under a test runner
            stream.reconfigure(line_buffering=True)
    return path


def _copy(descriptor: int, path: Path) -> None:
    """Lets what is written to `descriptor` go where it went, and to the end of `path`."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    # It outlives the signals that stop a run: it must print what the run says about them.
    command = ["sh", "-c", 'trap "" TERM INT USR1 USR2 HUP; exec tee -a -- "$0"', str(path)]
    reader, writer = os.pipe()
    try:
        _COPIERS.append(subprocess.Popen(command, stdin=reader, stdout=descriptor))
        os.dup2(writer, descriptor)
    finally:
        os.close(reader)
        os.close(writer)
