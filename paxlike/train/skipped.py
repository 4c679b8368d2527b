"""Steps that were skipped because their gradient was not finite, or too large: warned of, and not for ever."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paxlike.log.run_log import RunLog


class SkippedSteps:
    """Looks at finished steps in their order.

    Attributes:
      in_a_row: how many of the latest steps were skipped.
    """

    def __init__(self, total: int, limit: int | None, log: RunLog):
        """`total` have been skipped before; `limit` in a row end the run, None for never."""
        self.in_a_row = 0
        self._total, self._limit, self._log = total, limit, log

    def look(self, step: int, metrics: Mapping[str, Any], newest: int | None) -> None:
        """Warns of a skipped step; `newest` is the last checkpoint before it.

        Raises ValueError at the last of `limit` in a row.
        """
        total = int(metrics["skipped_steps"])
        if total <= self._total:
            self.in_a_row = 0
            return
        self._total = total
        self.in_a_row += 1
        norm = float(metrics["grad_norm"])
        self._log.warning(
            f"step {step:,} was skipped: its gradient norm is {norm}", step=step, skipped=total
        )
        if self.in_a_row == self._limit:
            there = "no checkpoint" if newest is None else f"the checkpoint of step {newest:,}"
            raise ValueError(
                f"step {step:,} is the last of {self.in_a_row:,} that were skipped, one after the other: nothing is "
                f"learned any more. There is {there}; lower LEARNING_RATE, or see --mode=replay; "
                "MAX_SKIPPED_STEPS=None never gives up"
            )
