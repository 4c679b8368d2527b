"""BoolQ: is the answer to a question on a passage yes or no? (Clark et al., 2019, https://arxiv.org/abs/1905.10044)

The protocol is Pax's. The prompt is the passage, `question: ` with the question and `?`, and `answer:`,
each on a line of its own; the target is `yes` or `no`. Both are tokenised on their own, without eos. A
row is bos, prompt, target; only the target has weight 1. Beside it stands the token of the other
answer: the measure is which of the two has the larger logit, the whole vocabulary playing no part.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int

from paxlike.data.packing import ALTERNATIVES, WHOLE_ANSWER, Batch, Packing, Rows
from paxlike.data.records import Record, RecordSource, name_of, read_records
from paxlike.data.tokenizers import Tokenizer

MAX_TARGET_TOKENS = 64
_LABEL_KEYS = ("answer", "label")


@dataclasses.dataclass(frozen=True)
class BoolQ:
    """Rows of BoolQ, from `TfdsSource("super_glue/boolq", "validation")` or `JsonLines(path)`.

    A record has `passage`, `question` and `answer` (true or false) or `label` (1 or 0). The prompt
    keeps its last `seq_len - 64` ids: no prompt is that long at Pax's 4096, and where a short model
    must cut, the question matters more than where the passage begins.

    Attributes:
      yes, no: the answers as they are tokenised. SentencePiece models put a word boundary before
        them. With a tokenizer that does not (Llama 3), `" yes"` and `" no"` are the natural words.
    """

    source: RecordSource
    yes: str = "yes"
    no: str = "no"

    columns = (WHOLE_ANSWER, ALTERNATIVES)

    def check(self, *, tokenizer: Tokenizer | None, seq_len: int, packing: Packing) -> None:
        """Raises ValueError where rows of questions cannot have this form."""
        if tokenizer is None:
            raise ValueError("BoolQ makes rows of text: pass a tokenizer")
        if packing != "documents":
            raise ValueError(
                f"BoolQ has one question per row: set packing='documents', not {packing!r}"
            )
        if seq_len <= MAX_TARGET_TOKENS:
            raise ValueError(
                f"BoolQ keeps {MAX_TARGET_TOKENS} positions for the target: seq_len={seq_len} must be "
                f"at least {MAX_TARGET_TOKENS + 1}"
            )

    def check_data(self, *, tokenizer: Tokenizer) -> None:
        """Raises ValueError where the data is not there or an answer is not a token of its own."""
        self.source.parts()
        self.answer_ids(tokenizer)

    def answer_ids(self, tokenizer: Tokenizer) -> tuple[int, int]:
        """Ids of no and yes, so that a label is an index.

        Raises ValueError where one is not a single token, or both are the same.
        """
        ids = [tokenizer.encode(text) for text in (self.no, self.yes)]
        for text, found in zip((self.no, self.yes), ids):
            if len(found) != 1:
                raise ValueError(
                    f"BoolQ compares two tokens, but the tokenizer makes {len(found)} of {text!r} "
                    f"({found}): choose other words with BoolQ(yes=..., no=...)"
                )
        if ids[0] == ids[1]:
            raise ValueError(
                f"BoolQ compares two tokens, but {self.yes!r} and {self.no!r} are both id {ids[0][0]}: "
                "the tokenizer does not know these words"
            )
        return ids[0][0], ids[1][0]

    def rows(self, *, tokenizer: Tokenizer, seq_len: int, packing: Packing) -> Rows:
        prompts, labels = [], []
        for where, record in read_records(self.source):
            prompts.append(boolq_prompt(record, where))
            labels.append(_label(record, where))
        if not prompts:
            raise ValueError(f"no question in {name_of(self.source)}")
        answers = np.array(self.answer_ids(tokenizer), np.int32)
        return _BoolQRows(prompts, np.array(labels, np.int32), answers, tokenizer, seq_len)

    def fingerprint(self) -> dict[str, Any]:
        facts = {"kind": "boolq", "source": self.source.fingerprint()}
        return (
            facts
            if (self.yes, self.no) == ("yes", "no")
            else facts | {"words": [self.yes, self.no]}
        )


def boolq_prompt(record: Record, where: str = "record") -> str:
    """The text before the answer.

    >>> boolq_prompt({"passage": "Grass is green.", "question": "is grass green"})
    'Grass is green.\\nquestion: is grass green?\\nanswer:'
    """
    for key in ("passage", "question"):
        if not isinstance(record.get(key), str):
            raise ValueError(f"{where}: no text under {key!r}; the record has {sorted(record)}")
    return f"{record['passage']}\nquestion: {record['question']}?\nanswer:"


def _label(record: Record, where: str) -> int:
    found = [record[key] for key in _LABEL_KEYS if key in record]
    if not found or found[0] not in (0, 1):
        says = f"{found[0]!r}" if found else f"none, only {sorted(record)}"
        raise ValueError(
            f"{where}: the answer must be true or false (label 1 or 0), and is {says}; the test split "
            "has no answers"
        )
    return int(found[0])


class _BoolQRows:
    """All prompts as ids, padded when they are asked for."""

    def __init__(self, prompts: list[str], labels, answers, tokenizer: Tokenizer, seq_len: int):
        begin = tokenizer.begin_ids
        # The first input needs a token before it; without a bos that is the prompt's first.
        cap = seq_len - MAX_TARGET_TOKENS + 1 - len(begin)
        self._inputs = [begin + ids[-cap:] for ids in tokenizer.encode_batch(prompts)]
        self._right, self._wrong = answers[labels], answers[1 - labels]
        self._seq_len, self._pad_id = seq_len, tokenizer.pad_id

    def __len__(self) -> int:
        return len(self._inputs)

    def gather(self, indices: Int[np.ndarray, "b"]) -> Batch:
        shape = (len(indices), self._seq_len)
        tokens = np.full(shape, self._pad_id, np.int32)
        targets = np.full(shape, self._pad_id, np.int32)
        weights = np.zeros(shape, np.float32)
        alternatives = np.full(shape, ALTERNATIVES.fill, np.int32)
        for row, index in enumerate(np.asarray(indices).tolist()):
            inputs = self._inputs[index]
            last = len(inputs) - 1  # the input whose target is the answer
            tokens[row, : last + 1] = inputs
            targets[row, : last + 1] = [*inputs[1:], self._right[index]]
            weights[row, last] = 1
            alternatives[row, last] = self._wrong[index]
        return {
            "tokens": tokens,
            "targets": targets,
            "weights": weights,
            WHOLE_ANSWER.name: np.ones(len(indices), np.float32),
            ALTERNATIVES.name: alternatives,
        }
