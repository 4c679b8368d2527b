"""Tokens made up on the spot: for speed measurements and tests, with no file at all."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int

from paxlike.data.packing import Batch, Packing, Rows
from paxlike.data.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class SyntheticTokens:
    """Rows of one document each, full, without padding.

    `seed` None: every input and target is id 1, as in Pax. Otherwise ids are uniform in
    `vocab_size`, and row i is a function of (seed, i).
    """

    vocab_size: int | None = None
    seed: int | None = None
    num_rows: int = 1 << 20

    def __post_init__(self):
        if (self.vocab_size is None) != (self.seed is None):
            raise ValueError(
                f"SyntheticTokens(vocab_size={self.vocab_size}, seed={self.seed}): give both "
                "for random tokens, or neither for the constant id 1"
            )

    def check(self, *, tokenizer: Tokenizer | None, seq_len: int, packing: Packing) -> None:
        """Every length and packing will do."""

    def rows(self, *, tokenizer: Tokenizer | None, seq_len: int, packing: Packing) -> Rows:
        del tokenizer
        return _SyntheticRows(self, seq_len, packing)

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "synthetic", **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class _SyntheticRows:
    source: SyntheticTokens
    seq_len: int
    packing: Packing

    def __len__(self) -> int:
        return self.source.num_rows

    def gather(self, indices: Int[np.ndarray, "b"]) -> Batch:
        shape = (len(indices), self.seq_len)
        if self.source.seed is None:
            tokens = targets = np.ones(shape, np.int32)
        else:
            ids = np.stack([self._random_row(int(i)) for i in indices])
            tokens, targets = ids[:, :-1], ids[:, 1:]
        batch = {"tokens": tokens, "targets": targets, "weights": np.ones(shape, np.float32)}
        if self.packing == "packed":
            batch["segments"] = np.ones(shape, np.int32)
            batch["positions"] = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
        return batch

    def _random_row(self, index: int) -> Int[np.ndarray, "s+1"]:
        assert self.source.vocab_size is not None  # given with the seed
        random = np.random.Generator(
            np.random.Philox(key=self.source.seed, counter=[0, 0, 0, index])
        )
        return random.integers(self.source.vocab_size, size=self.seq_len + 1, dtype=np.int32)
