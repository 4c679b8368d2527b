"""A tokenizer by its path, whatever its kind."""

import os

from paxlike.data.hf_tokenizer import HuggingFaceTokenizer
from paxlike.data.tokenizers import SentencePieceTokenizer, Tokenizer


def open_tokenizer(path: str, bos_id: int | None = None, eos_id: int | None = None) -> Tokenizer:
    """The tokenizer that a path names; nothing is read yet.

    A `.json` file, or a folder with `tokenizer.json`, is Hugging Face's; any other file, or a folder
    with `tokenizer.model`, is SentencePiece's. Of a folder with both the first is taken: it has the
    chat template. `bos_id` and `eos_id` default to the tokenizer's own.
    """
    path = os.path.expanduser(os.fspath(path))
    if path.endswith(".json"):
        return HuggingFaceTokenizer(path, bos_id, eos_id)
    if os.path.isdir(path):
        model = os.path.join(path, "tokenizer.model")
        if os.path.exists(os.path.join(path, "tokenizer.json")) or not os.path.exists(model):
            return HuggingFaceTokenizer(path, bos_id, eos_id)
        return SentencePieceTokenizer(model, bos_id, eos_id)
    return SentencePieceTokenizer(path, bos_id, eos_id)
