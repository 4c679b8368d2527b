"""Parts that are one process each: compile time, start-up, data, checkpoints, decoding."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from typing import Any

from scripts.benchmarks import steps
from scripts.benchmarks.protocol import ROOT, Worker, environment


def compile_time(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds to trace and to compile a training step at 12 and at 96 layers: flat when scanned."""
    depths = (2, 4) if options.smoke else (12, 96)
    result = {}
    for scan in (True, False) if options.smoke else (True,):
        for depth in depths:
            name = f"{'scanned' if scan else 'unrolled'}, {depth} layers"
            result[name] = _job(
                "compile_time", {"layers": depth, "scan": scan}, options.rounds // 3 or 1
            )
            _print(name, result[name])
    return result


def startup(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of `main.py` from its start to the end of a run of one step, with a cold and a warm compilation cache."""
    command = [sys.executable, "main.py", "--fdl_config=configs.gpt.Synthetic126M"]
    knobs = {
        "NUM_LAYERS": 4,
        "MODEL_DIMS": 256,
        "NUM_HEADS": 4,
        "HIDDEN_DIMS": 1024,
        "VOCAB_SIZE": 8192,
        "MAX_SEQ_LEN": 256,
    }
    knobs |= {
        "MAX_STEPS": 1,
        "USE_REPEATED_LAYER": True,
        "FPROP_DTYPE": "float32",
        "DIMS_PER_HEAD": 64,
    }
    knobs |= {"ICI_MESH_SHAPE": "[1,1,1]", "DCN_MESH_SHAPE": "[1,1,1]", "PERCORE_BATCH_SIZE": 1}
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as cache:
        for i in range(1 + (1 if options.smoke else 3)):
            with tempfile.TemporaryDirectory() as logs:
                flags = [f"--fdl.{name}={value}" for name, value in knobs.items()]
                flags += [f"--job_log_dir={logs}", f"--compilation_cache={cache}"]
                env = environment() | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
                started = time.perf_counter()
                done = subprocess.run(
                    [*command, *flags], cwd=ROOT, env=env, capture_output=True, text=True
                )
                if done.returncode:
                    raise RuntimeError(
                        f"main.py ended with status {done.returncode}: {done.stderr}"
                    )
                seconds = time.perf_counter() - started
                result.setdefault("warm cache" if i else "cold cache", []).append(seconds)
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", "import main, paxlike.train.loop"],
        cwd=ROOT,
        env=environment(),
        check=True,
    )
    result["imports alone"] = [time.perf_counter() - started]
    _print("main.py, one step (seconds)", {name: min(values) for name, values in result.items()})
    return result


def data(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of the loader on one core: reading a token cache, packing, making batches."""
    result = {}
    for packing in ("concatenated", "packed"):
        arguments = {
            "packing": packing,
            "megabytes": 2 if options.smoke else 8,
            "batches": 5 if options.smoke else 400,
        }
        result[packing] = _job("data", arguments)
        _print(packing, result[packing])
    return result


def checkpoint(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds that training stands still for an asynchronous checkpoint, and the step time while it is written."""
    shape = "smoke" if options.smoke else "tiny"
    result = _job("checkpoint", {"shape": shape, "saves": 2 if options.smoke else 5, "steps": 6})
    _print(shape, result)
    return result


def decode(options: argparse.Namespace) -> dict[str, Any]:
    """Greedy generation, all rows together, beside Hugging Face's `generate` on models of the same size, in turns."""
    rows, prompt, tokens = 8, 8, 16 if options.smoke else 128
    cases = [("smoke", "gpt"), ("smoke", "llama")]
    if not options.smoke:
        cases = [("tiny", "llama"), ("512", "llama"), ("tiny", "gpt")]
    result: dict[str, Any] = {}
    for shape, family in cases:
        arguments = {"shape": shape, "rows": rows, "prompt": prompt, "tokens": tokens}
        arguments = json.dumps({**arguments, "family": family})
        command = [sys.executable, "-m", "scripts.benchmarks.jobs", "decode", arguments]
        workers = [Worker("paxlike", command)]
        if options.torch_python:
            script = str(ROOT / "scripts" / "benchmarks" / "hf_generate.py")
            workers.append(Worker("hugging face", [options.torch_python, script, arguments]))
        title = f"{family} {shape}"
        result[title] = steps.take_turns(workers, options.rounds, options.steps, rows * tokens)
        steps.show(title, result[title])
    return result


def _job(name: str, arguments: dict[str, Any], repeats: int = 1) -> dict[str, Any]:
    """The job's numbers; the least of each over `repeats` processes."""
    command = [sys.executable, "-m", "scripts.benchmarks.jobs", name, json.dumps(arguments)]
    runs = [_run(command) for _ in range(repeats)]
    return {key: min(run[key] for run in runs) for key in runs[0]}


def _run(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} ended with status {done.returncode}; its report is above"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def _print(title: str, numbers: dict[str, Any]) -> None:
    print(
        f"{title:28s} " + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items()),
        flush=True,
    )
