"""Supervised fine-tuning: prompts with answers, or conversations, of which only answers are scored.

A record of JSON lines or TFDS is a prompt and an answer, or a list of messages; both are conversations
to the chat template, which makes ids of them and says which are answers. Weight 1 has every id of an
answer and of the token that ends it, so that a model learns to stop.
"""

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from paxlike.data.chat import ANSWERS, Answers, Chat, ChatTemplate
from paxlike.data.example_rows import ExampleRows
from paxlike.data.packing import WHOLE_ANSWER, Packing, Rows
from paxlike.data.progress import Progress
from paxlike.data.records import Record, RecordSource, name_of, read_records
from paxlike.data.tokenizers import Tokenizer

Overlong = Literal["drop", "truncate_prompt", "truncate"]
OVERLONG = ("drop", "truncate_prompt", "truncate")
ROLES = ("system", "user", "assistant", "tool")
_OTHER_NAMES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
_MESSAGES_KEYS = ("messages", "conversations")
_PROMPT_KEYS = ("prompt", "input", "instruction", "question")
_ANSWER_KEYS = ("completion", "output", "response", "answer")
_BATCH = 256  # conversations that are tokenised together

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Instruct:
    """Rows for fine-tuning on answers.

    Attributes:
      source: records: `JsonLines(paths)` or a `TfdsSource`.
      template: how a conversation is written; its name, see `ChatTemplate`.
      prompt_key, answer_key, messages_key: fields of a record. None takes the first that it has of
        prompt, input, instruction, question; completion, output, response, answer; messages,
        conversations. A record with messages is a conversation. `system` may hold a system message.
      prompt_format: the prompt from several fields instead, as "{instruction}\\n{context}".
      answers: in a conversation `all` answers are scored, or the `last`.
      overlong: what becomes of an example that is longer than a row: `drop` it; `truncate_prompt`
        takes ids from the beginning of what stands before the first answer (but for bos), and drops
        where that is not enough; `truncate` keeps the beginning, and drops where no answer is left.
      seed: decides which examples share a packed row.
    """

    source: RecordSource
    template: str | ChatTemplate = "tokenizer"
    prompt_key: str | None = None
    answer_key: str | None = None
    messages_key: str | None = None
    prompt_format: str | None = None
    answers: Answers = "all"
    overlong: Overlong = "drop"
    seed: int = 0

    def __post_init__(self):
        if self.answers not in ANSWERS:
            raise ValueError(f"answers={self.answers!r} is none of {', '.join(ANSWERS)}")
        if self.overlong not in OVERLONG:
            raise ValueError(f"overlong={self.overlong!r} is none of {', '.join(OVERLONG)}")
        _ = self.chat_template

    @property
    def chat_template(self) -> ChatTemplate:
        """The template, where only its name was given too."""
        return ChatTemplate(self.template) if isinstance(self.template, str) else self.template

    @property
    def columns(self):
        """A row with one example is one whole answer."""
        return (WHOLE_ANSWER,)

    def check(self, *, tokenizer: Tokenizer | None, seq_len: int, packing: Packing) -> None:
        """Raises ValueError where rows of examples cannot have this form."""
        del seq_len
        if tokenizer is None:
            raise ValueError("Instruct makes rows of text: pass a tokenizer")
        if packing not in ("packed", "documents"):
            raise ValueError(
                f"examples for fine-tuning are kept apart: set packing='packed' (several a row) or "
                f"'documents' (one a row), not {packing!r}"
            )

    def check_data(self, *, tokenizer: Tokenizer) -> None:
        """Raises ValueError where the data is not there or the template does not fit the tokenizer."""
        self.source.parts()
        self.chat_template.check(tokenizer)

    def rows(self, *, tokenizer: Tokenizer, seq_len: int, packing: Packing) -> Rows:
        fit = _Fit(self.overlong, seq_len, len(tokenizer.begin_ids))
        with Progress("tokenising examples", unit="examples") as progress:
            rows = ExampleRows(
                fit.all(self.chats(tokenizer), progress),
                seq_len=seq_len,
                packing=packing,
                pad_id=tokenizer.pad_id,
                order_seed=self.seed,
            )
        fit.report(self.source)
        return rows

    def chats(self, tokenizer: Tokenizer) -> Iterator[Chat]:
        """Every example as ids with a mask, whatever its length, in stored order."""
        found = (
            (where, self.messages(record, where)) for where, record in read_records(self.source)
        )
        for batch in _batches(found, _BATCH):
            for chat in self._encode(batch, tokenizer):
                if chat.ids and chat.is_answer[0]:  # nothing before it to predict it from
                    chat = Chat([tokenizer.bos_id, *chat.ids], [False, *chat.is_answer])
                yield chat

    def messages(self, record: Record, where: str = "record") -> list[dict[str, str]]:
        """The conversation of a record. Raises ValueError, with `where`, for one that is none."""
        key = self.messages_key or next((k for k in _MESSAGES_KEYS if k in record), None)
        if key is not None and self.prompt_format is None:
            found = [_message(m, where) for m in _message_list(_get(record, key, where), where)]
        else:
            found = [{"role": "user", "content": self._prompt(record, where)}]
            answer = _text(record, self.answer_key, _ANSWER_KEYS, "answer_key", where)
            found.append({"role": "assistant", "content": answer})
        if isinstance(record.get("system"), str) and record["system"].strip():
            found.insert(0, {"role": "system", "content": record["system"]})
        if not any(m["role"] == "assistant" for m in found):
            roles = ", ".join(m["role"] for m in found) or "none"
            raise ValueError(
                f"{where}: no message of the assistant, so nothing to learn (roles: {roles})"
            )
        return found

    def fingerprint(self) -> dict[str, Any]:
        facts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        facts["template"] = dataclasses.asdict(self.chat_template)
        return {"kind": "instruct", **facts, "source": self.source.fingerprint()}

    def _prompt(self, record: Record, where: str) -> str:
        if self.prompt_format is None:
            return _text(record, self.prompt_key, _PROMPT_KEYS, "prompt_key", where)
        try:
            return self.prompt_format.format(**record)
        except (KeyError, IndexError) as error:
            raise ValueError(
                f"{where}: prompt_format names {error}, and the record has {sorted(record)}"
            ) from None

    def _encode(self, batch: list[tuple[str, Any]], tokenizer: Tokenizer) -> list[Chat]:
        template = self.chat_template
        try:
            return template.encode([m for _, m in batch], tokenizer, answers=self.answers)
        except ValueError:
            # Again one by one: the message must name the record.
            for where, messages in batch:
                try:
                    template.encode([messages], tokenizer, answers=self.answers)
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from None
            raise


