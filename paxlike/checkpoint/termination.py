"""A request to stop (a signal of a scheduler, Ctrl-C, a time limit), heeded at the same step on every process."""

from __future__ import annotations

import json
import os
import signal
import time
from types import FrameType
from typing import Any

from paxlike.cluster import processes

EXIT_PREEMPTED = 83
"""Exit code of a run that was asked to stop and has saved: start it again and it goes on."""


_ASK_EVERY_SECONDS = 5.0


class TerminationSignal:
    """Within this context SIGTERM, SIGUSR1 and SIGINT only set a flag; a second SIGINT interrupts at once.

    SIGUSR1 is what Slurm sends some time before the end (`--signal=USR1@120`).

    Enter it in the main thread, and after `jax.distributed.initialize`, which installs a SIGTERM
    handler of its own.
    """

    def __init__(self, *, every_n_steps: int = 10):
        """`every_n_steps`: several processes ask one another at least so often, and more often where steps are slow."""
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}: it must be at least 1")
        self._every_n_steps = every_n_steps
        self._agreed = False
        self._calls, self._next_asked = 0, 1
        self._asked: tuple[int, float] | None = None  # the call at which they last asked, and when
        self.steps_between = 1
        self._previous: dict[int, Any] = {}
        self.received: str | None = None

    def __enter__(self) -> TerminationSignal:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            # None: the handler was not installed from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def request(self, reason: str) -> None:
        """Asks to stop for another reason than a signal."""
        if self.received is None:
            self.received = reason
            os.write(2, f"{reason}: saving a checkpoint and stopping\n".encode())

    def agreed(self, *, ask: bool = False) -> bool:
        """Whether all processes stop now; each calls it equally often: once a step, say.

        One process: as soon as the request is here. Several: they ask one another at the first call, and then every
        few calls, which `ask` does at once.
        """
        if self._agreed or processes.alone():
            self._agreed = self._agreed or self.received is not None
            return self._agreed
        self._calls += 1
        if ask or self._calls >= self._next_asked:
            offers = processes.share("stop", json.dumps([self.received, self._pace()]))
            reasons = [json.loads(text)[0] for text in offers]
            self._agreed = any(reasons)
            self.received = self.received or next(filter(None, reasons), None)
            self.steps_between = json.loads(offers[0])[1]  # what process 0 measured, for all
            self._next_asked = self._calls + self.steps_between
        return self._agreed

    def _pace(self) -> int:
        """Calls until they ask again: a few seconds' worth."""
        now, before = time.monotonic(), self._asked
        self._asked = (self._calls, now)
        if before is None or before[0] == self._calls:
            return 1
        seconds = (now - before[1]) / (self._calls - before[0])
        return max(1, min(self._every_n_steps, int(_ASK_EVERY_SECONDS / max(seconds, 1e-3))))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        # os.write, not print: a handler may run in the middle of another print.
        again = "; once more to stop at once" if number == signal.SIGINT else ""
        os.write(2, f"{self.received}: saving a checkpoint and stopping{again}\n".encode())
