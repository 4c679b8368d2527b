"""Records of JSON lines and TFDS data sets, one by one, each with where it stands.

The token cache wants texts in parts; tasks with several fields want records, and messages that name
the file and line of a bad one.
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from paxlike.data.files import list_files, open_maybe_compressed
from paxlike.data.sources import JsonLines, TfdsSource

Record = dict[str, Any]
RecordSource = JsonLines | TfdsSource


def read_records(source: RecordSource) -> Iterator[tuple[str, Record]]:
    """(where, record) of every record, in stored order; `text_key` plays no part.

    A file that begins with `[` is one JSON list of records. Text of TFDS is decoded.
    """
    if isinstance(source, TfdsSource):
        for number, record in enumerate(source.records()):
            yield f"{source.name} {source.split}, record {number}", _plain(record)
        return
    for path in list_files(source.paths):
        yield from _json_records(path)


def name_of(source: RecordSource) -> str:
    """A source in messages."""
    if isinstance(source, TfdsSource):
        return f"TFDS data set {source.name} {source.split}"
    return source.paths


def _json_records(path: str) -> Iterator[tuple[str, Record]]:
    with open_maybe_compressed(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.lstrip().startswith(b"["):
                yield from _json_list(path, line + file.read())
                return
            if line.strip():
                where = f"{path}, line {number}"
                yield where, _record(_parse(line, where), where)


def _json_list(path: str, text: bytes) -> Iterator[tuple[str, Record]]:
    for number, value in enumerate(_parse(text, path), 1):
        where = f"{path}, record {number}"
        yield where, _record(value, where)


def _parse(text: bytes, where: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    return _plain(value) if b"\\ud" in text or b"\\uD" in text else value


def _record(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: a {type(value).__name__} and no JSON object {{...}}")
    return value


def _plain(value: Any) -> Any:
    """Text, numbers, lists and dicts of Python, of what TFDS gives; without halves of characters."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
