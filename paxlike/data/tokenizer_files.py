"""Files of tokenizers: recognised when they change, and checked against what a config says."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, init=False)
class TokenizerFile:
    """A tokenizer's path and, where they are given, the ids that stand for the beginning and the end of a text."""

    path: str
    _bos_id: int | None
    _eos_id: int | None

    def __init__(self, path: str, bos_id: int | None = None, eos_id: int | None = None):
        object.__setattr__(self, "path", os.fspath(path))
        object.__setattr__(self, "_bos_id", bos_id)
        object.__setattr__(self, "_eos_id", eos_id)


def file_key(path: str, kind: str = "SentencePiece model") -> tuple[str, int, int]:
    """Path, size and time: a file that was replaced is read again."""
    if not path:
        raise ValueError(
            "there is no tokenizer: set VOCAB_PATH to a SentencePiece model or a tokenizer.json "
            "(python -m paxlike.data.train_tokenizer makes one)"
        )
    try:
        status = os.stat(path)
    except OSError as error:
        raise ValueError(
            f"no {kind} at {path!r} ({error.strerror}): set VOCAB_PATH to a local "
            "file, or train one with python -m paxlike.data.train_tokenizer"
        ) from None
    return path, status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=8)
def file_digest(path: str, size: int, mtime: int) -> str:
    del size, mtime
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()[:16]


def check_special_ids(path: str, name: str, given: int | None, own: Sequence[int | None]) -> None:
    """Raises ValueError where a given id is none of the tokenizer's own; one without has any."""
    own = [number for number in own if number is not None and number >= 0]
    if given is not None and own and given not in own:
        raise ValueError(
            f"{name}={given}, but the tokenizer {path!r} has {' or '.join(map(str, own))}: leave "
            f"{name} out, or name the tokenizer of this model"
        )


def template_beside(path: str) -> str | None:
    """The chat template that lies in the folder of a tokenizer file."""
    folder = os.path.dirname(os.path.abspath(path))
    jinja, config = (
        os.path.join(folder, n) for n in ("chat_template.jinja", "tokenizer_config.json")
    )
    if os.path.isfile(jinja):
        with open(jinja, encoding="utf-8") as file:
            return file.read()
    if not os.path.isfile(config):
        return None
    with open(config, encoding="utf-8") as file:
        template = json.load(file).get("chat_template")
    return template if isinstance(template, str) else None
