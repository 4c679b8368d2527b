"""Knobs of long runs and of several processes."""

from typing import Annotated, Any

import fiddle as fdl

from configs.bounds import Above, AtLeast
from configs.knobs import Knobs
from paxlike.cluster import ClusterOptions, HangOptions


class ClusterKnobs(Knobs):
    """Long runs and several processes."""

    TIME_LIMIT: Annotated[
        float | None,
        "minutes after which a start saves and stops; None: the scheduler's limit",
        Above(0),
    ] = None
    STARTUP_CHECK: Annotated[
        bool, "several processes compare versions, devices, clocks and collectives at the start"
    ] = True
    HANG_FACTOR: Annotated[
        float, "a step that takes so many times its usual time hangs, 0: no watchdog", AtLeast(0)
    ] = 20.0
    HANG_MIN_SECONDS: Annotated[float, "seconds that any step may take", Above(0)] = 600.0
    HANG_BUSY_MINUTES: Annotated[
        float,
        "minutes that compilation, restore, checkpoint or a batch of evaluation may take",
        Above(0),
    ] = 60.0

    def cluster(self) -> fdl.Config[Any]:
        """How a run survives."""
        return fdl.Config(
            ClusterOptions,
            time_limit_minutes=self.TIME_LIMIT,
            startup_check=self.STARTUP_CHECK,
            hang=fdl.Config(
                HangOptions,
                factor=self.HANG_FACTOR,
                min_seconds=self.HANG_MIN_SECONDS,
                busy_minutes=self.HANG_BUSY_MINUTES,
            ),
        )
