"""Following the checkpoints of a run that may still be training in another process."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from paxlike.checkpoint import layout
from paxlike.cluster import processes

_MARKER = "finished.json"


def mark_finished(job_log_dir: Path, step: int) -> None:
    """Records that the run ended at `step`, so that those who follow it stop.

    Call it after the last checkpoint is complete.
    """
    if jax.process_index() != 0:
        return
    marker = Path(job_log_dir) / _MARKER
    unfinished = marker.with_suffix(".tmp")
    unfinished.write_text(json.dumps({"step": step}) + "\n")
    os.replace(unfinished, marker)


def clear_finished(job_log_dir: Path) -> None:
    """Takes the record back: the run goes on (a larger number of steps, say)."""
    if jax.process_index() == 0:
        (Path(job_log_dir) / _MARKER).unlink(missing_ok=True)


def finished_step(job_log_dir: Path) -> int | None:
    """The step at which the run ended; None while it has not."""
    try:
        return int(json.loads((Path(job_log_dir) / _MARKER).read_text())["step"])
    except FileNotFoundError:
        return None


def wait_for_new_checkpoint(
    job_log_dir: Path,
    *,
    after_step: int = -1,
    timeout_seconds: float = 3600,
    poll_seconds: float = 10,
    say: Callable[[str], None] = print,
) -> Iterator[int]:
    """Yields the newest step whenever there is a later one, until the run is finished.

    Steps that are overtaken meanwhile are passed over: a slow reader does not fall behind the
    checkpoints that are kept. Ends, with a line that says why, when there was no new one for
    `timeout_seconds`.
    """
    folder = layout.checkpoints_folder(job_log_dir)
    while True:
        found = ""
        if jax.process_index() == 0:
            found = _poll(Path(job_log_dir), folder, after_step, timeout_seconds, poll_seconds, say)
        found = processes.from_first("follow", found, timeout_seconds=timeout_seconds + 600)
        if not found:
            return
        after_step = int(found)
        yield after_step


def _poll(job_log_dir, folder, after_step, timeout_seconds, poll_seconds, say) -> str:
    deadline = time.monotonic() + timeout_seconds
    waiting = False
    while True:
        # Asked in this order: the last checkpoint is complete before the run is marked as finished.
        finished = finished_step(job_log_dir)
        newest = max(layout.list_steps(folder), default=-1)
        if newest > after_step:
            return str(newest)
        if finished is not None:
            say(f"{job_log_dir} finished at step {finished}: no more checkpoints to wait for")
            return ""
        after = f" after step {after_step}" if after_step >= 0 else ""
        if time.monotonic() >= deadline:
            say(
                f"no new checkpoint{after} in {folder} for {timeout_seconds:g} s: waiting no longer"
            )
            return ""
        if not waiting:
            say(f"waiting for a new checkpoint{after} in {folder} (at most {timeout_seconds:g} s)")
            waiting = True
        time.sleep(max(0.0, min(poll_seconds, deadline - time.monotonic())))
