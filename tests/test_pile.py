"""Pax's path end to end on tiny data of the real form: prepare with TFDS, train on the Pile, evaluate LAMBADA."""

import json
import os
import subprocess
import sys

import pytest
import runs
import zstandard

SMALL = {
    **runs.TINY,
    "DIMS_PER_HEAD": 8,
    "MAX_SEQ_LEN": 96,
    "MAX_STEPS": 4,
    "LR_COS_WARMUP": 1,
    "LR_COS_DECAY_START": 2,
    "EVAL_ON_TEST": True,
    "EVAL_INTERVAL_STEPS": 4,
    "EVAL_SETS": "['PileValidation','LambadaValidation']",
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A Pile and a LAMBADA of a few documents, prepared by the scripts, and a tokenizer."""
    folder = tmp_path_factory.mktemp("pile")
    knobs = runs.write_text(folder)
    lines = (folder / "train.jsonl").read_text().splitlines()
    raw = folder / "raw"
    raw.mkdir()
    for name in (*(f"{i:02d}" for i in range(30)), "val", "test"):
        text = "\n".join(
            json.dumps({"text": json.loads(line)["text"][:400], "meta": {}}) for line in lines[:4]
        )
        (raw / f"{name}.jsonl.zst").write_bytes(zstandard.compress(text.encode()))
    passages = [
        "She looked at the cat and the cat looked at her",
        "One and two and three, then “four” and five",
    ]
    (raw / "lambada_test.jsonl").write_text(
        "".join(json.dumps({"text": p}) + "\n" for p in passages * 3)
    )
    for script in ("download_the_pile.py", "download_lambada.py"):
        subprocess.run(
            [sys.executable, f"scripts/{script}", "--source", raw, "--data_dir", folder / "tfds"],
            cwd=runs.ROOT,
            check=True,
            timeout=200,
        )
    return folder / "tfds", knobs["VOCAB_PATH"], knobs["CACHE_DIR"]


def script(name, prepared, log_dir, **changes):
    """Runs one of Pax's scripts with its positional arguments on one CPU device."""
    tfds, vocab, cache = prepared
    overrides = [f"--fdl.{k}={v}" for k, v in {**SMALL, "CACHE_DIR": cache, **changes}.items()]
    return subprocess.run(
        ["bash", f"scripts/{name}", tfds, vocab, "float32", "1", "2", log_dir, *overrides],
        cwd=runs.ROOT,
        env={**os.environ, "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=400,
    )


def test_pile_then_lambada(prepared, tmp_path):
    done = script("run_pile_singlenode.sh", prepared, tmp_path / "run")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "run" / "pile_output.log").read_text().count("step 4/4")
    during = runs.losses(tmp_path / "run", "LambadaValidation")
    assert set(runs.losses(tmp_path / "run")) == {1, 2, 3, 4} and set(during) == {4}
    changes = {"EVAL_SETS": "['LambadaValidation']"}
    done = script("run_lambada_singlenode.sh", prepared, tmp_path / "run", **changes)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(
        (tmp_path / "run/eval_out/LambadaValidation/eval_out_00000004.json").read_text()
    )
    assert result["metrics"]["acc_strict"]["weight"] == 6, (
        "six passages, none of the filling counts"
    )
    assert result["metrics"]["loss"]["value"] == pytest.approx(during[4], rel=1e-5)


def test_missing_data_set_is_named(prepared, tmp_path):
    done = script("run_pile_singlenode.sh", (tmp_path / "empty", *prepared[1:]), tmp_path / "run")
    assert done.returncode == 2
    (line,) = [
        line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error:")
    ]
    assert "the_pile" in line and "download_" in line
