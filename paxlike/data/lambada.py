"""LAMBADA: predict the last word of a passage (Paperno et al., 2016, https://arxiv.org/abs/1606.06031).

The protocol is Pax's: quotes are made straight; the target is the last whitespace-separated token
with one space before it, the context what stands before its last occurrence, stripped; both are
tokenised on their own, without eos. A row is bos, context, target; only target ids have weight 1.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int

from paxlike.data.packing import WHOLE_ANSWER, Batch, Packing, Rows
from paxlike.data.sources import DocumentSource
from paxlike.data.tokenizers import Tokenizer

MAX_TARGET_TOKENS = 64
_STRAIGHT_QUOTES = str.maketrans({"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'"})


@dataclasses.dataclass(frozen=True)
class Lambada:
    """Rows of LAMBADA, from `TfdsSource("my_lambada", "test")` or `JsonLines(path)`.

    The context keeps its last `seq_len - 64` ids and the target its first 64. (No passage is that
    long at Pax's 2048. Where a short model must cut, the words next to the target matter most.)
    """

    passages: DocumentSource

    columns = (WHOLE_ANSWER,)

    def check(self, *, tokenizer: Tokenizer | None, seq_len: int, packing: Packing) -> None:
        """Raises ValueError where rows of passages cannot have this form."""
        if tokenizer is None:
            raise ValueError("Lambada makes rows of text: pass a tokenizer")
        if packing != "documents":
            raise ValueError(
                f"LAMBADA has one passage per row: set packing='documents', not {packing!r}"
            )
        if seq_len <= MAX_TARGET_TOKENS:
            raise ValueError(
                f"LAMBADA keeps {MAX_TARGET_TOKENS} positions for the target: seq_len={seq_len} "
                "must be "
                f"at least {MAX_TARGET_TOKENS + 1}"
            )

    def check_data(self, *, tokenizer: Tokenizer) -> None:
        """Raises ValueError where the data is not there."""
        del tokenizer
        self.passages.parts()

    def rows(self, *, tokenizer: Tokenizer, seq_len: int, packing: Packing) -> Rows:
        passages = [
            text
            for part in self.passages.parts()
            for text in self.passages.read(part)
            if text.strip()
        ]
        if not passages:
            raise ValueError(f"no passage in {self.passages!r}")
        return _LambadaRows(passages, tokenizer, seq_len)

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "lambada", "passages": self.passages.fingerprint()}


def split_passage(passage: str) -> tuple[str, str]:
    """Context and target of a passage.

    >>> split_passage("He said \\u201cno\\u201d to the cat")
    ('He said "no" to the', ' cat')
    """
    text = passage.translate(_STRAIGHT_QUOTES)
    word = text.split()[-1]
    return text[: text.rfind(word)].strip(), " " + word


class _LambadaRows:
    """All passages as ids, padded when they are asked for."""

    def __init__(self, passages: list[str], tokenizer: Tokenizer, seq_len: int):
        contexts, targets = zip(*map(split_passage, passages))
        cap = seq_len - MAX_TARGET_TOKENS
        self._contexts = [ids[-cap:] for ids in tokenizer.encode_batch(contexts)]
        self._targets = [ids[:MAX_TARGET_TOKENS] for ids in tokenizer.encode_batch(targets)]
        self._seq_len, self._bos_id, self._pad_id = seq_len, tokenizer.bos_id, tokenizer.pad_id

    def __len__(self) -> int:
        return len(self._targets)

    def gather(self, indices: Int[np.ndarray, "b"]) -> Batch:
        shape = (len(indices), self._seq_len)
        tokens = np.full(shape, self._pad_id, np.int32)
        targets = np.full(shape, self._pad_id, np.int32)
        weights = np.zeros(shape, np.float32)
        for row, index in enumerate(np.asarray(indices).tolist()):
            context, target = self._contexts[index], self._targets[index]
            ids = context + target
            targets[row, : len(ids)] = ids
            tokens[row, : len(ids)] = [self._bos_id, *ids[:-1]]
            weights[row, len(context) : len(ids)] = 1
        whole = np.ones(len(indices), np.float32)
        return {"tokens": tokens, "targets": targets, "weights": weights, WHOLE_ANSWER.name: whole}
