import gzip
import json

import pytest
import zstandard

from paxlike.data.records import read_records
from paxlike.data.sources import JsonLines

RECORDS = [{"a": "x", "n": 1}, {"a": "é", "list": [{"b": True}]}]
LINES = b"\n".join(json.dumps(r).encode() for r in RECORDS)


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_json_lines_plain_and_compressed(tmp_path, ending):
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[ending]
    path = tmp_path / f"r.jsonl{ending}"
    path.write_bytes(pack(LINES.replace(b"\n", b"\n\n")))
    assert list(read_records(JsonLines(str(path)))) == [
        (f"{path}, line 1", RECORDS[0]),
        (f"{path}, line 3", RECORDS[1]),
    ]


def test_several_files_and_a_list(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(RECORDS, indent=1))
    (tmp_path / "b.jsonl").write_bytes(LINES)
    found = list(read_records(JsonLines(f"{tmp_path}/*.json, {tmp_path}/b.jsonl")))
    assert [record for _, record in found] == RECORDS * 2
    assert found[1][0] == f"{tmp_path}/a.json, record 2"


def test_half_a_character_is_replaced(tmp_path):
    (tmp_path / "h.jsonl").write_text('{"a": ["x\\ud83d"], "b": "\\ud83d\\ude42"}')
    ((_, record),) = read_records(JsonLines(f"{tmp_path}/h.jsonl"))
    assert record == {"a": ["x\ufffd"], "b": "🙂"}


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"a": 1}\n{"a": ', "e.jsonl, line 2: not JSON"),
        ('{"a": 1}\n\n3', "e.jsonl, line 3: a int and no JSON object"),
        ('[{"a": 1}, "b"]', "e.jsonl, record 2: a str and no JSON object"),
        ("[1, 2", "e.jsonl: not JSON"),
    ],
)
def test_bad_records_are_named(tmp_path, text, message):
    (tmp_path / "e.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        list(read_records(JsonLines(f"{tmp_path}/e.jsonl")))
    assert "\n" not in str(error.value)
