"""Tokenizers of Hugging Face folders: `tokenizer.json`, and what the files beside it say.

`tokenizer.json` holds the algorithm and the vocabulary and is read by the `tokenizers` library. Which
ids begin and end a text, and how a chat is written, stands in `tokenizer_config.json`,
`special_tokens_map.json`, `chat_template.jinja`, `generation_config.json` and `config.json`, of which
the first that says something is believed. Nothing is read before it is used.

Byte-level BPE: Radford et al., 2019, "Language Models are Unsupervised Multitask Learners".
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from paxlike.data.tokenizer_files import (
    TokenizerFile,
    check_special_ids,
    file_digest,
    file_key,
)

_SIDE_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)
_WORD_BOUNDARY = "\u2581"
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclasses.dataclass(frozen=True, init=False)
class HuggingFaceTokenizer(TokenizerFile):
    """The tokenizer of a `tokenizer.json`, or of the folder that holds one.

    Where the tokenizer has no beginning (Qwen), nothing is put before a prompt (`begin_ids` is empty,
    as Hugging Face does), and documents that are cut into rows begin with the end id, which is what
    stood before them in the stream. Where it has no padding, that is the end id too: padding has
    weight 0. Files are opened at first use: a missing or invalid one is a ValueError then.
    """

    @property
    def vocab_size(self) -> int:
        return _vocab_size(*self._key)

    @property
    def bos_id(self) -> int:
        if self._bos_id is not None:
            return self._bos_id
        return self.eos_id if self._facts.bos_id is None else self._facts.bos_id

    @property
    def eos_id(self) -> int:
        if self._eos_id is not None:
            return self._eos_id
        if self._facts.eos_id is None:
            raise ValueError(
                f"nothing beside {self._file!r} names the end-of-text token: pass eos_id (EOS_ID), or "
                "put the model's tokenizer_config.json there"
            )
        return self._facts.eos_id

    @property
    def pad_id(self) -> int:
        return self.eos_id if self._facts.pad_id is None else self._facts.pad_id

    @property
    def begin_ids(self) -> list[int]:
        """What stands before a prompt: bos, or nothing where the tokenizer has none."""
        own = self._facts.bos_id is not None or self._bos_id is not None
        return [self.bos_id] if own else []

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every id that ends an answer: eos, and those `generation_config.json` adds."""
        return tuple(dict.fromkeys((self.eos_id, *self._facts.stop_ids)))

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the model's own chat template, None where there is none."""
        return self._facts.chat_template

    def check(self) -> None:
        """Raises ValueError where a given id contradicts the tokenizer's own."""
        facts = self._facts
        own_eos = () if facts.eos_id is None else (facts.eos_id, *facts.stop_ids)
        check_special_ids(self.path, "BOS_ID", self._bos_id, (facts.bos_id,))
        check_special_ids(self.path, "EOS_ID", self._eos_id, own_eos)

    def encode(self, text: str) -> list[int]:
        return self._as_text.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        del num_threads  # the library has its own threads
        found = self._as_text.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def encode_template(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts in which the names of special tokens stand for those tokens."""
        found = _load(*self._key, True).encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def token(self, token_id: int) -> str:
        """How the token of an id is written in a template."""
        return self._as_text.id_to_token(token_id) or ""

    def special_tokens(self) -> dict[str, int]:
        """Ids of the tokens that `encode_template` knows by name."""
        added = self._as_text.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items()}

    def decode(self, ids: Iterable[int]) -> str:
        size = self.vocab_size
        special = {self.bos_id, self.eos_id, self.pad_id}
        wanted = [i for i in map(int, ids) if 0 <= i < size and i not in special]
        return self._as_text.decode(wanted, skip_special_tokens=True)

    def bytes_per_token(self) -> Int[np.ndarray, "v"]:
        """UTF-8 bytes of each token; exact where a tokenizer gives text back exactly."""
        return _token_bytes(*self._key).copy()

    def digest(self) -> str:
        return file_digest(*self._key)

    @property
    def _file(self) -> str:
        return (
            self.path if self.path.endswith(".json") else os.path.join(self.path, "tokenizer.json")
        )

    @property
    def _key(self) -> tuple[str, int, int]:
        return file_key(self._file, "Hugging Face tokenizer")

    @property
    def _as_text(self) -> Any:
        """The tokenizer that reads names of special tokens in a text as ordinary text."""
        return _load(*self._key, False)

    @property
    def _facts(self) -> "_Facts":
        folder = os.path.dirname(self._file)
        names = [os.path.join(folder, name) for name in _SIDE_FILES]
        keys = tuple(file_key(name, "file") for name in names if os.path.isfile(name))
        return _read_facts(self._key, keys)


@dataclasses.dataclass(frozen=True)
class _Facts:
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    stop_ids: tuple[int, ...]
    chat_template: str | None


@functools.lru_cache(maxsize=8)
def _load(path: str, size: int, mtime: int, special: bool) -> Any:
    """The tokenizer; `special`: whether names of special tokens in a text become those tokens."""
    del size, mtime
    try:
        import tokenizers
    except ImportError:
        raise ValueError(
            f"{path!r} needs the package tokenizers: install it, or set VOCAB_PATH to a SentencePiece model"
        ) from None
    try:
        tokenizer = tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(
            f"{path!r} is not a Hugging Face tokenizer: {' '.join(str(error).split())[:200]}"
        ) from None
    # A file may have been saved with these on, and rows would be cut or padded unseen.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = not special
    return tokenizer


@functools.lru_cache(maxsize=8)
def _vocab_size(path: str, size: int, mtime: int) -> int:
    # By the largest id: some vocabularies have holes.
    return 1 + max(_load(path, size, mtime, False).get_vocab(with_added_tokens=True).values())


@functools.lru_cache(maxsize=8)
def _read_facts(key: tuple[str, int, int], side_keys: tuple[tuple[str, int, int], ...]) -> _Facts:
    texts = {}
    for path, _, _ in side_keys:
        with open(path, encoding="utf-8") as file:
            texts[os.path.basename(path)] = file.read()
    template_file = texts.pop("chat_template.jinja", None)
    files = [_json_object(texts[name], name) for name in _SIDE_FILES if name in texts]
    tokenizer = _load(*key, False)
    found = {name: _special_id(name, files, tokenizer) for name in ("bos", "eos", "pad")}
    listed = [value for values in files for value in _as_list(values.get("eos_token_id"))]
    templates = [values["chat_template"] for values in files if values.get("chat_template")]
    return _Facts(
        found["bos"],
        found["eos"],
        found["pad"],
        tuple(dict.fromkeys(i for i in listed if isinstance(i, int))),
        template_file or (_default_template(templates[0]) if templates else None),
    )


def _special_id(name: str, files: list[dict[str, Any]], tokenizer: Any) -> int | None:
    """The id of a special token: by its text where a file has it, else by a number."""
    for values in files:
        if f"{name}_token" in values:
            token = values[f"{name}_token"]
            token = token.get("content") if isinstance(token, dict) else token
            if token is None:  # said to be none: Qwen's config.json has a number all the same
                return None
            number = tokenizer.token_to_id(token)
            if number is not None:
                return number
    for values in files:
        numbers = _as_list(values.get(f"{name}_token_id"))
        if numbers and isinstance(numbers[0], int):
            return numbers[0]
    return None


def _default_template(template: Any) -> str:
    """A template, or of several named ones that called `default`."""
    if isinstance(template, str):
        return template
    named = {entry["name"]: entry["template"] for entry in template}
    return named.get("default", next(iter(named.values())))


def _json_object(text: str, name: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} beside the tokenizer is not JSON: {error}") from None
    return values if isinstance(values, dict) else {}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


@functools.lru_cache(maxsize=8)
def _token_bytes(path: str, size: int, mtime: int) -> Int[np.ndarray, "v"]:
    tokenizer = _load(path, size, mtime, False)
    added = tokenizer.get_added_tokens_decoder()
    with open(path, encoding="utf-8") as file:
        parts = json.load(file)
    # In a byte-level vocabulary each character of a token stands for one byte.
    byte_level = _has_type(parts.get("pre_tokenizer"), "ByteLevel") or _has_type(
        parts.get("decoder"), "ByteLevel"
    )
    unknown = parts.get("model", {}).get("unk_token")
    counts = np.zeros(_vocab_size(path, size, mtime), np.int32)
    for token, number in tokenizer.get_vocab(with_added_tokens=True).items():
        if number in added:
            counts[number] = 0 if added[number].special else len(token.encode("utf-8"))
        elif token == unknown:
            counts[number] = 0
        elif byte_level:
            counts[number] = len(token)
        elif _BYTE_PIECE.fullmatch(token):
            counts[number] = 1
        else:
            text = token.removeprefix("##").replace(_WORD_BOUNDARY, " ")
            counts[number] = len(text.encode("utf-8"))
    return counts


def _has_type(part: Any, kind: str) -> bool:
    """Whether a part of tokenizer.json, or one within it, is of a kind."""
    if isinstance(part, dict):
        return part.get("type") == kind or any(_has_type(value, kind) for value in part.values())
    return isinstance(part, list) and any(_has_type(value, kind) for value in part)
