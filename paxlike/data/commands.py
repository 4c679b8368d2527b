"""Flags that the commands of the data room share: which documents, and which tokenizer."""

import argparse

from paxlike.data.open_tokenizer import open_tokenizer
from paxlike.data.sources import DocumentSource, Files, TfdsSource
from paxlike.data.tokenizers import ByteTokenizer, Tokenizer


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        help="files, as a glob pattern or several with commas between; names that end in .jsonl, "
        ".json or .jsonlines (or these with .gz, .zst) are JSON lines, others are one document each",
    )
    parser.add_argument("--text_key", default="text", help="key of the text in JSON lines and TFDS")
    parser.add_argument("--tfds", metavar="NAME", help="a TFDS data set instead, as the_pile")
    parser.add_argument("--split", default="train", help="of the TFDS data set")
    parser.add_argument("--data_dir", help="folder of TFDS data sets (default: TFDS's own)")


def source_from_flags(flags: argparse.Namespace) -> DocumentSource:
    if (flags.input is None) == (flags.tfds is None):
        raise ValueError("pass either --input FILES or --tfds NAME")
    if flags.tfds is not None:
        return TfdsSource(flags.tfds, flags.split, flags.data_dir, flags.text_key)
    return Files(flags.input, flags.text_key).found


def tokenizer_from_flag(value: str, eos_id: int | None = None) -> Tokenizer:
    return ByteTokenizer() if value == "bytes" else open_tokenizer(value, eos_id=eos_id)
