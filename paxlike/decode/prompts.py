"""Prompts from a file: one per line of text, or one per line of JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text to continue, or a conversation to answer, and what its author calls it."""

    text: str
    id: str | int | None = None
    messages: tuple[Mapping[str, str], ...] = ()


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a `.txt` file (one a line) or a `.jsonl` file (`prompt` or `text`, or `messages`, and `id`).

    Empty lines are passed over; in a `.jsonl` file an empty string is a prompt.

    Raises:
      ValueError: the file is missing, of another kind or without prompts, or a line is wrong.
    """
    path = Path(path)
    if path.suffix not in _READERS and path.exists():
        raise ValueError(
            f"{path} is no prompt file: give .txt (one prompt a line) or .jsonl (key 'prompt')"
        )
    try:
        # splitlines() would also split at U+2028 and others.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"cannot read the prompts in {path}: {reason}") from None
    read = _READERS[path.suffix]
    numbered = enumerate(lines, start=1)
    prompts = [read(line.rstrip("\r"), f"{path}:{n}") for n, line in numbered if line.strip()]
    if not prompts:
        raise ValueError(f"there is no prompt in {path}")
    return prompts


def _from_text(line: str, where: str) -> Prompt:
    del where
    return Prompt(line)


def _from_json(line: str, where: str) -> Prompt:
    try:
        fields: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error})") from None
    if isinstance(fields, dict) and "messages" in fields:
        return Prompt("", fields.get("id"), _messages(fields["messages"], where))
    text = fields.get("prompt", fields.get("text")) if isinstance(fields, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"{where} has no text under 'prompt' or 'text' (nor 'messages')")
    return Prompt(text, fields.get("id"))


def _messages(value: Any, where: str) -> tuple[Mapping[str, str], ...]:
    fine = isinstance(value, list) and all(
        isinstance(each, dict)
        and isinstance(each.get("role"), str)
        and isinstance(each.get("content"), str)
        for each in value
    )
    if not fine or not value:
        raise ValueError(f"{where}: 'messages' is no list of objects with 'role' and 'content'")
    if value[-1]["role"] == "assistant":
        raise ValueError(f"{where}: the last message is an answer already; end with the user's")
    return tuple(value)


_READERS = {".txt": _from_text, ".jsonl": _from_json}
