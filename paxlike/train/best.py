"""The best evaluation of a run so far: which checkpoint to keep, and when to stop because nothing gets better."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax

from paxlike.log.metric import Metric

FILE = "best.json"


@dataclasses.dataclass(frozen=True)
class BestOptions:
    """What is best.

    Attributes:
      metric: `<held-out set>/<metric>`, as `BoolQ/boolq_acc`; None keeps no best.
      mode: `max` or `min`.
      patience: stop after this many evaluations in a row without a better one, 0 for never.
    """

    metric: str | None = None
    mode: str = "min"
    patience: int = 0

    def check(self, sets: list[str], *, evaluates: bool) -> None:
        """Raises a one-line ValueError where this cannot work."""
        if self.mode not in ("min", "max"):
            raise ValueError(f"BEST_MODE='{self.mode}' is none of min, max")
        if self.patience < 0:
            raise ValueError(f"EARLY_STOPPING_PATIENCE={self.patience} must be 0 (off) or more")
        if self.metric is None:
            if self.patience:
                raise ValueError(
                    f"EARLY_STOPPING_PATIENCE={self.patience} needs BEST_METRIC, the measure to watch"
                )
            return
        if not evaluates:
            raise ValueError(
                f"BEST_METRIC='{self.metric}' needs evaluation while training: EVAL_ON_TEST=True"
            )
        split, slash, name = self.metric.partition("/")
        if not slash or not name or split not in sets:
            raise ValueError(
                f"BEST_METRIC='{self.metric}' must be one of {', '.join(f'{each}/<metric>' for each in sets)}"
            )

    def check_metric(self, metrics: Mapping[str, Collection[str]]) -> None:
        """Raises a one-line ValueError where the set has no such metric; `metrics` are the names by set."""
        split, _, name = str(self.metric).partition("/")
        if self.metric is not None and name not in metrics[split]:
            raise ValueError(
                f"BEST_METRIC='{self.metric}': {split} has {', '.join(sorted(metrics[split]))}"
            )


class Best:
    """The history of one measure, in `best.json` of the job_log_dir; the same on all processes."""

    def __init__(self, directory: Path, options: BestOptions, *, step: int):
        """`step` is where this start begins: what was evaluated after it is forgotten."""
        self._path, self._options = directory / FILE, options
        self._history: dict[int, float] = {}
        if options.metric is not None and self._path.is_file():
            saved = json.loads(self._path.read_text())
            if saved["metric"] == options.metric and saved["mode"] == options.mode:
                history = {int(each): value for each, value in saved["history"].items()}
                self._history = {each: value for each, value in history.items() if each <= step}

    @property
    def step(self) -> int | None:
        """The step of the best evaluation; the first one where several are equal."""
        best = max if self._options.mode == "max" else min
        known = {step: value for step, value in self._history.items() if not math.isnan(value)}
        return next(
            iter(sorted(known, key=lambda each: (known[each] != best(known.values()), each))), None
        )

    @property
    def value(self) -> float | None:
        """Its value."""
        return None if self.step is None else self._history[self.step]

    def add(self, step: int, results: Mapping[str, Mapping[str, Metric]]) -> bool:
        """Takes the evaluations of `step`, by set and metric; whether they are the best so far.

        Raises:
          ValueError: the set has no such metric.
        """
        self._options.check_metric(results)
        split, _, name = str(self._options.metric).partition("/")
        self._history[step] = results[split][name].value()
        return self.step == step

    @property
    def exhausted(self) -> bool:
        """Whether as many evaluations as patience allows have come since the best."""
        since = sum(step > (self.step or 0) for step in self._history)
        return bool(self._options.patience) and since >= self._options.patience

    def write(self) -> None:
        """Before the checkpoint of this step: a start from an older one forgets what came after."""
        if jax.process_index() != 0:
            return
        about: dict[str, Any] = {"metric": self._options.metric, "mode": self._options.mode}
        about |= {"step": self.step, "value": self.value, "history": self._history}
        temporary = self._path.with_name(f".{FILE}.tmp")
        temporary.write_text(json.dumps(about, indent=1) + "\n")
        os.replace(temporary, self._path)
