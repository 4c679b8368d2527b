import dataclasses
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
from data.data_helpers import TEXTS, write_json_lines

from paxlike.data import prepare, token_cache
from paxlike.data.sources import JsonLines, TextFiles
from paxlike.data.token_cache import cache_folder, open_or_build
from paxlike.data.token_stream import TokenStream
from paxlike.data.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer()


@dataclasses.dataclass(frozen=True)
class Breaking(JsonLines):
    """A source whose part `breaks_at` cannot be read while the file `broken` is there."""

    breaks_at: int = 2
    broken: str = ""
    log: str = ""

    def read(self, part):
        number = self.parts().index(part)
        with open(self.log, "a") as file:
            file.write(f"{number}\n")
        for text in super().read(part):
            yield text
            if number == self.breaks_at and os.path.exists(self.broken):
                raise OSError(5, "Input/output error")


@pytest.fixture
def source(tmp_path):
    return JsonLines(write_json_lines(tmp_path / "a.jsonl", TEXTS * 5), part_bytes=100)


def expected(texts):
    return [i for text in texts if text for i in [*TOKENIZER.encode(text), TOKENIZER.eos_id]]


def test_stream_is_every_document_with_its_end(source, tmp_path):
    stream = open_or_build(source, TOKENIZER, str(tmp_path / "cache"))
    assert len(stream.shards) > 5
    assert stream.tokens(0, stream.num_tokens).tolist() == expected(TEXTS * 5)
    assert stream.num_documents == 5 * (len(TEXTS) - 1)  # empty texts are no documents
    texts = [text for text in TEXTS * 5 if text]
    for index, text in enumerate(texts):
        start, stop = stream.document(index)
        assert TOKENIZER.decode(stream.tokens(start, stop)) == text
    starts = np.cumsum([0] + [len(text.encode()) + 1 for text in texts])[:-1]
    for low, high in [(0, stream.num_tokens), (1, 60), (11, 11 + 1), (37, 150)]:
        found = stream.document_starts(low, high).tolist()
        assert found == [s for s in starts.tolist() if low <= s < high]


def test_a_fraction_of_the_documents(source, tmp_path):
    cache = str(tmp_path / "cache")
    head = open_or_build(source, TOKENIZER, cache, documents=(0.0, 0.8))
    tail = open_or_build(source, TOKENIZER, cache, documents=(0.8, 1.0))
    both = [*head.tokens(0, head.num_tokens), *tail.tokens(0, tail.num_tokens)]
    assert both == expected(TEXTS * 5)
    assert (head.num_documents, tail.num_documents) == (20, 5)
    assert tail.document_starts(0, tail.num_tokens)[0] == 0
    with pytest.raises(
        ValueError, match=r"documents=\(0.41, 0.42\) keeps none of the 25 documents"
    ):
        open_or_build(source, TOKENIZER, cache, documents=(0.41, 0.42))


def test_ids_take_two_bytes_or_four(source, tmp_path):
    wide = dataclasses.make_dataclass("Wide", [], bases=(ByteTokenizer,), frozen=True)
    wide.eos_id = 70_000
    wide.digest = lambda self: "wide"
    stream = open_or_build(source, wide(), str(tmp_path / "cache"))
    assert stream.tokens(0, stream.num_tokens).max() == 70_000
    small = open_or_build(source, TOKENIZER, str(tmp_path / "cache"))
    size = {np.load(f"{s.folder}/shard_00000.tokens.npy").dtype.itemsize for s in (stream, small)}
    assert size == {2, 4}


@pytest.mark.parametrize(
    "breaks_at, message",
    [
        (2, "json_lines cannot be read: .*Input/output error"),
        (-1, "cannot write the token cache in .*No space left"),
    ],
)
def test_interrupted_it_goes_on_at_the_first_missing_part(
    tmp_path, monkeypatch, breaks_at, message
):
    path, broken, log = (str(tmp_path / name) for name in ("a.jsonl", "broken", "log"))
    write_json_lines(tmp_path / "a.jsonl", TEXTS * 5)
    source = Breaking(path, part_bytes=100, breaks_at=breaks_at, broken=broken, log=log)
    open(broken, "w").close()

    def full_disk(fd):
        if pathlib.Path(log).read_text().endswith("2\n") and os.path.exists(broken):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(ValueError, match=message) as error:
        open_or_build(source, TOKENIZER, str(tmp_path / "cache"))
    assert "\n" not in str(error.value)
    folder = cache_folder(source, TOKENIZER, str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError):
        TokenStream.open(folder)
    os.remove(broken)
    stream = open_or_build(source, TOKENIZER, str(tmp_path / "cache"))
    assert stream.tokens(0, stream.num_tokens).tolist() == expected(TEXTS * 5)
    reads = pathlib.Path(log).read_text().split()
    assert reads == ["0", "1", "2", *map(str, range(2, len(stream.shards)))]
    assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]


