"""Shows fine-tuning examples as a model will see them: which tokens are scored, and how rows fill.

A template that does not fit a tokenizer, an end-of-turn that is not scored or a prompt that is can be
seen here in a second; in a loss curve they can not.
"""

import argparse
import itertools
import sys

import numpy as np

from paxlike.arguments import ArgumentParser
from paxlike.data.chat import Chat
from paxlike.data.commands import add_source_flags, source_from_flags, tokenizer_from_flag
from paxlike.data.example_rows import ExampleRows
from paxlike.data.instruct import OVERLONG, Instruct
from paxlike.data.packing import Packing
from paxlike.data.sources import JsonLines, MixedFiles, TfdsSource
from paxlike.data.tokenizers import Tokenizer


def scored_text(chat: Chat, tokenizer: Tokenizer) -> str:
    """The text of an example, what is scored between `[[` and `]]`, special tokens by name."""
    names = {number: name for name, number in tokenizer.special_tokens().items()}
    pieces = []
    for scored, run in itertools.groupby(zip(chat.is_answer, chat.ids), key=lambda pair: pair[0]):
        ids = [number for _, number in run]
        text = "".join(
            names[one[0]] * len(one) if one[0] in names else tokenizer.decode(one)
            for one in (list(group) for _, group in itertools.groupby(ids, key=names.get))
        )
        pieces.append(f"[[{text}]]" if scored else text)
    return "".join(pieces)


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m paxlike.data.show_examples",
        description="Shows fine-tuning examples: [[what is scored]], lengths, and how rows fill.",
    )
    add_source_flags(parser)
    parser.add_argument("--tokenizer", required=True, help="a tokenizer file or folder, or bytes")
    parser.add_argument("--template", default="tokenizer", help="of the chat; a name or a file")
    parser.add_argument("--prompt_format", help="the prompt of several fields, as '{input} {more}'")
    parser.add_argument("--answers", default="all", help="score all answers of a chat, or the last")
    parser.add_argument("--overlong", default="drop", help=", ".join(OVERLONG))
    parser.add_argument("--seq_len", type=int, default=2048, help="targets of a row")
    parser.add_argument("--packing", default="packed", help="packed, or documents (one a row)")
    parser.add_argument("--num", type=int, default=2, help="examples to show")
    flags = parser.parse_args(arguments)
    try:
        _show(flags)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


def _show(flags: argparse.Namespace) -> None:
    source = source_from_flags(flags)
    if not isinstance(source, JsonLines | TfdsSource) or isinstance(source, MixedFiles):
        raise ValueError(f"--input {flags.input!r} must be JSON lines: plain text has no answers")
    tokenizer = tokenizer_from_flag(flags.tokenizer)
    examples = Instruct(
        source,
        flags.template,
        prompt_format=flags.prompt_format,
        answers=flags.answers,
        overlong=flags.overlong,
    )
    packing: Packing = flags.packing
    examples.check(tokenizer=tokenizer, seq_len=flags.seq_len, packing=packing)
    examples.check_data(tokenizer=tokenizer)
    lengths, scored = [], 0
    for number, chat in enumerate(examples.chats(tokenizer)):
        if number < flags.num:
            print(f"--- example {number + 1}, {len(chat.ids)} tokens")
            print(scored_text(chat, tokenizer))
        lengths.append(len(chat.ids) - 1)
        scored += sum(chat.is_answer)
    rows = examples.rows(tokenizer=tokenizer, seq_len=flags.seq_len, packing=packing)
    assert isinstance(rows, ExampleRows)
    print(
        f"--- {len(lengths):,} examples of {np.mean(lengths):.0f} tokens on average, "
        f"{max(lengths):,} at most; {100 * scored / sum(lengths):.0f}% scored; "
        f"{len(rows):,} rows of {flags.seq_len:,}, {100 * rows.fill:.0f}% full"
    )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
