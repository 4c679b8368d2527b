"""Builds the token cache ahead of a run: python -m paxlike.data.prepare --help."""

import os

from paxlike.arguments import ArgumentParser
from paxlike.data import token_cache
from paxlike.data.commands import add_source_flags, source_from_flags, tokenizer_from_flag


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m paxlike.data.prepare",
        description="Tokenises documents once; a run with the same source, tokenizer and cache_dir "
        "then begins at once. Interrupted, it goes on where it was.",
    )
    add_source_flags(parser)
    parser.add_argument("--tokenizer", required=True, help="SentencePiece model, or the word bytes")
    parser.add_argument("--eos_id", type=int, help="end-of-document id, where the model has none")
    parser.add_argument("--cache_dir", required=True, help="folder of token caches")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: threads of this one")
    flags = parser.parse_args(arguments)
    try:
        source = source_from_flags(flags)
        tokenizer = tokenizer_from_flag(flags.tokenizer, flags.eos_id)
        cache_dir = os.path.expanduser(flags.cache_dir)
        stream = token_cache.open_or_build(source, tokenizer, cache_dir, num_workers=flags.workers)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{stream.folder}: {stream.num_tokens:,} tokens, {stream.num_documents:,} documents")


if __name__ == "__main__":
    main()
