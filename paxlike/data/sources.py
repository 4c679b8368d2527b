"""Where documents come from: text files, JSON lines, both together, and TFDS data sets.

A source is a frozen value that opens nothing when it is made. It divides its documents into parts:
units of work in a fixed order that are tokenised, resumed and spread over processes independently.
The documents of a part come in a fixed order too, so a source is one well-defined list of texts.
"""

import dataclasses
import functools
import glob
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from paxlike.data.files import (
    decode_text,
    is_compressed,
    is_json_lines,
    list_files,
    open_maybe_compressed,
)

_MAX_PARTS = 256  # a part becomes two open files of the token cache


@dataclasses.dataclass(frozen=True)
class Part:
    """A unit of work: items `start` to `stop` (files or records), of `size` bytes or records."""

    start: int
    stop: int
    size: int


@runtime_checkable
class DocumentSource(Protocol):
    """A list of texts, in parts."""

    @property
    def name(self) -> str:
        """A short name for folders and messages."""

    def parts(self) -> list[Part]: ...

    def read(self, part: Part) -> Iterator[str]:
        """The documents of a part, in order."""

    def fingerprint(self) -> dict[str, Any]:
        """JSON-able facts that change when the documents change."""


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """One document per file.

    `paths`: a glob pattern (`**` for any depth) or several, comma-separated.
    """

    paths: str
    part_bytes: int = 32 << 20

    @property
    def name(self) -> str:
        return "text"

    def parts(self) -> list[Part]:
        return _group([os.path.getsize(path) for path in list_files(self.paths)], self.part_bytes)

    def read(self, part: Part) -> Iterator[str]:
        for path in list_files(self.paths)[part.start : part.stop]:
            yield _whole_text(path)

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "text", "files": _facts(self.paths), "part_bytes": self.part_bytes}


