"""Bounds of knobs, written beside their meaning: `Annotated[int, "transformer blocks", AtLeast(1)]`.

They hold for every number of a value: each entry of a tuple, each value of a dictionary. None and words have none. What
is not finite is refused, bounds or not: no knob has a use for it.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Bound:
    """What a number is compared with.

    Attributes:
      words: as in `must be at least 1`.
      accepts: whether a number is within the bound.
    """

    words: str
    accepts: Callable[[float], bool]


def AtLeast(limit: float) -> Bound:
    """The limit or more."""
    return Bound(f"at least {limit}", lambda number: number >= limit)


def Above(limit: float) -> Bound:
    """More than the limit."""
    return Bound(f"above {limit}", lambda number: number > limit)


def Below(limit: float) -> Bound:
    """Less than the limit."""
    return Bound(f"below {limit}", lambda number: number < limit)


def AtMost(limit: float) -> Bound:
    """The limit or less."""
    return Bound(f"at most {limit}", lambda number: number <= limit)


def complaint(value: Any, bounds: Sequence[Bound]) -> str:
    """What is wrong with a value, as `must be at least 1`; empty where nothing is.

    >>> complaint((2, 0), [AtLeast(1)]), complaint(None, [AtLeast(1)]), complaint(float("nan"), [])
    ('must be at least 1', '', 'must be a finite number')
    """
    for number in _numbers(value):
        if isinstance(number, float) and not math.isfinite(number):
            return "must be a finite number"
        if not all(bound.accepts(number) for bound in bounds):
            return f"must be {' and '.join(bound.words for bound in bounds)}"
    return ""


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value
