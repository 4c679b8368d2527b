import gzip
import json
import os

import pytest
import zstandard
from data.data_helpers import write_json_lines

from paxlike.data.sources import DocumentSource, Files, JsonLines, TextFiles, TfdsSource
from paxlike.data.token_cache import cache_folder
from paxlike.data.tokenizers import ByteTokenizer


def read(source):
    return [text for part in source.parts() for text in source.read(part)]


def test_text_files_one_document_each(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first é\r\n")
    (tmp_path / "sub" / "c.rst").write_text("third")
    (tmp_path / "sub" / "bad.rst").write_bytes(b"\xff ok")
    source = TextFiles(f"{tmp_path}/*.txt, {tmp_path}/**/*.rst")
    assert isinstance(source, DocumentSource)
    assert read(source) == ["first é\r\n", "second", "\ufffd ok", "third"]
    assert len(TextFiles(source.paths, part_bytes=1).parts()) == 4
    assert read(TextFiles(source.paths, part_bytes=1)) == read(source)


@pytest.mark.parametrize("part_bytes", [1, 7, 40, 1 << 20])
def test_json_lines_in_pieces_of_any_size(tmp_path, part_bytes):
    texts = [f"document {i} " + "x" * (i * 7 % 50) for i in range(40)]
    first = write_json_lines(tmp_path / "a.jsonl", texts[:25])
    with open(first, "a") as file:
        file.write("\n  \n")  # empty lines are not documents
    second = write_json_lines(tmp_path / "b.jsonl", texts[25:])
    with open(second, "rb+") as file:
        file.truncate(len(file.read()) - 1)  # no end of line at the end
    source = JsonLines(f"{tmp_path}/*.jsonl", part_bytes=part_bytes)
    assert read(source) == texts
    assert len(source.parts()) <= 256
    assert (len(source.parts()) > 1) == (part_bytes < 100)


def test_compressed_json_lines(tmp_path):
    texts = ["one", "two é", "three\nlines"]
    write_json_lines(tmp_path / "a.jsonl", texts, key="content")
    data = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data))
    frames = [zstandard.compress(line + b"\n") for line in data.splitlines()]
    frames.insert(1, b"\x50\x2a\x4d\x18\x02\0\0\0xx")  # a frame to be skipped
    (tmp_path / "c.jsonl.zst").write_bytes(b"".join(frames))  # several frames, as pzstd writes
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst"):
        assert read(JsonLines(str(tmp_path / name), "content", part_bytes=10)) == texts


def test_files_are_read_as_what_their_names_say(tmp_path):
    lines = {"a.jsonl": bytes, "b.json.gz": gzip.compress, "c.jsonlines.zst": zstandard.compress}
    for name, pack in lines.items():
        (tmp_path / name).write_bytes(pack(json.dumps({"body": name}).encode() + b"\n"))
    pure = JsonLines(f"{tmp_path}/*", "body")
    files = Files(pure.paths, "body")
    assert isinstance(files, DocumentSource)
    assert read(files) == read(pure) == list(lines)
    assert files.fingerprint() == pure.fingerprint()
    assert cache_folder(files, ByteTokenizer(), "") == cache_folder(pure, ByteTokenizer(), "")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"a text\nof two lines"))
    text = f"{tmp_path}/d.*"
    assert Files(text).fingerprint() == TextFiles(text).fingerprint()
    mixed = Files(f"{text}, {pure.paths}", "body", part_bytes=1)
    assert read(mixed) == ["a text\nof two lines", *lines, "a text\nof two lines"]
    assert mixed.fingerprint()["kind"] == "files"


def test_names_with_brackets_and_commas_are_files(tmp_path):
    folder = tmp_path / "br[1],x"
    folder.mkdir()
    (folder / "what?.txt").write_text("one")
    for paths in (f"{folder}/what?.txt", f"{tmp_path}/br[[]1],x/what?.txt".replace(",", "?")):
        assert read(Files(paths)) == ["one"]
    os.rename(folder, tmp_path / "br[1]")
    assert read(Files(f"{tmp_path}/br[1]/*.txt, {tmp_path}/br[1]/what?.txt")) == ["one"] * 2


