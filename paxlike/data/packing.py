"""Rows of a batch from the stream of tokens.

The stream is every document after the other, each ended by eos. A target is an id of the stream;
the input beside it is the id before it, or bos where a document begins. Three ways to cut rows of
`seq_len` targets:

* packed: windows of the stream; `segments` and `positions` keep documents apart in attention.
* concatenated: the same windows without them, as Pax: attention runs across documents.
* documents: one document per row, cut at `seq_len` or padded with weight 0.

A row is a function of its number alone, made with a few vectorised numpy operations from
memory-mapped tokens: reading row 10**9 costs the same as reading row 0.
"""

import dataclasses
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Int

from paxlike.data.token_stream import TokenStream

Batch = dict[str, np.ndarray]
Packing = Literal["packed", "concatenated", "documents"]
PACKINGS = ("packed", "concatenated", "documents")


@dataclasses.dataclass(frozen=True)
class Column:
    """An array that rows of some sources have in evaluation beside the usual ones.

    `fill` stands where a row has nothing to say: rows of other sources, and those that fill a batch.
    """

    name: str
    dtype: type
    per_token: bool
    fill: float


# 1 for rows whose scored tokens are one answer, that is right if all of them are (`acc_strict`).
WHOLE_ANSWER = Column("whole_answer", np.float32, per_token=False, fill=0)
# The id that a target is compared with, where there are two answers to choose from (`boolq_acc`).
ALTERNATIVES = Column("alternatives", np.int32, per_token=True, fill=-1)


class Rows(Protocol):
    """A finite list of rows."""

    def __len__(self) -> int: ...

    def gather(self, indices: Int[np.ndarray, "b"]) -> Batch:
        """The rows of these numbers, as arrays (b, s)."""


@dataclasses.dataclass(frozen=True)
class StreamRows:
    """Rows of a token stream."""

    stream: TokenStream
    seq_len: int
    packing: Packing
    bos_id: int
    pad_id: int

    def __len__(self) -> int:
        if self.packing == "documents":
            return self.stream.num_documents
        return -(-self.stream.num_tokens // self.seq_len)

    def gather(self, indices: Int[np.ndarray, "b"]) -> Batch:
        if self.packing == "documents":
            return self._documents(indices)
        return self._windows(indices)

    def _windows(self, indices: Int[np.ndarray, "b"]) -> Batch:
        s = self.seq_len
        ids = np.full(
            (len(indices), s + 1), self.pad_id, np.int32
        )  # the id before the window, then it
        begins = np.zeros((len(indices), s), bool)  # where a document begins
        lengths = np.empty((len(indices), 1), np.int32)
        for row, index in enumerate(np.asarray(indices).tolist()):
            start = index * s
            stop = min(start + s, self.stream.num_tokens)
            lengths[row] = stop - start
            first = max(start - 1, 0)
            ids[row, first - start + 1 : stop - start + 1] = self.stream.tokens(first, stop)
            begins[row, self.stream.document_starts(start, stop) - start] = True
        real = np.arange(s, dtype=np.int32) < lengths if lengths.min() < s else None
        batch = {
            "tokens": np.where(begins, np.int32(self.bos_id), ids[:, :-1]),
            "targets": ids[:, 1:],
            "weights": np.ones((len(ids), s), np.float32),
        }
        if real is not None:
            batch["tokens"] = np.where(real, batch["tokens"], np.int32(self.pad_id))
            batch["weights"] = real.astype(np.float32)
        if self.packing == "packed":
            batch |= _segments_and_positions(begins, real)
        return batch

    def _documents(self, indices: Int[np.ndarray, "b"]) -> Batch:
        targets = np.full((len(indices), self.seq_len), self.pad_id, np.int32)
        tokens = np.full_like(targets, self.pad_id)
        weights = np.zeros(targets.shape, np.float32)
        for row, index in enumerate(np.asarray(indices).tolist()):
            start, stop = self.stream.document(index)
            length = min(stop - start, self.seq_len)
            ids = self.stream.tokens(start, start + length)
            targets[row, :length] = ids
            tokens[row, 0] = self.bos_id
            tokens[row, 1:length] = ids[:-1]
            weights[row, :length] = 1
        return {"tokens": tokens, "targets": targets, "weights": weights}


def _segments_and_positions(begins: np.ndarray, real: np.ndarray | None) -> Batch:
    """Numbers of documents from 1, and positions that restart with each: 0 where there is padding.

    A document that began in an earlier row counts from 0 here: what came before is out of sight.
    """
    begins = begins.copy()
    begins[:, 0] = True
    segments = np.cumsum(begins, axis=1, dtype=np.int32)
    index = np.arange(begins.shape[1], dtype=np.int32)
    positions = index - np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    if real is not None:
        segments, positions = segments * real, positions * real
    return {"segments": segments, "positions": positions.astype(np.int32)}
