"""What has been counted since the last summary: merged metrics, time, tokens and FLOPs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from paxlike.log.metric import Metric

# Steps whose metrics wait as device scalars before they are added up: bounds their number when the
# summary interval is long, while one fetch for many steps costs the loop next to nothing.
_MAX_PENDING_STEPS = 64


@dataclasses.dataclass
class Interval:
    """The steps between two summaries.

    The clock starts with the end of the first step of a process: that step holds the compilation.

    Attributes:
        start: when the clock started (`time.monotonic`); None before the first step.
        paused: seconds that were no step time, by kind of pause.
        recent_speed: the rates of the interval before, to show until this one has its own.
        last_step: the last step that was added.
    """

    start: float | None = None
    paused: dict[str, float] = dataclasses.field(default_factory=dict)
    recent_speed: dict[str, float] = dataclasses.field(default_factory=dict)
    last_step: int = 0
    _latest: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    _pending: list[dict[str, Metric]] = dataclasses.field(default_factory=list)
    _merged: dict[str, Metric] = dataclasses.field(default_factory=dict)
    _num_steps: int = 0
    _data_wait: float = 0.0
    _tokens: int = 0
    _flops: float = 0

    def is_empty(self) -> bool:
        """Whether no step was added."""
        return not self._latest

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds the metrics of a step, which may still be on the device."""
        self.last_step, self._latest = step, metrics
        # Of a plain number only the last is written: the earlier ones are never fetched.
        self._pending.append({n: m for n, m in metrics.items() if isinstance(m, Metric)})
        if len(self._pending) >= _MAX_PENDING_STEPS:
            self._merge_pending()

    def count(self, data_wait: float, tokens: int, flops: float) -> None:
        """Counts a step, or starts the clock."""
        if self.start is None:
            self.start = time.monotonic()
            self.paused.clear()
            return
        self._num_steps += 1
        self._data_wait += data_wait
        self._tokens += tokens
        self._flops += flops

    def merged(self) -> dict[str, Any]:
        """The sum of each `Metric` and the last of each number; waits for the device."""
        self._merge_pending()
        return {**self._latest, **self._merged}  # in the caller's order

    def _merge_pending(self) -> None:
        for metrics in jax.device_get(self._pending):
            for name, metric in metrics.items():
                # Python floats: float32 sums over many steps would lose digits.
                metric = Metric(_wide(metric.sum), float(metric.weight))
                kept = self._merged.get(name)
                # A step whose loss is not finite was skipped: it must not hide those around it.
                if kept is None or not np.all(np.isfinite(kept.sum)):
                    self._merged[name] = metric
                elif np.all(np.isfinite(metric.sum)):
                    self._merged[name] = kept + metric
        self._pending = []

    def speed(self, num_devices: int, peak: float | None) -> dict[str, float]:
        """The rates of the interval; empty when no step was timed."""
        if self.start is None or not self._num_steps:
            return {}
        seconds = time.monotonic() - self.start - sum(self.paused.values())
        seconds = max(seconds, 1e-9)
        rates = {
            "step_time": seconds / self._num_steps,
            "steps_per_second": self._num_steps / seconds,
            "data_wait_share": min(self._data_wait / seconds, 1.0),
        }
        if self._tokens:
            rates["tokens_per_second"] = self._tokens / seconds
        if self._flops:
            flops_per_second = self._flops / seconds / num_devices
            rates["tflops_per_second"] = flops_per_second / 1e12
            if peak:
                rates["mfu"] = flops_per_second / peak
        return rates


def _wide(value: Any) -> Any:
    """A Python float, or an array of them."""
    return np.asarray(value, np.float64) if np.ndim(value) else float(value)


def numbers(metrics: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """The value of each metric, and the weight of each that is a `Metric`."""
    host = jax.device_get(dict(metrics))
    weights = {n: float(host[n].weight) for n in metrics if isinstance(host[n], Metric)}
    values = {n: host[n].value() if n in weights else float(host[n]) for n in metrics}
    return values, weights
