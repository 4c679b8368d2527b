"""Finds a run in which nothing moves any more: a collective that waits for ever, a file system that hangs.

The loop says when a step is done and what it is busy with; a thread compares the time since with what is usual.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from paxlike.cluster import failure
from paxlike.cluster.peers import Peers

_WINDOW = 32  # steps whose median is the usual time


@dataclasses.dataclass(frozen=True)
class HangOptions:
    """When a run counts as hung.

    Attributes:
      factor: times the usual seconds of a step that one may take; 0 switches the watchdog off.
      min_seconds: but at least so long.
      busy_minutes: limit of what is no step: compilation, restore, checkpoint, and the first step; in an evaluation,
        of one batch.
    """

    factor: float = 20.0
    min_seconds: float = 600.0
    busy_minutes: float = 60.0

    def check(self) -> None:
        """Raises a one-line ValueError for limits that cannot be."""
        if self.factor < 0 or self.min_seconds <= 0 or self.busy_minutes <= 0:
            raise ValueError(
                f"HANG_FACTOR={self.factor}, HANG_MIN_SECONDS={self.min_seconds} and "
                f"HANG_BUSY_MINUTES={self.busy_minutes}: the first must be at least 0 (0: no watchdog), the others "
                "above 0"
            )


class Watchdog:
    """A context around the loop; with `peers` an alarm asks all processes, alone it ends this one.

    It costs the loop a clock reading a step.
    """

    def __init__(
        self,
        options: HangOptions,
        directory: Path,
        peers: Peers | None,
        *,
        what: str = "the start",
    ):
        """`what` it is until the first step."""
        options.check()
        self._options, self._directory, self._peers = options, Path(directory), peers
        self._durations: deque[float] = deque(maxlen=_WINDOW)
        self._start = [what]
        self._busy = self._start  # what the loop is busy with, innermost last
        self._since, self._step = time.monotonic(), 0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self._options.factor:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def step(self, done: int) -> None:
        """A step is done; the first one of this start was part of the start."""
        now = time.monotonic()
        if self._busy is self._start:
            self._busy = []
        elif not self._busy:
            self._durations.append(now - self._since)
        self._since, self._step = now, done
        if self._peers is not None:
            self._peers.where(step=done, busy=bool(self._busy))

    def alive(self) -> None:
        """What the loop is busy with goes on, as an evaluation with its next batch."""
        self._since = time.monotonic()

    @contextlib.contextmanager
    def busy(self, kind: str) -> Iterator[None]:
        """The block is no step: it has a limit of its own."""
        self._busy = [*self._busy, kind]
        self._tell()
        try:
            yield
        finally:
            self._busy = self._busy[:-1]
            self._tell()

    def usual_step_seconds(self) -> float | None:
        """The median of the latest steps; None before there are three."""
        found = sorted(self._durations)
        return found[len(found) // 2] if len(found) >= 3 else None

    def limit_seconds(self) -> float:
        """How long what happens now may take."""
        if self._busy:
            return self._options.busy_minutes * 60
        usual = self.usual_step_seconds() or 0.0
        return max(self._options.min_seconds, self._options.factor * usual)

    def _tell(self) -> None:
        self._since = time.monotonic()
        if self._peers is not None:
            self._peers.where(step=self._step, busy=bool(self._busy))

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._options.min_seconds / 4)):
            waited = time.monotonic() - self._since
            if waited <= self.limit_seconds():
                continue
            patient = not self._busy and waited < self._options.busy_minutes * 60
            if patient and self._peers is not None and self._peers.someone_is_busy():
                continue  # another process is, within its own limit, at something long
            self._hung(waited)
            return

    def _hung(self, waited: float) -> None:
        doing = f"in {self._busy[-1]}" if self._busy else f"after step {self._step:,}"
        usual = self.usual_step_seconds()
        text = f"nothing has moved for {waited:.0f} s {doing}" + (
            f" (a step takes {usual:.2g} s)" if usual and not self._busy else ""
        )
        if self._peers is not None:
            self._peers.alarm("hang", text)
            return
        where = failure.processes_folder(self._directory) / failure.FAILURE_FILE
        lines = [text, f"the main thread is at {failure.main_thread_at()}", ""]
        written = failure.write_failure(self._directory, lines)
        failure.dump_stacks(where if written else None, text)
        print(f"error: {text}; stacks in {where}", file=sys.stderr, flush=True)
        failure.leave(failure.EXIT_HUNG)
