"""Tokenizers: text to ids and back, and how many UTF-8 bytes each id stands for.

A tokenizer is a small frozen value (a path and two ids): it can sit in a config, be pickled and be
compared, and reads its file only when it is first used. The byte counts turn a loss in nats per
token into bits per byte, which compares models with different vocabularies.

SentencePiece: Kudo and Richardson, 2018, https://arxiv.org/abs/1808.06226.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import sentencepiece
from jaxtyping import Int

from paxlike.data.tokenizer_files import (
    TokenizerFile,
    check_special_ids,
    file_digest,
    file_key,
    template_beside,
)

_WORD_BOUNDARY = "\u2581"  # SentencePiece writes a space as this character


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_id(self) -> int:
        """Id fed to the model where a document begins."""

    @property
    def eos_id(self) -> int:
        """Id that ends every document."""

    @property
    def pad_id(self) -> int: ...

    @property
    def begin_ids(self) -> list[int]:
        """What is fed before a prompt: bos, or nothing where there is none."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer; eos is the first."""

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the tokenizer's own chat template."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without any special id."""

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]: ...

    def encode_template(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts in which the names of special tokens stand for those tokens."""

    def token(self, token_id: int) -> str:
        """How the token of an id is written in a template."""

    def special_tokens(self) -> dict[str, int]:
        """Ids of the tokens that `encode_template` knows by name."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special ids, and ids outside the vocabulary, are nothing."""

    def bytes_per_token(self) -> Int[np.ndarray, "v"]:
        """UTF-8 bytes each id stands for; 0 for special ids."""

    def digest(self) -> str:
        """A short string that is equal for tokenizers that give equal ids."""


@dataclasses.dataclass(frozen=True, init=False)
class SentencePieceTokenizer(TokenizerFile):
    """A SentencePiece model file.

    `eos_id` defaults to the model's; `bos_id` to the model's and, where it has none, to 0 as in
    Pax. The file is opened at first use: a missing or invalid one is a ValueError then.
    """

    @property
    def vocab_size(self) -> int:
        return self._model.get_piece_size()

    @property
    def bos_id(self) -> int:
        if self._bos_id is not None:
            return self._bos_id
        return max(self._model.bos_id(), 0)

    @property
    def eos_id(self) -> int:
        if self._eos_id is not None:
            return self._eos_id
        if self._model.eos_id() < 0:
            raise ValueError(
                f"the SentencePiece model {self.path!r} has no end-of-document id: pass eos_id"
            )
        return self._model.eos_id()

    @property
    def pad_id(self) -> int:
        return max(self._model.pad_id(), 0)

    @property
    def begin_ids(self) -> list[int]:
        return [self.bos_id]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (self.eos_id,)

    @property
    def chat_template(self) -> str | None:
        """The template in a tokenizer_config.json or chat_template.jinja beside the file, if any."""
        return template_beside(self.path)

    def check(self) -> None:
        """Raises ValueError where a given id contradicts the model's own."""
        model = self._model
        check_special_ids(self.path, "BOS_ID", self._bos_id, (model.bos_id(),))
        check_special_ids(self.path, "EOS_ID", self._eos_id, (model.eos_id(),))

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        return self._model.encode(list(texts), num_threads=num_threads)

    def encode_template(self, texts: Sequence[str]) -> list[list[int]]:
        return _encode_named(self, texts)

    def token(self, token_id: int) -> str:
        return self._model.id_to_piece(token_id)

    def special_tokens(self) -> dict[str, int]:
        model = self._model
        ids = [i for i in range(min(model.get_piece_size(), 1024)) if model.is_control(i)]
        return {model.id_to_piece(i): i for i in [*ids, self.bos_id, self.eos_id]}

    def decode(self, ids: Iterable[int]) -> str:
        # A softmax is often padded to a multiple of 64, so a model can sample ids without a piece.
        size = self.vocab_size
        special = {self.bos_id, self.eos_id, self.pad_id}
        return self._model.decode([i for i in map(int, ids) if 0 <= i < size and i not in special])

    def bytes_per_token(self) -> Int[np.ndarray, "v"]:
        """UTF-8 bytes of each piece.

        They add up to the bytes of a text exactly for models from `train_sentencepiece`. A model
        that normalises text, or puts a space in front of it, counts the text as the model sees it.
        """
        return _piece_bytes(self._model).copy()

    def digest(self) -> str:
        return file_digest(*file_key(self.path))

    @property
    def _model(self) -> sentencepiece.SentencePieceProcessor:
        return _load_model(*file_key(self.path))


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """One id per UTF-8 byte (id = byte + 2), pad and bos 0, eos 1: needs no file.

    >>> ByteTokenizer().encode("ab")
    [99, 100]
    """

    vocab_size: int = dataclasses.field(default=258, init=False)
    bos_id: int = dataclasses.field(default=0, init=False)
    eos_id: int = dataclasses.field(default=1, init=False)
    pad_id: int = dataclasses.field(default=0, init=False)

    @property
    def begin_ids(self) -> list[int]:
        return [self.bos_id]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (self.eos_id,)

    @property
    def chat_template(self) -> str | None:
        return None

    def encode(self, text: str) -> list[int]:
        return [byte + 2 for byte in text.encode("utf-8", "surrogatepass")]

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        del num_threads  # pure Python: threads would not run at the same time
        return [self.encode(text) for text in texts]

    def encode_template(self, texts: Sequence[str]) -> list[list[int]]:
        return _encode_named(self, texts)

    def token(self, token_id: int) -> str:
        return ("<s>", "</s>")[token_id] if token_id < 2 else chr(token_id - 2)

    def special_tokens(self) -> dict[str, int]:
        return {"<s>": self.bos_id, "</s>": self.eos_id}

    def decode(self, ids: Iterable[int]) -> str:
        data = bytes(i - 2 for i in map(int, ids) if 2 <= i < self.vocab_size)
        return data.decode("utf-8", "replace")

    def bytes_per_token(self) -> Int[np.ndarray, "v"]:
        counts = np.ones(self.vocab_size, np.int32)
        counts[:2] = 0
        return counts

    def digest(self) -> str:
        return "bytes"


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ValueError where the tokenizer makes ids that the model does not have.

    So it does where BOS_ID or EOS_ID is given and is not the tokenizer's.
    """
    special = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    needed = max(tokenizer.vocab_size, *(i + 1 for i in special.values()))
    if needed > vocab_size:
        raise ValueError(
            f"the tokenizer {_name(tokenizer)} makes ids up to {needed - 1} but the model has a "
            f"vocabulary of {vocab_size}: set VOCAB_SIZE to at least {needed}"
        )
    wrong = {name: i for name, i in special.items() if i < 0}
    if wrong:
        raise ValueError(f"the tokenizer {_name(tokenizer)} has negative special ids: {wrong}")
    check = getattr(tokenizer, "check", None)
    if check is not None:
        check()


def train_sentencepiece(
    texts: Iterable[str], *, output: str, vocab_size: int, num_threads: int | None = None
) -> SentencePieceTokenizer:
    """Trains a byte-fallback BPE model that gives text back exactly, and writes it to `output`.

    Ids: pad 0, eos 1, unk 2, no bos, as the C4 model of Pax. Text is not normalised, so spaces and
    line ends survive. The one character that does not is U+2581, SentencePiece's own sign for a
    space. Raises ValueError where the texts are too few for `vocab_size`.
    """
    os.makedirs(os.path.dirname(os.path.abspath(output)), exist_ok=True)
    temporary = f"{output}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_pieces_of_text(texts),
                model_writer=file,
                vocab_size=vocab_size,
                model_type="bpe",
                byte_fallback=True,
                split_digits=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                max_sentence_length=1 << 20,
                pad_id=0,
                eos_id=1,
                unk_id=2,
                bos_id=-1,
                num_threads=num_threads or os.cpu_count() or 1,
                minloglevel=2,
            )
        os.replace(temporary, output)
    except RuntimeError as error:
        raise ValueError(_training_error(str(error), vocab_size)) from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    return SentencePieceTokenizer(output)


def _name(tokenizer: Tokenizer) -> str:
    return repr(getattr(tokenizer, "path", type(tokenizer).__name__))


def _pieces_of_text(texts: Iterable[str], size: int = 4096) -> Iterator[str]:
    """Texts in pieces of whole lines of about `size` characters: the trainer's memory."""
    for text in texts:
        while len(text) > size:
            cut = text.rfind("\n", 0, size) + 1 or size
            yield text[:cut]
            text = text[cut:]
        if text:
            yield text


def _training_error(message: str, vocab_size: int) -> str:
    limit = re.search(r"<= (\d+)", message)
    if limit:
        most = limit[1]
        return (
            f"vocab_size={vocab_size} is too large for this text: take at most {most}, or more text"
        )
    if "required_chars" in message:
        return f"vocab_size={vocab_size} is too small: byte fallback alone needs about 300 ids"
    if "sentences_.empty" in message:
        return "no text to train a SentencePiece model on"
    return (
        f"SentencePiece could not train with vocab_size={vocab_size}: {' '.join(message.split())}"
    )


def _encode_named(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Texts cut at the names of special tokens; what stands between is encoded on its own."""
    names = tokenizer.special_tokens()
    longest_first = sorted(names, key=len, reverse=True)
    pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
    found = []
    for text in texts:
        pieces = [piece for piece in pattern.split(text) if piece]
        ids = [[names[p]] if p in names else tokenizer.encode(p) for p in pieces]
        found.append([number for piece in ids for number in piece])
    return found


@functools.lru_cache(maxsize=8)
def _load_model(path: str, size: int, mtime: int) -> sentencepiece.SentencePieceProcessor:
    del size, mtime
    try:
        return sentencepiece.SentencePieceProcessor(model_file=path)
    except (RuntimeError, OSError):
        raise ValueError(f"{path!r} is not a SentencePiece model: set VOCAB_PATH to one") from None


@functools.lru_cache(maxsize=8)
def _piece_bytes(model: sentencepiece.SentencePieceProcessor) -> Int[np.ndarray, "v"]:
    counts = np.zeros(model.get_piece_size(), np.int32)
    for i in range(model.get_piece_size()):
        if model.is_byte(i):
            counts[i] = 1
        elif not (model.is_control(i) or model.is_unknown(i) or model.is_unused(i)):
            counts[i] = len(model.id_to_piece(i).replace(_WORD_BOUNDARY, " ").encode("utf-8"))
    return counts
