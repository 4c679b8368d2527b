"""A request to stop (SIGTERM of a scheduler, Ctrl-C), heeded at the same step on every process."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

from paxlike.checkpoint import processes

EXIT_PREEMPTED = 83
"""Exit code of a run that was asked to stop and has saved: start it again and it goes on."""


class TerminationSignal:
    """Within this context SIGTERM and SIGINT only set a flag; a second SIGINT interrupts at once.

    Enter it in the main thread, and after `jax.distributed.initialize`, which installs a SIGTERM
    handler of its own.
    """

    def __init__(self, *, every_n_steps: int = 10):
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}: it must be at least 1")
        self._every_n_steps = every_n_steps
        self._agreed = False
        self._previous: dict[int, Any] = {}
        self.received: str | None = None

    def __enter__(self) -> TerminationSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            # None: the handler was not installed from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def agreed(self, step: int) -> bool:
        """Whether all processes stop after `step`; call it once a step on each.

        One process: as soon as the signal is here. Several: they ask one another every n-th step.
        """
        if not self._agreed and (processes.alone() or step % self._every_n_steps == 0):
            self._agreed = bool(processes.share("stop", self.received))
        return self._agreed

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        # os.write, not print: a handler may run in the middle of another print.
        again = "; once more to stop at once" if number == signal.SIGINT else ""
        os.write(2, f"{self.received}: saving a checkpoint and stopping{again}\n".encode())
