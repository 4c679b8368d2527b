"""The launcher on a real Slurm: a chain of training jobs, then a stage that needs them."""

import json
import subprocess
import sys

import pytest
import runs

from .conftest import ROOT, TWO_NODES, knobs

pytestmark = pytest.mark.slow


def test_chained_training_then_evaluation_then_nothing_left_to_do(slurm, tmp_path):
    run = tmp_path / "it's a run"
    words = [sys.executable, "-m", "paxlike.launch", "--fdl_config=Quickstart"]
    words += [f"--job_log_dir={run}", "--stages=prepare,train,evaluate", "--chain=2", "--nodes=2"]
    words += [f"--prepare=echo prepared > '{tmp_path}/prepared'"]
    words += [
        "--gpus_per_node=1",
        "--request_gpus=none",
        "--time=10",
        "--env=JAX_NUM_CPU_DEVICES=1",
    ]
    small = {"MAX_STEPS": 20, "VOCAB_SIZE": 512, "EVAL_MAX_BATCHES": 2, "EVAL_INTERVAL_STEPS": 0}
    words += knobs(**TWO_NODES, **small, **runs.write_text(tmp_path)).split()
    environ = slurm.environ | {"HF_TOKEN": "do_not_write_me"}
    done = subprocess.run(words, env=environ, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    numbers = json.loads((run / "launch/jobs.json").read_text())
    assert list(numbers) == ["prepare", "train_1", "train_2", "evaluate"]
    assert f"evaluate: job {numbers['evaluate']}" in done.stdout
    slurm.wait(numbers["evaluate"], "COMPLETED")
    assert slurm.field(numbers["train_2"], "JobState") == "COMPLETED"
    assert (tmp_path / "prepared").exists() and 20 in runs.losses(run)
    results = [
        json.loads(path.read_text()) for path in run.glob("eval_out/*/eval_out_00000020.json")
    ]
    assert len(results) == 1
    second = sorted(run.glob(f"output/output-{numbers['train_2']}-*.txt"))
    assert "train: done before" in second[0].read_text() and len(second) == 2
    written = [path.read_bytes() for path in run.rglob("*") if path.is_file()]
    assert not any(b"do_not_write_me" in text for text in written)

    again = subprocess.run(words, env=environ, cwd=ROOT, capture_output=True, text=True)
    assert again.stdout.splitlines() == [
        "prepare: done before",
        "train: done before",
        "evaluate: done before",
    ]
    assert again.returncode == 0
