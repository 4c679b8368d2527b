"""Trains a SentencePiece model: python -m paxlike.data.train_tokenizer --help."""

from collections.abc import Iterator

from paxlike.arguments import ArgumentParser
from paxlike.data.commands import add_source_flags, source_from_flags
from paxlike.data.progress import Progress
from paxlike.data.sources import DocumentSource
from paxlike.data.tokenizers import train_sentencepiece


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m paxlike.data.train_tokenizer",
        description="Trains a byte-fallback BPE model that gives every text back exactly.",
    )
    add_source_flags(parser)
    parser.add_argument("--vocab_size", type=int, required=True, help="ids, special ones included")
    parser.add_argument("--output", required=True, help="the model file to write")
    parser.add_argument(
        "--max_megabytes", type=float, default=100.0, help="of text; the first documents are taken"
    )
    flags = parser.parse_args(arguments)
    try:
        source = source_from_flags(flags)
        with Progress("reading text for the tokenizer", unit="bytes") as progress:
            texts = list(_texts(source, flags.max_megabytes * 1e6, progress))
        print(f"training {flags.vocab_size} pieces on {len(texts)} documents", flush=True)
        tokenizer = train_sentencepiece(texts, output=flags.output, vocab_size=flags.vocab_size)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    sample = texts[:200]
    tokens = sum(map(len, tokenizer.encode_batch(sample)))
    size = sum(len(text.encode()) for text in sample)
    print(f"{flags.output}: {tokenizer.vocab_size} ids, {size / tokens:.2f} bytes per token")


def _texts(source: DocumentSource, room: float, progress: Progress) -> Iterator[str]:
    """Documents up to `room` bytes, none cut."""
    size = 0
    for part in source.parts():
        for text in source.read(part):
            size += len(text.encode())
            if size > room:
                return
            progress.set(size)
            yield text


if __name__ == "__main__":
    main()
