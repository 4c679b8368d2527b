"""Pax's two examples on a real Slurm, with configs and data shrunk: the Pile, and a LLaMA on BoolQ."""

import json
import os
import subprocess
import sys

import pytest
import runs
import zstandard

from .conftest import ROOT, TWO_NODES, knobs

pytestmark = pytest.mark.slow
SHORT = {"MAX_STEPS": 4, "MAX_SEQ_LEN": 32, "VOCAB_SIZE": 512, "EVAL_MAX_BATCHES": 2}
SHORT |= {"SUMMARY_INTERVAL_STEPS": 1, "CHECKPOINT_EVERY_N_STEPS": 2}


def prepare(script: str, source, data_dir) -> None:
    words = [sys.executable, f"scripts/{script}", "--source", source, "--data_dir", data_dir]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True, timeout=200)


def one_process(folder, config: str, flags: str) -> None:
    """The same run as one process of two devices, to compare with."""
    environ = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    environ["XLA_FLAGS"] = runs.QUICK_COMPILE
    words = [sys.executable, "main.py", f"--fdl_config={config}", f"--job_log_dir={folder}"]
    done = subprocess.run(
        [*words, *flags.split()], env=environ, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_pile(slurm, tmp_path):
    vocab = runs.write_text(tmp_path)["VOCAB_PATH"]
    raw = tmp_path / "raw"
    raw.mkdir()
    lines = (tmp_path / "train.jsonl").read_text().splitlines()[:4]
    text = "\n".join(json.dumps({"text": json.loads(x)["text"][:400], "meta": {}}) for x in lines)
    for name in (*(f"{i:02d}" for i in range(30)), "val", "test"):
        (raw / f"{name}.jsonl.zst").write_bytes(zstandard.compress(text.encode()))
    data = tmp_path / "tfds"
    prepare("download_the_pile.py", raw, data)
    more = knobs(**SHORT, CACHE_DIR=tmp_path / "cache", EVAL_ON_TEST=False)
    job = slurm.submit(
        "example_slurm_pile.sub",
        tmp_path,
        "--nodes=2",
        "--ntasks-per-node=1",
        BASE_TFDS_DATA_DIR=str(data),
        BASE_VOCAB_PATH=vocab,
        PREC="float32",
        GPUS_PER_NODE="1",
        PERCORE_BATCH_SIZE="2",
        ADDITIONAL_ARGS=more,
    )
    slurm.wait(job, "COMPLETED")
    more += " --fdl.ICI_MESH_SHAPE=[2,1,1] --fdl.DCN_MESH_SHAPE=[1,1,1] --fdl.FPROP_DTYPE=float32"
    more += f" --fdl.VOCAB_PATH={vocab} --tfds_data_dir={data}"
    one_process(tmp_path / "one", "Pile126M", more)
    assert runs.losses(tmp_path / "Pile126M_logdir") == runs.losses(tmp_path / "one")
    assert set(runs.losses(tmp_path / "one")) == {1, 2, 3, 4}


def test_a_llama_on_boolq_fine_tuned_and_evaluated(slurm, tmp_path):
    vocab = runs.write_text(tmp_path)["VOCAB_PATH"]
    raw, data = tmp_path / "raw", tmp_path / "tfds"
    raw.mkdir()
    rows = [
        {"question": f"is {n} odd", "passage": f"the number {n}", "idx": n, "label": n % 2 == 1}
        for n in range(40)
    ]
    for name in ("train", "val", "test"):
        (raw / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare("download_boolq.py", raw, data)
    more = knobs(
        **SHORT | {"LR_COS_DECAY_END": 4, "MAX_SEQ_LEN": 80},
        NUM_KV_HEADS=2,
        FPROP_DTYPE="float32",
        BOOLQ_ANSWERS='["a","b"]',
        CACHE_DIR=tmp_path / "cache",
    )
    single = f"--fdl.VOCAB_PATH={vocab} --fdl.TFDS_DATA_DIR={data} --fdl.EVAL_ON_TEST=False"
    single += " --fdl.ICI_MESH_SHAPE=[1,2,1] --fdl.DCN_MESH_SHAPE=[1,1,1]"
    one_process(tmp_path / "base", "LLaMA7B", f"{more} {single}")
    job = slurm.submit(
        "example_slurm_llama.sub",
        tmp_path,
        "--nodes=2",
        "--ntasks-per-node=1",
        BASE_TFDS_DATA_DIR=str(data),
        BASE_VOCAB_PATH=vocab,
        BASE_CHECKPOINT_RESTORE_PATH=str(tmp_path / "base"),
        LOG_DIR_LOCAL="it's tuned",
        MAX_STEPS="4",
        ICI_MESH_SHAPE="[1,1,1]",
        DCN_MESH_SHAPE=TWO_NODES["DCN_MESH_SHAPE"].replace("[2,1,1]", "[1,2,1]"),
        ADDITIONAL_ARGS=" ".join(w for w in more.split() if "LR_COS" not in w),
    )
    # What run_llama_boolq.sh makes of MAX_STEPS=4.
    tune = {"CHECKPOINT_RESTORE_PATH": tmp_path / "base", "LEARNING_RATE": 1e-6, "MAX_STEPS": 4}
    tune |= {"LR_COS_WARMUP": 2, "LR_COS_DECAY_START": 3, "LR_COS_DECAY_END": 4}
    tune |= {"LR_SCHEDULE": "linear_rampup_cosine_decay", "USE_REPEATED_LAYER": True}
    flags = " ".join(f"--fdl.{name}={value}" for name, value in tune.items())
    one_process(tmp_path / "one", "LLaMA7B", f"{more} {single} {flags}")
    slurm.wait(job, "COMPLETED")
    folder = tmp_path / "it's tuned/llama-LLaMA7B-mbs-2-lora-0"
    assert runs.losses(folder) == runs.losses(tmp_path / "one")
    assert set(runs.losses(folder)) == {1, 2, 3, 4}
    result = json.loads((folder / "eval_out/BoolQ/eval_out_00000004.json").read_text())
    assert result["metrics"]["boolq_acc"]["weight"] > 0
