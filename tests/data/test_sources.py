import gzip
import json

import pytest
import zstandard
from data.data_helpers import write_json_lines

from paxlike.data.sources import DocumentSource, JsonLines, TextFiles, TfdsSource


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
    (tmp_path / "c.jsonl.zst").write_bytes(b"".join(frames))  # several frames, as pzstd writes
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst"):
        assert read(JsonLines(str(tmp_path / name), "content", part_bytes=10)) == texts


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
