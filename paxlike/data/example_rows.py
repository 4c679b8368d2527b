"""Rows of examples that are ids with a mask: one example a row, or several, none of them divided.

Packed, the examples of a row are chosen by best fit, longest first: each goes into the row with the
least room that still takes it. That wastes a few per cent at most where short examples abound.
(Johnson et al., 1974, https://doi.org/10.1137/0203025.)
"""

import bisect
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Int

from paxlike.data.packing import WHOLE_ANSWER, Batch, Packing


class ExampleRows:
    """Rows of `seq_len` targets.

    An example of n ids takes n - 1 positions: each id is predicted from those before it. It may have
    at most `seq_len + 1`. `order_seed` decides which examples share a row.
    """

    def __init__(
        self,
        examples: Iterable[tuple[Sequence[int], Sequence[bool]]],
        *,
        seq_len: int,
        packing: Packing,
        pad_id: int,
        order_seed: int = 0,
    ):
        """`examples` are ids, and for each whether it is scored."""
        self._seq_len, self._pad_id, self._packed = seq_len, pad_id, packing == "packed"
        ids, masks, lengths = [], [], []
        for example, mask in examples:
            ids.append(np.asarray(example, np.int32))
            masks.append(np.asarray(mask, bool))
            lengths.append(len(example))
        self._ids = np.concatenate(ids) if ids else np.zeros(0, np.int32)
        self._scored = np.concatenate(masks) if masks else np.zeros(0, bool)
        self._offsets = np.cumsum([0, *lengths])
        taken = np.array(lengths, np.int64) - 1
        self._groups = (
            pack(taken, seq_len, order_seed) if self._packed else [[i] for i in range(len(lengths))]
        )

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def fill(self) -> float:
        """Share of positions that are not padding."""
        used = len(self._ids) - (len(self._offsets) - 1)
        return used / max(len(self._groups) * self._seq_len, 1)

    def digest(self) -> str:
        """A short string that is equal for equal rows, wherever their data lies."""
        facts = hashlib.sha256()
        for array in (self._ids, np.packbits(self._scored), self._offsets):
            facts.update(np.ascontiguousarray(array).data)
        facts.update(repr(self._groups).encode())
        return facts.hexdigest()[:16]

    def gather(self, indices: Int[np.ndarray, "b"]) -> Batch:
        shape = (len(indices), self._seq_len)
        tokens = np.full(shape, self._pad_id, np.int32)
        targets = np.full(shape, self._pad_id, np.int32)
        weights = np.zeros(shape, np.float32)
        segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for row, index in enumerate(np.asarray(indices).tolist()):
            at = 0
            for segment, number in enumerate(self._groups[index], 1):
                ids, scored = self._example(number)
                here = np.s_[row, at : at + len(ids) - 1]
                tokens[here], targets[here], weights[here] = ids[:-1], ids[1:], scored[1:]
                segments[here], positions[here] = segment, np.arange(len(ids) - 1)
                at += len(ids) - 1
        batch = {"tokens": tokens, "targets": targets, "weights": weights}
        if self._packed:
            return batch | {"segments": segments, "positions": positions}
        return batch | {WHOLE_ANSWER.name: np.ones(len(indices), np.float32)}

    def _example(self, number: int) -> tuple[Int[np.ndarray, "n"], Bool[np.ndarray, "n"]]:
        here = slice(self._offsets[number], self._offsets[number + 1])
        return self._ids[here], self._scored[here]


def pack(lengths: Int[np.ndarray, "n"], capacity: int, seed: int = 0) -> list[list[int]]:
    """Groups of items whose lengths add up to at most `capacity`, a pure function of the arguments.

    >>> pack(np.array([2, 7, 3, 5]), 10)
    [[1, 2], [3, 0]]
    """
    order = np.random.default_rng(seed).permutation(len(lengths))
    order = order[np.argsort(-np.asarray(lengths)[order], kind="stable")]
    groups: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> groups with it
    rooms: list[int] = []  # the keys of by_room, sorted
    for item in order.tolist():
        length = int(lengths[item])
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            room, group = capacity, len(groups)
            groups.append([])
        else:
            room = rooms[at]
            group = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        groups[group].append(item)
        room -= length
        if room not in by_room:
            by_room[room] = []
            bisect.insort(rooms, room)
        by_room[room].append(group)
    return groups
