import json
import subprocess
import sys

import pytest

from paxlike.data import stdlib_text


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("std")
    return folder, stdlib_text.write(str(folder), max_megabytes=3.0)


def read(folder, split):
    return [json.loads(line) for line in open(folder / f"{split}.jsonl")]


def test_held_out_files_are_kept_apart(written):
    folder, sizes = written
    train, heldout = read(folder, "train"), read(folder, "heldout")
    assert not {d["path"] for d in train} & {d["path"] for d in heldout}
    assert len({d["path"] for d in train}) == len(train)
    assert all(stdlib_text.is_held_out(d["path"]) for d in heldout)
    assert not any(stdlib_text.is_held_out(d["path"]) for d in train)
    assert sizes["train"] == sum(len(d["text"].encode()) for d in train)
    assert 1.5e6 < sizes["train"] + sizes["heldout"] <= 3e6
    assert all(d["text"].strip() for d in train + heldout)


def test_it_holds_out_about_three_per_cent():
    held = sum(stdlib_text.is_held_out(f"lib/module_{i}.py") for i in range(20_000))
    assert 500 < held < 700


def test_sources_and_documentation_without_tests():
    paths = {document.path for document in stdlib_text.documents()}
    assert {"argparse.py", "json/decoder.py", "pydoc_data/topics/lambda"} <= paths
    assert not [p for p in paths if "site-packages" in p or p.startswith(("test/", "encodings/"))]
    assert "pydoc_data/topics.py" not in paths


def test_another_process_writes_the_same_and_touches_nothing(written):
    folder, _ = written
    before = [(folder / f"{s}.jsonl").stat().st_mtime_ns for s in ("train", "heldout")]
    command = [sys.executable, "-m", "paxlike.data.stdlib_text", "--output", str(folder)]
    done = subprocess.run([*command, "--max_megabytes", "3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train.jsonl" in done.stdout
    assert before == [(folder / f"{s}.jsonl").stat().st_mtime_ns for s in ("train", "heldout")]


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="no text for train and heldout .*max_megabytes=1e-06"):
        stdlib_text.write(str(tmp_path), max_megabytes=1e-6)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="error: cannot write to .*file"):
        stdlib_text.main(["--output", str(tmp_path / "file"), "--max_megabytes", "2"])
