"""Files of text: which ones a pattern names, how each is read, and what is refused as no text.

The name of a file says what it is: `.gz` and `.zst` are decompressed; below that ending `.jsonl`,
`.json` and `.jsonlines` are JSON lines, and whatever else is text. A file that is cut off, damaged
or not text ends in one line that names it: half of a file is never taken for the whole.
"""

import contextlib
import glob
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from typing import IO

import zstandard

_JSON_ENDINGS = (".jsonl", ".json", ".jsonlines")
_NO_TEXT = (
    *(".xz", ".lzma", ".bz2", ".lz4", ".zip", ".7z", ".rar", ".tar", ".tgz", ".tbz2"),
    *(".txz", ".tzst", ".parquet", ".arrow", ".feather", ".orc", ".avro", ".array_record"),
    *(".tfrecord", ".npy", ".npz", ".safetensors", ".pdf", ".docx", ".epub", ".png", ".jpg"),
)
_WHAT_IS_READ = "is not text; UTF-8 text, plain or as .gz or .zst, is read"
_BINARY_SHARE = 0.3  # of characters that are no UTF-8: 0.05 in German Latin-1, 0.5 in random bytes
_HEAD_BYTES = 8192  # where binary files show their zeros
_READ_BYTES = 1 << 14  # small, for what is made of it can be 30,000 times larger


def list_files(paths: str) -> list[str]:
    """The files that comma-separated glob patterns name, sorted within each pattern.

    A name that is a file as it stands is that file, whatever commas and brackets are in it. Raises
    ValueError where a pattern names no file, or one that is known not to be text by its ending.
    """
    files = []
    for pattern in [paths] if os.path.isfile(_expanded(paths)) else paths.split(","):
        pattern = _expanded(pattern)
        found = _matches(pattern)
        if not found and os.path.isdir(pattern):
            raise ValueError(
                f"{pattern!r} is a folder: write {os.path.join(pattern, '*.txt')} or what its files "
                "are called"
            )
        if not found:
            raise ValueError(f"no file matches {pattern!r}: {_what_is_there(pattern)}")
        files += found
    for path in files:
        if _plain_name(path).lower().endswith(_NO_TEXT):
            raise ValueError(f"{path} {_WHAT_IS_READ}")
    return files


@contextlib.contextmanager
def open_maybe_compressed(path: str) -> Iterator[IO[bytes]]:
    """A file for reading bytes, decompressed by its ending (.gz, .zst).

    Raises ValueError, naming the file, where it cannot be read or ends too early.
    """
    with named(path):
        if path.endswith(".gz"):
            with gzip.open(path) as file:
                yield io.BufferedReader(file)
        elif path.endswith(".zst"):
            with open_zst(path) as file:
                yield file
        else:
            with open(path, "rb") as file:
                yield file


@contextlib.contextmanager
def open_zst(path: str) -> Iterator[IO[bytes]]:
    """A file of zstandard frames, whatever its ending; raises ValueError as its sibling does."""
    with named(path), open(path, "rb") as file, io.BufferedReader(_Frames(file), 1 << 20) as reader:
        yield reader


@contextlib.contextmanager
def named(path: str) -> Iterator[None]:
    """Turns what goes wrong while a file is read into a ValueError that names it."""
    try:
        yield
    except EOFError:
        raise ValueError(f"{path} ends in the middle of its data: it is not complete") from None
    except (OSError, zlib.error, zstandard.ZstdError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read: {reason}") from error


def decode_text(data: bytes, path: str) -> str:
    """The text of a file; stray bytes become the replacement character.

    Raises ValueError where the data is not text: zeros at its beginning, or hardly any UTF-8.
    """
    if b"\0" in data[:_HEAD_BYTES]:
        raise ValueError(f"{path} {_WHAT_IS_READ}: it has zero bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("utf-8", "replace")
    share = text.count("\ufffd") / len(text)
    if share > _BINARY_SHARE:
        raise ValueError(f"{path} {_WHAT_IS_READ}: {share:.0%} of its characters are no UTF-8")
    return text


def is_compressed(path: str) -> bool:
    return path.endswith((".gz", ".zst"))


def is_json_lines(path: str) -> bool:
    return _plain_name(path).endswith(_JSON_ENDINGS)


class _Frames(io.RawIOBase):
    """What zstandard frames hold, one after the other.

    The reader of the library takes the end of a file in the middle of a frame for the end of the
    data. Here it is an EOFError.
    """

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._frame = self._decompressor.decompressobj()
        self._inside = False
        self._out = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._out:
            data = b""
            if self._frame.eof:
                data = self._frame.unused_data
                self._frame = self._decompressor.decompressobj()
                self._inside = False
            data = data or self._file.read(_READ_BYTES)
            if not data and self._inside:
                raise EOFError("the end of the file within a frame")
            if not data:
                return 0
            self._inside = True
            self._out = memoryview(self._frame.decompress(data))
        count = min(len(buffer), len(self._out))
        buffer[:count] = self._out[:count]
        self._out = self._out[count:]
        return count


def _plain_name(path: str) -> str:
    return path.removesuffix(".gz").removesuffix(".zst")


def _expanded(pattern: str) -> str:
    return os.path.expanduser(pattern.strip())


def _matches(pattern: str) -> list[str]:
    """The files of a pattern; a folder that is there by its very name is no pattern."""
    if os.path.isfile(pattern):
        return [pattern]
    found = glob.glob(pattern, recursive=True)
    folder, name = os.path.split(pattern)
    if not found and os.path.isdir(folder):
        found = glob.glob(os.path.join(glob.escape(folder), name))
    return sorted(path for path in found if os.path.isfile(path))


def _what_is_there(pattern: str) -> str:
    """What the first existing folder above a pattern holds: the usual mistake is one level off."""
    folder = os.path.dirname(os.path.abspath(pattern.split("*")[0].split("?")[0]))
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    names = sorted(os.listdir(folder))
    shown = ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
    return f"{folder} holds {shown or 'nothing'}"
