"""A metric is a sum and a weight; the division happens once, when the number is written.

Adding sums and weights separately makes every average exact: over the examples of a batch, over
microbatches, over devices and processes, over the steps between two summaries, and over an
evaluation whose last batch is partly padding. A mean of means is wrong as soon as weights differ.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metric:
    """A weighted sum and its total weight: scalar arrays inside `jit`, anything float-like outside.

    Example:
        >>> (Metric(6.0, 2.0) + Metric(1.0, 2.0)).value()
        1.75
    """

    sum: Any
    weight: Any

    @classmethod
    def of(cls, value: Any, weight: Any = 1.0) -> Metric:
        """The metric whose value is `value` and which counts `weight` times when it is merged."""
        return cls(sum=value * weight, weight=weight)

    def __add__(self, other: Metric) -> Metric:
        if not isinstance(other, Metric):
            return NotImplemented
        return Metric(self.sum + other.sum, self.weight + other.weight)

    def value(self) -> float:
        """`sum / weight` as a Python float; nan where the weight is 0. Waits for the device."""
        weight = float(self.weight)
        return float(self.sum) / weight if weight != 0.0 else float("nan")