@dataclasses.dataclass(frozen=True)
class JsonLines:
    """One document per line: the string under `text_key` of a JSON object.

    `paths`: a glob pattern or several, comma-separated; `.gz` and `.zst` are read as such. A plain
    file is divided into parts of `part_bytes`, a compressed one is a part as a whole.
    """

    paths: str
    text_key: str = "text"
    part_bytes: int = 64 << 20

    @property
    def name(self) -> str:
        return "json_lines"

    def parts(self) -> list[Part]:
        return _group([stop - start for _, start, stop in self._units()], self.part_bytes)

    def read(self, part: Part) -> Iterator[str]:
        for path, start, stop in self._units()[part.start : part.stop]:
            yield from _texts_of_lines(path, start, stop, self.text_key)

    def fingerprint(self) -> dict[str, Any]:
        return {
            "kind": "json_lines",
            "files": _facts(self.paths),
            "text_key": self.text_key,
            "part_bytes": self.part_bytes,
        }

    def _units(self) -> list[tuple[str, int, int]]:
        """(path, first byte, last byte) of pieces of files."""
        units = []
        for path in list_files(self.paths):
            size = os.path.getsize(path)
            # The size of a piece does not depend on the other files: it is part of the order.
            step = max(self.part_bytes, -(-size // _MAX_PARTS)) if self._divides(path) else size
            units += [(path, at, min(at + step, size)) for at in range(0, size, max(step, 1))]
        return units

    def _divides(self, path: str) -> bool:
        return not is_compressed(path)


@dataclasses.dataclass(frozen=True)
class MixedFiles(JsonLines):
    """JSON lines and text files side by side, in the order of `paths`, each read as what it is."""

    @property
    def name(self) -> str:
        return "files"

    def read(self, part: Part) -> Iterator[str]:
        for path, start, stop in self._units()[part.start : part.stop]:
            if is_json_lines(path):
                yield from _texts_of_lines(path, start, stop, self.text_key)
            else:
                yield _whole_text(path)

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | {"kind": "files"}

    def _divides(self, path: str) -> bool:
        return super()._divides(path) and is_json_lines(path)


@dataclasses.dataclass(frozen=True)
class Files:
    """Files of either kind: JSON lines or one document each, by the names of the files found.

    It looks for them when it is asked for documents, not before. Where all are of one kind, it is
    `TextFiles` or `JsonLines` in all that it does; `part_bytes` None is theirs. The token cache is
    that of `found`.
    """

    paths: str
    text_key: str = "text"
    part_bytes: int | None = None

    @property
    def name(self) -> str:
        return "files"  # without looking: it is asked for when a loader is made

    def parts(self) -> list[Part]:
        return self.found.parts()

    def read(self, part: Part) -> Iterator[str]:
        return self.found.read(part)

    def fingerprint(self) -> dict[str, Any]:
        return self.found.fingerprint()

    @functools.cached_property
    def found(self) -> TextFiles | JsonLines:
        """The source of the kind that the files are of."""
        kinds = {is_json_lines(path) for path in list_files(self.paths)}
        size = {} if self.part_bytes is None else {"part_bytes": self.part_bytes}
        if kinds == {False}:
            return TextFiles(self.paths, **size)
        kind = JsonLines if kinds == {True} else MixedFiles
        return kind(self.paths, self.text_key, **size)


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """A split of a TFDS data set prepared as array_record; TensorFlow is not needed.

    `name` may carry a config and a version (`the_pile/lm:1.0.0`), `split` a slice (`train[:1%]`).
    `data_dir` None is the folder TFDS itself uses. `files_knob` names, where the data set is missing,
    the knob that takes files in its place.
    """

    name: str
    split: str = "train"
    data_dir: str | None = None
    text_key: str = "text"
    part_records: int = 32768
    files_knob: str = "TRAIN_FILES, EVAL_FILES"

    def parts(self) -> list[Part]:
        count = len(self.records())
        step = max(self.part_records, -(-count // _MAX_PARTS))
        return [
            Part(at, min(at + step, count), min(step, count - at)) for at in range(0, count, step)
        ]

    def read(self, part: Part) -> Iterator[str]:
        records = self.records()
        for i in range(part.start, part.stop):
            record = records[i]
            if self.text_key not in record:
                raise ValueError(
                    f"TFDS data set {self.name!r} has no feature {self.text_key!r}, only "
                    f"{sorted(record)}: set text_key"
                )
            yield as_text(record[self.text_key])

    def fingerprint(self) -> dict[str, Any]:
        builder = self._builder()
        splits = {
            name: [split.num_examples, split.num_bytes, list(split.shard_lengths or ())]
            for name, split in builder.info.splits.items()
        }
        return {
            "kind": "tfds",
            "name": builder.info.full_name,
            "split": self.split,
            "splits": splits,
            "text_key": self.text_key,
            "part_records": self.part_records,
        }

    def records(self) -> Sequence[dict[str, Any]]:
        """The records of the split, by index."""
        builder = self._builder()
        try:
            return builder.as_data_source(split=self.split)
        except Exception as error:  # TFDS raises its own kinds; every one ends here as one line
            if self.split.split("[")[0] in builder.info.splits:
                raise ValueError(
                    f"TFDS data set {self.name!r} in {builder.data_path}: split {self.split!r} "
                    f"cannot be read: {' '.join(str(error).split())[:300]}"
                ) from error
            raise ValueError(
                f"TFDS data set {self.name!r} has no split {self.split!r}, only "
                f"{sorted(builder.info.splits)}"
            ) from None

    def _builder(self) -> Any:
        """The prepared builder, read from its folder: its code need not be at hand."""
        import tensorflow_datasets as tfds  # here: it takes a second that most runs need not pay

        data_dir = os.path.expanduser(str(self.data_dir or tfds.core.constants.DATA_DIR))
        wanted = f"TFDS data set {self.name!r} (split {self.split!r}) in {data_dir}"
        try:
            folder = _tfds_folder(data_dir, self.name)
            builder = tfds.builder_from_directory(folder)
        except (FileNotFoundError, NotADirectoryError):
            there = ", ".join(tfds_datasets(data_dir)) or "none"
            raise ValueError(
                f"found no {wanted}; data sets there: {there}. Set TFDS_DATA_DIR, run the "
                f"scripts/download_*.py of that data set, or name files with {self.files_knob}"
            ) from None
        if builder.info.file_format.value != "array_record":
            raise ValueError(
                f"{wanted} is stored as {builder.info.file_format.value}: prepare it again as "
                "array_record (scripts/download_*.py do), which is read without TensorFlow"
            )
        return builder


def tfds_datasets(data_dir: str) -> list[str]:
    """Names of the prepared TFDS data sets in a folder, as `name[/config]:version`."""
    found = []
    for pattern in ("*/*", "*/*/*"):
        for path in glob.glob(os.path.join(data_dir, pattern, "dataset_info.json")):
            name, version = os.path.split(os.path.relpath(os.path.dirname(path), data_dir))
            found.append(f"{name}:{version}")
    return sorted(found)


def as_text(value: Any) -> str:
    """A text feature of TFDS, which comes as bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _tfds_folder(data_dir: str, name: str) -> str:
    """data_dir/name[/config]/version: the newest version, a lone config, where not named."""
    name, _, version = name.partition(":")
    folder = os.path.join(data_dir, name)
    if version:
        return os.path.join(folder, version)
    candidates = sorted(
        glob.glob(os.path.join(folder, "*", "dataset_info.json"))
        or glob.glob(os.path.join(folder, "*", "*", "dataset_info.json")),
        key=lambda path: [int(p) if p.isdigit() else 0 for p in path.split(os.sep)[-2].split(".")],
    )
    configs = {os.path.dirname(os.path.dirname(path)) for path in candidates}
    if not candidates:
        raise FileNotFoundError(folder)
    if len(configs) > 1:
        raise ValueError(
            f"TFDS data set {name!r} in {data_dir} has several configs, "
            f"{sorted(os.path.basename(c) for c in configs)}: write {name}/CONFIG"
        )
    return os.path.dirname(candidates[-1])


def _facts(paths: str) -> list[list[Any]]:
    """Name, size and time of each file."""
    files = list_files(paths)
    return [[os.path.basename(p), os.path.getsize(p), os.stat(p).st_mtime_ns] for p in files]


def _group(sizes: list[int], target: int) -> list[Part]:
    """Consecutive items in groups of about `target`, at most `_MAX_PARTS` of them."""
    target = max(target, -(-sum(sizes) // (_MAX_PARTS // 2)))
    parts, start, size = [], 0, 0
    for i, item in enumerate(sizes):
        if size and size + item > target:
            parts.append(Part(start, i, size))
            start, size = i, 0
        size += item
    if sizes:
        parts.append(Part(start, len(sizes), size))
    return parts


def _whole_text(path: str) -> str:
    with open_maybe_compressed(path) as file:
        return decode_text(file.read(), path)


def _texts_of_lines(path: str, start: int, stop: int, text_key: str) -> Iterator[str]:
    """The texts of the JSON lines that begin at bytes `start` to `stop`."""
    for position, line in _lines(path, start, stop):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}: not JSON at byte {position}: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
            found = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(
                f"{path}: no string under {text_key!r} at byte {position}; the line has "
                f"{found}: set text_key"
            )
        text = record[text_key]
        if b"\\ud" in line or b"\\uD" in line:  # half a surrogate pair, which is no character
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        yield text


def _lines(path: str, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """The non-empty lines that begin at bytes `start` to `stop`, each with its position."""
    with open_maybe_compressed(path) as file:
        position = 0
        if not is_compressed(path):
            # A line that begins before `start` belongs to the piece before.
            file.seek(max(start - 1, 0))
            position = max(start - 1, 0)
            if start:
                position += len(file.readline())
        for line in file:
            if not is_compressed(path) and position >= stop:
                return
            if line.strip():
                yield position, line
            position += len(line)
