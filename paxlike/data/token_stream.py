"""The tokens of a finished cache, mapped into memory.

The cache is a folder of shards, each a pair of .npy files: the ids of documents that follow each
other, and the offset at which each document ends. Any stretch of the stream is a slice of one or a
few of them.
"""

import bisect
import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int

FINISHED = "cache.json"  # its presence says that the cache is whole
_HEADER_BYTES = 128  # of .npy files of one axis
_OPEN_SHARDS = 160  # two files each; the usual limit of a process is 1024


@dataclasses.dataclass(frozen=True)
class TokenStream:
    """The tokens of a finished cache, from document `first` up to document `last`.

    Positions count from the first token of document `first`.
    """

    folder: str
    shards: tuple[tuple[int, int], ...]  # (tokens, documents) of each shard
    digest: str
    first: int
    last: int

    @classmethod
    def open(cls, folder: str, *, documents: tuple[float, float] = (0.0, 1.0)) -> "TokenStream":
        """Opens a finished cache; `documents` (low, high) keeps that fraction of the documents.

        Raises ValueError where the cache is damaged, FileNotFoundError where it is not finished.
        """
        if found := damage(folder):
            raise damaged(folder, found)
        facts = _read_facts(folder)
        shards = tuple((tokens, count) for tokens, count in facts["shards"])
        total = sum(count for _, count in shards)
        first, last = (round(fraction * total) for fraction in documents)
        if first >= last:
            raise ValueError(
                f"documents={documents} keeps none of the {total} documents in {folder}: widen it"
            )
        return cls(folder, shards, facts["digest"], first, last)

    @property
    def num_documents(self) -> int:
        return self.last - self.first

    @functools.cached_property
    def num_tokens(self) -> int:
        return self._end_of(self.last) - self._origin

    def tokens(self, start: int, stop: int) -> Int[np.ndarray, "n"]:
        """Ids at positions `start` to `stop`, as int32."""
        pieces = [
            self._arrays(shard)[0][low:high]
            for shard, low, high in self._pieces(start + self._origin, stop + self._origin)
        ]
        joined = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        return joined.astype(np.int32)

    def document(self, index: int) -> tuple[int, int]:
        """Positions of the first token of a document and of the one after its last."""
        index += self.first
        return self._end_of(index) - self._origin, self._end_of(index + 1) - self._origin

    def document_starts(self, start: int, stop: int) -> Int[np.ndarray, "n"]:
        """Positions in `start` to `stop` at which a document begins."""
        starts = []
        for shard, low, high in self._pieces(start + self._origin, stop + self._origin):
            ends = self._arrays(shard)[1]
            offset = self._token_offsets[shard] - self._origin
            if low == 0:
                starts.append(np.array([offset]))
            # A document begins where the one before it ends; the last end belongs to the next
            # shard.
            begin = ends.searchsorted(max(low, 1))
            starts.append(ends[begin : begin + ends[begin:].searchsorted(high)] + offset)
        return starts[0] if len(starts) == 1 else np.concatenate(starts)

    @functools.cached_property
    def _token_offsets(self) -> list[int]:
        return list(itertools.accumulate((tokens for tokens, _ in self.shards), initial=0))

    @functools.cached_property
    def _document_offsets(self) -> list[int]:
        return list(itertools.accumulate((documents for _, documents in self.shards), initial=0))

    @functools.cached_property
    def _origin(self) -> int:
        return self._end_of(self.first)

    @functools.cached_property
    def _arrays(self):
        return functools.lru_cache(maxsize=_OPEN_SHARDS)(self._open)

    def _open(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        path = shard_path(self.folder, shard)
        names = f"{path}.tokens.npy", f"{path}.ends.npy"
        # As plain arrays over the mapped files: slicing np.memmap costs several times more.
        try:
            tokens, ends = (np.asarray(np.load(name, mmap_mode="r")) for name in names)
        except (OSError, ValueError, EOFError) as error:
            raise damaged(self.folder, " ".join(str(error).split())) from error
        return tokens, ends

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard, low, high) of the pieces of shards that hold positions `start` to `stop`."""
        offsets = self._token_offsets
        shard = bisect.bisect_right(offsets, start) - 1
        while start < stop:
            high = min(stop, offsets[shard + 1])
            if high > start:
                yield shard, start - offsets[shard], high - offsets[shard]
            start, shard = high, shard + 1

    def _end_of(self, count: int) -> int:
        """Position, in the whole cache, after the first `count` documents."""
        if count == 0:
            return 0
        shard = bisect.bisect_right(self._document_offsets, count - 1) - 1
        within = count - 1 - self._document_offsets[shard]
        return int(self._arrays(shard)[1][within]) + self._token_offsets[shard]


def shard_path(folder: str, index: int) -> str:
    return os.path.join(folder, f"shard_{index:05d}")


def damage(folder: str) -> str | None:
    """What is wrong with a finished cache, by the sizes of its files; None: nothing seen.

    Raises FileNotFoundError where it is not finished.
    """
    try:
        facts = _read_facts(folder)
        dtype = np.dtype(facts["dtype"])
        shards = [(int(tokens), int(documents)) for tokens, documents in facts["shards"]]
        facts["digest"]
    except (ValueError, TypeError, KeyError) as error:
        return f"{FINISHED}: {type(error).__name__}: {error}"
    found = (shard_damage(folder, i, *sizes, dtype) for i, sizes in enumerate(shards))
    return next(filter(None, found), None)


def shard_damage(
    folder: str, index: int, tokens: int, documents: int, dtype: np.dtype
) -> str | None:
    """What is wrong with the files of a shard of so many tokens and documents; None: nothing."""
    path = shard_path(folder, index)
    wanted = {
        f"{path}.tokens.npy": _HEADER_BYTES + tokens * dtype.itemsize,
        f"{path}.ends.npy": _HEADER_BYTES + documents * 8,
    }
    for name, size in wanted.items():
        try:
            there = os.path.getsize(name)
        except FileNotFoundError:
            return f"{os.path.basename(name)} is gone"
        if there != size:
            return f"{os.path.basename(name)} has {there} bytes of {size}"
    return None


def damaged(folder: str, found: str) -> ValueError:
    return ValueError(f"the token cache {folder} is damaged ({found}): delete it")


def _read_facts(folder: str) -> dict[str, Any]:
    with open(os.path.join(folder, FINISHED)) as file:
        return json.load(file)