@pytest.mark.parametrize(
    "name, size, message",
    [
        ("shard_00001.tokens.npy", 130, "shard_00001.tokens.npy has 130 bytes of "),
        ("shard_00000.ends.npy", 0, "shard_00000.ends.npy has 0 bytes of "),
        ("shard_00002.tokens.npy", None, "shard_00002.tokens.npy is gone"),
        ("cache.json", 9, "cache.json: JSONDecodeError"),
    ],
)
def test_what_is_damaged_is_built_again(source, tmp_path, capsys, name, size, message):
    whole = open_or_build(source, TOKENIZER, str(tmp_path / "cache"))
    path = f"{whole.folder}/{name}"
    os.remove(path) if size is None else os.truncate(path, size)
    with pytest.raises(ValueError, match=r"the token cache .* is damaged \(.*\): delete it"):
        TokenStream.open(whole.folder)
    capsys.readouterr()
    stream = open_or_build(source, TOKENIZER, str(tmp_path / "cache"))
    assert f"{whole.folder} is damaged ({message}" in capsys.readouterr().out
    assert stream == whole
    assert stream.tokens(0, stream.num_tokens).tolist() == expected(TEXTS * 5)
    if name.endswith("tokens.npy"):  # damaged after it was opened
        with open(path, "rb+") as file:
            file.write(b"?" * 20)
        with pytest.raises(ValueError, match="is damaged .*: delete it"):
            again = TokenStream.open(whole.folder)
            again.tokens(0, again.num_tokens)


