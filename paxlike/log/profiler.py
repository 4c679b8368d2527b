"""Captures a device trace of a few chosen steps with `jax.profiler`.

The trace lands under `<directory>/plugins/profile/`, where TensorBoard's profile plugin
finds it. A profiler that fails costs the trace, never the run.
"""

from __future__ import annotations

import os
import time
from typing import Any

import jax

from paxlike.log.run_log import RunLog


class Profiler:
    """Traces `num_steps` steps from `capture_step` on; both hooks are called at every step.

    Example:
        profiler = Profiler(directory, capture_step=10, log=log)
        for step in range(1, num_steps + 1):
            profiler.before_step(step)
            state, metrics = train_step(state, batch)
            profiler.after_step(step, metrics)
        profiler.close()
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        capture_step: int | None = None,
        num_steps: int = 2,
        *,
        log: RunLog | None = None,
    ):
        """Captures nothing when `capture_step` is None.

        Raises:
            ValueError: the first step or the number of steps is below 1.
        """
        if num_steps < 1 or (capture_step is not None and capture_step < 1):
            raise ValueError(
                f"cannot profile {num_steps} steps from step {capture_step}: steps count from 1, "
                "give capture_step >= 1 and num_steps >= 1"
            )
        self._directory, self._log = os.fspath(directory), log
        self._first = capture_step
        self._last = (capture_step or 0) + num_steps - 1
        self._is_tracing, self._was_reached, self._latest = False, False, 0
        self._started_at = 0.0

    def before_step(self, step: int) -> None:
        """Starts the trace if `step` is the chosen one."""
        if step != self._first:
            return
        self._was_reached = True
        try:
            os.makedirs(self._directory, exist_ok=True)
            jax.profiler.start_trace(self._directory)
            self._is_tracing, self._started_at = True, time.monotonic()
        except Exception as error:  # whatever it is, the run matters more
            self._warn(f"the profiler did not start at step {step}: {_first_line(error)}")

    def after_step(self, step: int, outputs: Any = None) -> None:
        """Stops the trace after the last step, once the arrays in `outputs` are computed."""
        self._latest = step
        if not self._is_tracing or step < self._last:
            return
        jax.block_until_ready(outputs)  # outside the try: an error in here is the step's own
        self._stop(step)

    def close(self) -> None:
        """Stops a trace that training ended inside of, and tells if the chosen step never came."""
        if self._is_tracing:
            self._stop(self._latest)
        elif self._first is not None and not self._was_reached:
            self._warn(
                f"nothing was profiled: step {self._first} was not among the steps of this start"
            )

    def _stop(self, step: int) -> None:
        seconds = round(time.monotonic() - self._started_at, 3)
        self._is_tracing = False
        try:
            jax.profiler.stop_trace()
        except Exception as error:  # see before_step
            self._warn(f"the profiler did not stop well at step {step}: {_first_line(error)}")
            return
        if self._log is not None:
            self._log.event(
                "profile",
                step=step,
                first_step=self._first,
                seconds=seconds,
                directory=self._directory,
            )

    def _warn(self, message: str) -> None:
        if self._log is not None:
            self._log.warning(message)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
