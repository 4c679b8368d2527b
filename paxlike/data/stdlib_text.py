"""Real text with no download: sources and documentation of the running Python installation.

    python -m paxlike.data.stdlib_text --output DIR

writes DIR/train.jsonl and DIR/heldout.jsonl (key `text`): library modules, the help topics of pydoc
(the language reference in English) and the other texts that lie in the library. The choice depends
on nothing but the Python version: files are taken in the order of a hash of their relative path,
and a second hash holds about 3 % of them out, whole, so that no part of a held-out file is trained
on.
"""

import dataclasses
import hashlib
import importlib
import json
import os
import sysconfig
from collections.abc import Iterator

from paxlike.arguments import ArgumentParser
from paxlike.data.progress import Progress

_ENDINGS = (".py", ".txt", ".rst", ".md", ".tcl", ".css", ".js", ".html")
_LEFT_OUT = {
    "__pycache__",
    "site-packages",
    "dist-packages",
    "encodings",  # tables of characters, much alike: held-out ones would be all but known
    "test",
    "tests",
    "idle_test",
}


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and where in the library it comes from."""

    path: str
    text: str


def documents(*, max_megabytes: float = 16.0, tests: bool = False) -> Iterator[Document]:
    """Documents of the library, up to `max_megabytes` of UTF-8; `tests` takes its tests too."""
    room = max_megabytes * 1e6
    for document in sorted(_all(tests), key=lambda d: _hash("order", d.path)):
        size = len(document.text.encode())
        if size <= room:
            room -= size
            yield document


def is_held_out(path: str, *, percent: float = 3.0) -> bool:
    """Whether a document is kept apart for evaluation: a function of its relative path alone."""
    return _hash("held out", path) % 10_000 < percent * 100


def write(
    output: str,
    *,
    max_megabytes: float = 16.0,
    heldout_percent: float = 3.0,
    tests: bool = False,
) -> dict[str, int]:
    """Writes train.jsonl and heldout.jsonl into the folder `output`; returns bytes of text of each.

    Files that hold the same already are left as they are, so caches that are made from them stay
    valid.
    """
    lines: dict[str, list[str]] = {"train": [], "heldout": []}
    sizes = {"train": 0, "heldout": 0}
    with Progress("reading the Python library", unit="bytes") as progress:
        for document in documents(max_megabytes=max_megabytes, tests=tests):
            split = "heldout" if is_held_out(document.path, percent=heldout_percent) else "train"
            lines[split].append(json.dumps(dataclasses.asdict(document)))
            sizes[split] += len(document.text.encode())
            progress.set(sum(sizes.values()))
    empty = [split for split in lines if not lines[split]]
    if empty:
        raise ValueError(
            f"no text for {' and '.join(empty)} in {sysconfig.get_path('stdlib')} with "
            "max_megabytes="
            f"{max_megabytes:g} and heldout_percent={heldout_percent:g}: raise them"
        )
    try:
        os.makedirs(output, exist_ok=True)
        for split, rows in lines.items():
            _replace(os.path.join(output, f"{split}.jsonl"), "\n".join(rows) + "\n")
    except OSError as error:
        raise ValueError(f"cannot write to {output}: {error.strerror}") from None
    return sizes


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m paxlike.data.stdlib_text", description=__doc__)
    parser.add_argument("--output", required=True, help="folder for train.jsonl and heldout.jsonl")
    parser.add_argument("--max_megabytes", type=float, default=16.0, help="text in all")
    parser.add_argument("--heldout_percent", type=float, default=3.0, help="of the documents")
    parser.add_argument("--tests", action="store_true", help="take the library's tests too")
    flags = parser.parse_args(arguments)
    try:
        sizes = write(
            flags.output,
            max_megabytes=flags.max_megabytes,
            heldout_percent=flags.heldout_percent,
            tests=flags.tests,
        )
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    for split, size in sizes.items():
        print(f"{os.path.join(flags.output, split)}.jsonl: {size / 1e6:.2f} MB of text")


def _all(tests: bool) -> Iterator[Document]:
    yield from _topics()
    root = sysconfig.get_path("stdlib")
    left_out = _LEFT_OUT - {"test", "tests", "idle_test"} if tests else _LEFT_OUT
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - left_out)
        for name in sorted(names):
            path = os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")
            if not name.endswith(_ENDINGS) or path == "pydoc_data/topics.py":
                continue
            try:
                with open(os.path.join(folder, name), encoding="utf-8", newline="") as file:
                    text = file.read()
            except (UnicodeDecodeError, OSError):
                continue  # a few tests are in other encodings on purpose, or unreadable
            if text.strip() and "\0" not in text:
                yield Document(path, text)


def _topics() -> Iterator[Document]:
    """The help topics, which pydoc keeps as one module of long strings."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions leave them out
        return
    for name, text in sorted(topics.items()):
        yield Document(f"pydoc_data/topics/{name}", text)


def _hash(purpose: str, path: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{purpose}/{path}".encode()).digest()[:8], "big")


def _replace(path: str, text: str) -> None:
    """Writes a file, whole or not at all, unless it holds this text."""
    if os.path.exists(path):
        with open(path, encoding="utf-8", newline="") as file:
            if file.read() == text:
                return
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


if __name__ == "__main__":
    main()