def test_killed_while_it_builds(tmp_path):
    """kill -9 in the middle: the lock is free, what was whole is kept, the rest is built."""
    path = write_json_lines(tmp_path / "a.jsonl", TEXTS * 5)
    code = f"""
import time
from paxlike.data import token_cache
from paxlike.data.sources import JsonLines
from paxlike.data.tokenizers import ByteTokenizer
write = token_cache._write_shard
def slow(source, tokenizer, folder, index, *rest):
    if index == 3:
        open(folder + "/shard_00003.x-1.tokens.tmp", "w").close()
        print("there", flush=True)
        time.sleep(60)
    write(source, tokenizer, folder, index, *rest)
token_cache._write_shard = slow
token_cache.open_or_build(JsonLines({path!r}, part_bytes=100), ByteTokenizer(), {str(tmp_path)!r})
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "there\n"
    process.kill()
    process.wait()
    source = JsonLines(path, part_bytes=100)
    folder = cache_folder(source, TOKENIZER, str(tmp_path))
    kept = os.stat(f"{folder}/shard_00002.tokens.npy").st_mtime_ns
    stream = open_or_build(source, TOKENIZER, str(tmp_path))
    assert os.stat(f"{folder}/shard_00002.tokens.npy").st_mtime_ns == kept
    assert stream.tokens(0, stream.num_tokens).tolist() == expected(TEXTS * 5)


def _open_and_count(path, cache, first, results):
    source = JsonLines(path, part_bytes=100)
    stream = open_or_build(source, ByteTokenizer(), cache, is_first=first)
    results.put((stream.num_tokens, stream.digest))


def test_many_processes_at_the_same_time(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", TEXTS * 40)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    started = [
        context.Process(target=_open_and_count, args=(path, str(tmp_path / "c"), i != 2, results))
        for i in range(3)  # two unrelated runs, and one that is not process 0
    ]
    for process in started:
        process.start()
    found = {results.get(timeout=120) for _ in started}
    for process in started:
        process.join()
        assert process.exitcode == 0
    assert len(found) == 1
    assert found.pop()[0] == len(expected(TEXTS * 40))


def test_worker_processes_give_the_same_files(source, tmp_path):
    streams = [
        open_or_build(source, TOKENIZER, str(tmp_path / f"c{n}"), num_workers=n) for n in (0, 2)
    ]
    assert streams[0].digest == streams[1].digest
    assert streams[0].shards == streams[1].shards
    (tmp_path / "a.txt.gz").write_bytes(b"text")
    with pytest.raises(ValueError, match="a.txt.gz cannot be read: Not a gzipped file") as error:
        open_or_build(TextFiles(f"{tmp_path}/a.txt.gz"), TOKENIZER, str(tmp_path), num_workers=1)
    assert error.traceback[-1].path == pathlib.Path(token_cache.__file__)  # so main.py shows a line


def test_waiting_for_a_process_that_does_nothing(source, tmp_path):
    folder = cache_folder(source, TOKENIZER, str(tmp_path))
    os.makedirs(folder)
    with token_cache._lock(folder) as mine:
        assert mine
        begun = time.monotonic()
        with pytest.raises(
            TimeoutError, match=r"waited .* s for another process to finish .*prepare"
        ):
            open_or_build(source, TOKENIZER, str(tmp_path), patience=0.5)
        assert time.monotonic() - begun < 30


def test_another_tokenizer_or_other_text_is_another_cache(source, tmp_path):
    first = open_or_build(source, TOKENIZER, str(tmp_path / "cache"))
    other = dataclasses.make_dataclass("Other", [], bases=(ByteTokenizer,), frozen=True)
    other.digest = lambda self: "other"
    assert open_or_build(source, other(), str(tmp_path / "cache")).folder != first.folder
    write_json_lines(tmp_path / "a.jsonl", ["changed"])
    changed = open_or_build(source, TOKENIZER, str(tmp_path / "cache"))
    assert changed.folder != first.folder
    assert changed.digest != first.digest
    assert changed.num_documents == 1


def test_digest_is_of_the_tokens_not_of_the_place(source, tmp_path):
    first = open_or_build(source, TOKENIZER, str(tmp_path / "cache"))
    os.makedirs(tmp_path / "moved")
    moved = write_json_lines(tmp_path / "moved" / "b.jsonl", TEXTS * 5)
    again = open_or_build(JsonLines(moved, part_bytes=100), TOKENIZER, str(tmp_path / "cache"))
    assert again.folder != first.folder
    assert again.digest == first.digest


def test_nothing_to_read_and_nowhere_to_write(tmp_path):
    empty = write_json_lines(tmp_path / "a.jsonl", ["", ""])
    with pytest.raises(ValueError, match="no text in JsonLines"):
        open_or_build(JsonLines(empty), TOKENIZER, str(tmp_path / "cache"))
    full = write_json_lines(tmp_path / "b.jsonl", ["x"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write the token cache in .*Set cache_dir"):
        open_or_build(JsonLines(full), TOKENIZER, str(tmp_path / "file"))


def test_command_builds_what_the_loader_reads(source, tmp_path, capsys):
    cache = str(tmp_path / "cache")
    arguments = ["--tokenizer", "bytes", "--cache_dir", cache]
    prepare.main(["--input", source.paths, *arguments])
    assert "25 documents" in capsys.readouterr().out
    folder = cache_folder(JsonLines(source.paths), TOKENIZER, cache)
    assert json.loads(pathlib.Path(folder, "cache.json").read_text())["documents"] == 25
    with pytest.raises(SystemExit, match="error: no file matches"):
        prepare.main(["--input", "/none/*.jsonl", *arguments])
    with pytest.raises(SystemExit, match=r"error: num_workers=-1 \(TOKENIZE_WORKERS\) must be 0"):
        prepare.main(["--input", source.paths, *arguments, "--workers", "-1"])
    with pytest.raises(SystemExit, match="error: .* is a folder: write "):
        prepare.main(["--input", str(tmp_path), *arguments])


def test_progress_is_lines_where_there_is_no_terminal(source, tmp_path, capsys):
    open_or_build(source, TOKENIZER, str(tmp_path / "cache"))
    line = capsys.readouterr().err
    assert line.startswith(f"tokenising json_lines: {len(expected(TEXTS * 5)):,} tokens")
    assert "\r" not in line
