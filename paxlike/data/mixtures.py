"""The order of rows: a pure function from a row's number in training to a row of a data set.

Each data set is shuffled on its own, anew in each of its epochs, and repeats for ever. A mixture
interleaves them so that after n rows every data set has given its share of n to within one row.
Grain holds the arithmetic, all of it random access: no state, and step 10**6 is as near as step 0.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from paxlike.data.packing import Batch, Rows

_ROW_BITS = 40
_FEW_ROWS = 4096


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Sources in proportion to `weights`, counted in rows.

    Weights are rounded to a hundredth of the smallest. `seeds` gives each source an order of its
    own; by default they follow from the loader's seed and the place in the list.
    """

    sources: Sequence[Any]
    weights: Sequence[float]
    seeds: Sequence[int] | None = None

    def __post_init__(self):
        lengths = {len(self.sources), len(self.weights), len(self.seeds or self.sources)}
        if lengths != {len(self.sources)} or not self.sources:
            raise ValueError(
                "a mixture needs a weight (and a seed, or no seeds) for each source: "
                f"{len(self.sources)} sources, {len(self.weights)} weights, seeds={self.seeds}"
            )
        if min(self.weights) <= 0:
            raise ValueError(
                f"mixture weights must be above 0: {tuple(self.weights)}; drop the source"
            )
        if any(isinstance(source, Mixture) for source in self.sources):
            raise ValueError(
                "a mixture of mixtures: list all sources, with their weights multiplied"
            )


@dataclasses.dataclass(frozen=True)
class MixedRows:
    """Rows of several data sets, numbered by (data set, row).

    `fills` are values of arrays that only some of the data sets have.
    """

    parts: Sequence[Rows]
    fills: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def gather(self, where: Int[np.ndarray, "b 2"]) -> Batch:
        """The rows `where` names, in its order."""
        batch: Batch = {}
        for number, rows in enumerate(self.parts):
            mine = np.flatnonzero(where[:, 0] == number)
            if len(mine) == len(where):
                return rows.gather(where[:, 1])
            if len(mine):
                for key, value in rows.gather(where[mine, 1]).items():
                    if key not in batch:
                        shape = (len(where), *value.shape[1:])
                        batch[key] = np.full(shape, self.fills.get(key, 0), value.dtype)
                    batch[key][mine] = value
        return batch

    def in_sequence(self, indices: Int[np.ndarray, "b"]) -> Int[np.ndarray, "b 2"]:
        """(data set, row) of rows counted through all data sets, one after the other."""
        offsets = np.cumsum([0] + [len(rows) for rows in self.parts])
        part = np.searchsorted(offsets, indices, side="right") - 1
        return np.stack([part, np.asarray(indices) - offsets[part]], axis=1)


def training_order(
    lengths: Sequence[int],
    *,
    weights: Sequence[float] | None = None,
    seeds: Sequence[int],
    shuffle: bool,
) -> Callable[[Int[np.ndarray, "b"]], Int[np.ndarray, "b 2"]]:
    """A function from numbers of rows in training, from 0 without end, to (data set, row)."""
    parts = []
    for number, (length, seed) in enumerate(zip(lengths, seeds, strict=True)):
        # An element says which data set it is of, so that rows of one are gathered together.
        base = number << _ROW_BITS
        if shuffle and length < _FEW_ROWS:
            parts.append(grain.MapDataset.source(_ShuffledEpochs(base, length, _spread(seed))))
            continue
        part = grain.MapDataset.range(base, base + length)
        parts.append((part.shuffle(seed=_spread(seed)) if shuffle else part).repeat())
    order = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights)

    def where(indices: Int[np.ndarray, "b"]) -> Int[np.ndarray, "b 2"]:
        elements = np.array([order[i] for i in indices.tolist()], np.int64)
        return np.stack([elements >> _ROW_BITS, elements & ((1 << _ROW_BITS) - 1)], axis=1)

    return where


def component_seed(seed: int, number: int) -> int:
    """The default seed of a component of a mixture."""
    return seed if number == 0 else _spread(f"{seed}/{number}")


class _ShuffledEpochs:
    """A Grain source of rows in a new order in each epoch, for data sets of few rows.

    Grain's own shuffle walks through a domain of 2**16 to find one row, which takes milliseconds
    where there are ten rows; for many it needs no memory, and is used.
    """

    def __init__(self, base: int, length: int, seed: int):
        self._base, self._length, self._seed = base, length, seed
        self._permutation = functools.lru_cache(maxsize=4)(self._new_permutation)

    def __len__(self) -> int:
        return self._length << 40  # epochs without end

    def __getitem__(self, index: int) -> int:
        epoch, index = divmod(index, self._length)
        return self._base + self._permutation(epoch)[index]

    def _new_permutation(self, epoch: int) -> list[int]:
        return np.random.default_rng((self._seed, epoch)).permutation(self._length).tolist()


def _spread(seed: int | str) -> int:
    """32 bits of a hash: Grain shuffles epoch e by seed + e, so close seeds would share orders."""
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big")
