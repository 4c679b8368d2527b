"""Watches over routers: a picture of what each expert is given, and a warning when one takes (nearly) all.

The loop's metrics hold the tables under names that `is_table` knows; everything else about experts is plain numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from paxlike.log.heat_map import MAX_COLUMNS, heat_map

TABLE = "moe/share"  # (layers, experts): share of all choices of all tokens


@dataclasses.dataclass(frozen=True)
class WatchOptions:
    """When a router counts as collapsed.

    Attributes:
      share: of the tokens of a layer that go to one expert; 0 never warns.
      summaries: how many in a row.
    """

    share: float = 0.75
    summaries: int = 5

    def __post_init__(self):
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"ROUTER_COLLAPSE_SHARE={self.share} is not in [0, 1]; 0 never warns")
        if self.summaries < 1:
            raise ValueError(f"ROUTER_COLLAPSE_SUMMARIES={self.summaries} must be at least 1")


def is_table(metric: Any) -> bool:
    """Whether the sum of a metric is a table rather than a number."""
    return np.ndim(getattr(metric, "sum", metric)) > 0


class ExpertWatch:
    """What the summaries of one run said about its experts."""

    def __init__(self, options: WatchOptions = WatchOptions()):
        self._options = options
        self._tables: list[np.ndarray] = []
        self._above: dict[tuple[int, int], int] = {}  # (layer, expert) -> summaries in a row

    def add(self, table: np.ndarray, values: Mapping[str, float]) -> list[str]:
        """Takes the table of a summary; returns warnings, one for each expert that has taken too much for long.

        An expert that goes on taking too much is told once.
        """
        self._tables.append(table)
        if len(self._tables) > 2 * MAX_COLUMNS:  # every other one of the older half is enough
            self._tables = self._tables[:MAX_COLUMNS:2] + self._tables[MAX_COLUMNS:]
        if not self._options.share:
            return []
        # The table counts choices; of the tokens, an expert has so many times as many as each token has choices.
        tokens = np.minimum(table * values.get("moe/choices", 1.0), 1.0)
        now = {(int(i), int(j)) for i, j in np.argwhere(tokens > self._options.share)}
        self._above = {place: self._above.get(place, 0) + 1 for place in now}
        return [
            f"the router of layer {layer} of experts sends {tokens[layer, expert]:.0%} of the tokens to expert "
            f"{expert}, for {count} summaries now: it may have collapsed (LOAD_BALANCING_WEIGHT, LEARNING_RATE)"
            for (layer, expert), count in sorted(self._above.items())
            if count == self._options.summaries
        ]

    def picture(self) -> bytes:
        """A PNG of all summaries; four times an even share is the brightest colour."""
        return heat_map(self._tables, largest=4.0 / self._tables[-1].shape[-1])
