"""What a process knows of the job that it is in: when it began, when it must end, who else is there."""

from __future__ import annotations

import dataclasses
import time

from paxlike.cluster.peers import Peers
from paxlike.cluster.watchdog import HangOptions

_ASSUMED_SAVE_SECONDS = 60.0  # before one was measured
_SPARE_SECONDS = 10.0
_SPARE_FACTOR = 1.5


@dataclasses.dataclass(frozen=True)
class Job:
    """One start of the program.

    Attributes:
      began: when the process was started, in Unix seconds; None counts from the training's own start.
      ends: when the scheduler ends it, in Unix seconds; None where nobody says.
      peers: the watch over the other processes; None in a run of one.
    """

    began: float | None = None
    ends: float | None = None
    peers: Peers | None = None


@dataclasses.dataclass(frozen=True)
class ClusterOptions:
    """How a run survives.

    Attributes:
      time_limit_minutes: after which a start saves and stops; None for the scheduler's limit alone.
      startup_check: whether processes compare themselves before the first step.
      hang: when a run counts as hung.
    """

    time_limit_minutes: float | None = None
    startup_check: bool = True
    hang: HangOptions = HangOptions()

    def check(self) -> None:
        """Raises a one-line ValueError for what cannot be."""
        if self.time_limit_minutes is not None and self.time_limit_minutes <= 0:
            raise ValueError(f"TIME_LIMIT={self.time_limit_minutes} minutes must be above 0")
        self.hang.check()


class Deadline:
    """When to stop so that what must be saved is saved in time, from what was measured so far.

    Example:
        >>> deadline = Deadline(ends=1000.0, began=0.0)
        >>> deadline.took("checkpoint", 40.0)
        >>> deadline.is_near(step_seconds=10.0, now=914.0), deadline.is_near(step_seconds=10.0, now=916.0)
        (False, True)
    """

    def __init__(self, *, ends: float | None, began: float):
        self.ends = ends
        self._assumed = _ASSUMED_SAVE_SECONDS if ends is None else 0.1 * max(ends - began, 0.0)
        self._longest: dict[str, float] = {}

    @classmethod
    def of(cls, options: ClusterOptions, job: Job, began: float) -> Deadline:
        """The earlier one of the knob's and the scheduler's."""
        limits = [] if job.ends is None else [job.ends]
        if options.time_limit_minutes is not None:
            limits.append(began + 60 * options.time_limit_minutes)
        return cls(ends=min(limits, default=None), began=began)

    def took(self, kind: str, seconds: float) -> None:
        """A `checkpoint` or an `evaluation` took so long."""
        self._longest[kind] = max(seconds, self._longest.get(kind, 0.0))

    def margin_seconds(self, *, step_seconds: float, before: str | None = None) -> float:
        """Seconds to keep for the steps until all have agreed and a save, and for what comes `before` that."""
        save = self._longest.get("checkpoint", min(self._assumed, _ASSUMED_SAVE_SECONDS))
        ahead = self._longest.get(before, 0.0) if before else 0.0
        spare = min(_SPARE_SECONDS, self._assumed)
        return _SPARE_FACTOR * (save + step_seconds + ahead) + spare

    def is_near(
        self, *, step_seconds: float, before: str | None = None, now: float | None = None
    ) -> bool:
        """Whether to stop now; `step_seconds` is the time until this is asked again."""
        if self.ends is None:
            return False
        left = self.ends - (time.time() if now is None else now)
        return left <= self.margin_seconds(step_seconds=step_seconds, before=before)