class _Fit:
    """Makes examples fit into a row and counts what does not."""

    def __init__(self, overlong: Overlong, seq_len: int, num_begin: int):
        self._overlong, self._limit, self._num_begin = overlong, seq_len + 1, num_begin
        self._count = self._dropped = self._cut = self._longest = 0

    def all(self, chats: Iterator[Chat], progress: Progress) -> Iterator[tuple[list, list]]:
        """Ids and masks of the examples that have a place in a row."""
        for chat in chats:
            self._count += 1
            progress.set(self._count)
            self._longest = max(self._longest, len(chat.ids) - 1)
            fitted = chat if len(chat.ids) <= self._limit else self._shorten(chat)
            # Without a scored id a row would have weight 0, and its mean loss no value.
            if any(fitted.is_answer):
                self._cut += fitted is not chat
                yield fitted.ids, fitted.is_answer
            else:
                self._dropped += 1

    def report(self, source: RecordSource) -> None:
        """One warning if examples were shortened or dropped; ValueError if none is left."""
        seq_len = self._limit - 1
        if not self._count:
            raise ValueError(f"no record in {name_of(source)}")
        facts = f"the longest has {self._longest} tokens, a row has {seq_len}"
        if self._dropped == self._count:
            raise ValueError(
                f"all {self._count} examples of {name_of(source)} are too long (overlong="
                f"{self._overlong!r}): {facts}; set MAX_SEQ_LEN higher"
            )
        if self._dropped or self._cut:
            log.warning(
                f"{name_of(source)}: {self._dropped} of {self._count} examples dropped and "
                f"{self._cut} shortened as too long for a row (overlong={self._overlong!r}): {facts}"
            )

    def _shorten(self, chat: Chat) -> Chat:
        too_many = len(chat.ids) - self._limit
        if self._overlong == "truncate":
            return Chat(chat.ids[: self._limit], chat.is_answer[: self._limit])
        first = self._num_begin
        before = chat.is_answer.index(True) - first if any(chat.is_answer) else 0
        # One id must stay before the answer, to predict it from.
        if self._overlong == "drop" or before - (first == 0) < too_many:
            return Chat([], [])
        kept = [*range(first), *range(first + too_many, len(chat.ids))]
        return Chat([chat.ids[i] for i in kept], [chat.is_answer[i] for i in kept])


def _message_list(value: Any, where: str) -> list[Any]:
    if isinstance(value, Mapping):  # TFDS gives a list of records as a record of lists
        return [dict(zip(value, fields)) for fields in zip(*value.values())]
    if not isinstance(value, list):
        raise ValueError(f"{where}: messages must be a list, not {type(value).__name__}")
    return value


def _message(value: Any, where: str) -> dict[str, str]:
    """A message as {"role", "content"}; {"from", "value"} is understood."""
    fields = value if isinstance(value, Mapping) else {}
    role, content = (
        fields.get("role", fields.get("from")),
        fields.get("content", fields.get("value")),
    )
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(
            f"{where}: a message must have text under 'role' and 'content' (or 'from' and 'value'), "
            f"not {str(value)[:80]!r}"
        )
    known = _OTHER_NAMES.get(role.lower(), role.lower())
    if known not in ROLES:
        raise ValueError(
            f"{where}: role {role!r} is none of {', '.join(ROLES)} ({', '.join(_OTHER_NAMES)})"
        )
    return {"role": known, "content": content}


def _text(record: Record, key: str | None, usual: tuple[str, ...], name: str, where: str) -> str:
    if key is None:
        key = next((k for k in usual if k in record), None)
        if key is None:
            raise ValueError(
                f"{where}: none of {', '.join(usual)}; the record has {sorted(record)}: set {name}"
            )
    value = _get(record, key, where)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key!r} is no text but {type(value).__name__}: set {name}")
    return value


def _get(record: Record, key: str, where: str) -> Any:
    if key not in record:
        raise ValueError(f"{where}: no {key!r}; the record has {sorted(record)}")
    return record[key]


def _batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(itertools.islice(items, size)):
        yield batch