@pytest.mark.parametrize(
    "name, data, message",
    [
        (
            "a.txt",
            b"\x7fELF\0\0",
            "is not text; UTF-8 text, plain or .* is read: it has zero bytes",
        ),
        (
            "a.txt.gz",
            gzip.compress(bytes(range(128, 255)), mtime=0),
            "100% of its characters are no UTF-8",
        ),
        ("a.jsonl.xz", b"", "a.jsonl.xz is not text"),
        ("a.tar.gz", gzip.compress(b"text", mtime=0), "a.tar.gz is not text"),
        ("a.txt.gz", gzip.compress(b"text" * 50, mtime=0)[:-9], "ends in the middle of its data"),
        ("a.jsonl.zst", zstandard.compress(b'{"text": "ab"}\n')[:-1], "ends in the middle of its"),
        ("a.txt.zst", zstandard.compress(b"a") + b"(\xb5", "ends in the middle of its data"),
        ("a.jsonl.gz", b"{}", "a.jsonl.gz cannot be read: Not a gzipped file"),
        ("a.txt.zst", b"plain text", "a.txt.zst cannot be read: zstd .*Unknown frame"),
        ("a.txt/b.txt", b"", r"a.txt' is a folder: write .*a.txt/\*.txt"),
    ],
    # Not the bytes: processes that share the tests have to give them the same names.
    ids=lambda value: "" if isinstance(value, bytes) else None,
)
def test_what_is_no_whole_text_is_refused(tmp_path, name, data, message):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read(Files(f"{tmp_path}/{name.partition('/')[0]}"))
    assert "\n" not in str(error.value)


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"text": "a\ud83d b \ud83d\ude42 \ud55c"}' + "\n")
    (text,) = read(JsonLines(str(path)))
    assert text == "a\ufffd b \U0001f642 \ud55c"
    text.encode()


def test_json_lines_errors(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ok"}\n{"body": "x", "id": 3}\n')
    with pytest.raises(
        ValueError, match=r"no string under 'text' at byte 15.*\['body', 'id'\].*text_key"
    ):
        read(JsonLines(str(path)))
    path.write_text('{"text": "ok"}\nnot json\n')
    with pytest.raises(ValueError, match=r"a\.jsonl: not JSON at byte 15"):
        read(JsonLines(str(path)))
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="the line has list"):
        read(JsonLines(str(path)))


def test_missing_files_say_what_is_there(tmp_path):
    (tmp_path / "train.json").write_text("")
    with pytest.raises(ValueError, match=r"no file matches .*/deep/\*\.jsonl.*holds train\.json"):
        JsonLines(f"{tmp_path}/deep/*.jsonl").parts()


def test_fingerprint_follows_the_data(tmp_path):
    path = tmp_path / "a.jsonl"
    write_json_lines(path, ["one"])
    source = JsonLines(str(path))
    before = source.fingerprint()
    assert before == json.loads(json.dumps(before)) == JsonLines(str(path)).fingerprint()
    write_json_lines(path, ["one", "two"])
    assert source.fingerprint() != before
    assert JsonLines(str(path), "other").fingerprint() != source.fingerprint()


def test_missing_tfds_data_set_names_those_there(tmp_path):
    with pytest.raises(
        ValueError, match=r"found no TFDS data set 'the_pile/lm' \(split 'train'\) in .*: none"
    ) as e:
        TfdsSource("the_pile/lm", data_dir=str(tmp_path)).parts()
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="or name files with LAMBADA_FILE$"):
        TfdsSource("x", data_dir=str(tmp_path), files_knob="LAMBADA_FILE").parts()
