"""How one tensor of another program becomes a slice of ours: `"(h k) d -> d h k"`, readable in both directions.

The notation is that of einops (Rogozhnikov 2022), with two additions. A number on our side is a fixed index of that
dimension. The letter `r` is a head that RoPE turns (Su et al. 2021): its halves lie one behind the other (`p i`), or
its pairs side by side (`i p`), and the two programs may disagree about that.

Legend: h heads, k head size, d width, f hidden, v vocabulary, n positions, c the three of query, key and value,
p the two members of a rotated pair, i the number of the pair.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence

import numpy as np

Shape = tuple[int, ...]
Index = tuple[slice, ...]
_Groups = tuple[tuple[str, ...], ...]
_PAIR = 2


@dataclasses.dataclass(frozen=True)
class Rearrangement:
    """The letters of each dimension, theirs and ours.

    Attributes:
      theirs: groups of letters, one for each dimension of the foreign tensor.
      ours: the same letters in our order; a group of one number is a fixed index.
    """

    theirs: _Groups
    ours: _Groups

    def at(self, *, lead: Sequence[int] = ()) -> tuple[int | None, ...]:
        """For each dimension of our parameter the fixed index, or None; `lead` goes in front."""
        fixed = [int(group[0]) if group[0].isdigit() else None for group in self.ours]
        return (*lead, *fixed)

    def foreign_shape(self, shape: Shape) -> Shape:
        """The shape of their tensor for our slice of `shape` (without the fixed dimensions)."""
        sizes = self._sizes(shape)
        return tuple(math.prod(sizes[letter] for letter in group) for group in self.theirs)

    def take(self, read: Callable[[Index], np.ndarray], shape: Shape, index: Index) -> np.ndarray:
        """`index` of our slice of `shape`; `read` is asked for the part of their tensor it needs.

        That part is a box, no larger than the tensor and as small as a box can be where the cut
        dimension comes first in its group.
        """
        sizes = self._sizes(shape)
        free = self._free()
        cut = {group[0]: part for group, part in zip(free, index) if len(group) == 1}
        box, local = [], dict(sizes)
        for first, *rest in self.theirs:
            part = cut.pop(first, slice(0, sizes[first]))
            stride = math.prod(sizes[letter] for letter in rest)
            box.append(slice(part.start * stride, part.stop * stride))
            local[first] = part.stop - part.start
        value = _permute(read(tuple(box)), self.theirs, free, local)
        # What could not be cut while reading is cut now.
        left = [
            part if len(group) > 1 or group[0] in cut else slice(None)
            for group, part in zip(free, index)
        ]
        return value[tuple(left)]

    def put(self, value: np.ndarray) -> np.ndarray:
        """Their tensor from our whole slice: the inverse of `take`."""
        free = self._free()
        return _permute(value, free, self.theirs, self._sizes(value.shape))

    def _free(self) -> _Groups:
        return tuple(group for group in self.ours if not group[0].isdigit())

    def _sizes(self, shape: Shape) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for group, size in zip(self._free(), shape, strict=True):
            if len(group) == 1:
                sizes[group[0]] = size
            elif size % _PAIR:
                raise ValueError(f"a head of size {size} has no pairs to rotate: it must be even")
            else:
                sizes |= {"p": _PAIR, "i": size // _PAIR}
        return sizes


def rearrangement(
    pattern: str, *, theirs_interleaved: bool = False, ours_interleaved: bool = False
) -> Rearrangement:
    """Reads `pattern`; the two flags say how the pairs of a rotated head `r` lie.

    Example:
        >>> rearrangement("(h k) d -> d h k").foreign_shape((8, 2, 4))
        (8, 8)
    """
    return _parse(pattern, theirs_interleaved, ours_interleaved)


@functools.cache
def _parse(pattern: str, theirs_interleaved: bool, ours_interleaved: bool) -> Rearrangement:
    left, right = pattern.split("->")
    theirs, ours = _groups(left), _groups(right)
    if theirs_interleaved == ours_interleaved:
        return Rearrangement(theirs, ours)
    return Rearrangement(
        _spelt(theirs, interleaved=theirs_interleaved), _spelt(ours, interleaved=ours_interleaved)
    )


def _groups(text: str) -> _Groups:
    return tuple(
        tuple((inside or single).split())
        for inside, single in re.findall(r"\(([^)]*)\)|(\S+)", text)
    )


def _spelt(groups: _Groups, *, interleaved: bool) -> _Groups:
    """`r` as the two letters that it stands for."""
    pair = ("i", "p") if interleaved else ("p", "i")
    return tuple(
        tuple(part for letter in group for part in (pair if letter == "r" else (letter,)))
        for group in groups
    )


def _permute(
    value: np.ndarray, source: _Groups, target: _Groups, sizes: dict[str, int]
) -> np.ndarray:
    """Split into letters, transposed, and joined again."""
    letters = [letter for group in source for letter in group]
    wanted = [letter for group in target for letter in group]
    value = value.reshape([sizes[letter] for letter in letters])
    value = value.transpose([letters.index(letter) for letter in wanted])
    return value.reshape([math.prod(sizes[letter] for letter in group) for group in target])
