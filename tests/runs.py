"""Real runs of main.py in processes of their own, on small real text."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np

from paxlike.log.history import read_metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Programs over several devices are compiled at every start, and these runs are short: the shortest way through LLVM.
QUICK_COMPILE = "--xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 11):  # jaxlib 0.11 has the emitters alone, and not the flag
    QUICK_COMPILE += " --xla_cpu_use_fusion_emitters=false"
ONE_LAYER = {
    "NUM_LAYERS": 1,
    "NUM_HEADS": 2,
    "DIMS_PER_HEAD": 8,
    "MODEL_DIMS": 16,
    "HIDDEN_DIMS": 32,
    "VOCAB_SIZE": 64,
    "MAX_SEQ_LEN": 16,
    "PERCORE_BATCH_SIZE": 2,
}
TINY = {
    "NUM_LAYERS": 2,
    "NUM_HEADS": 4,
    "MODEL_DIMS": 32,
    "HIDDEN_DIMS": 64,
    "VOCAB_SIZE": 512,
    "MAX_SEQ_LEN": 32,
    "PERCORE_BATCH_SIZE": 4,
    "SUMMARY_INTERVAL_STEPS": 1,
    "EVAL_INTERVAL_STEPS": 5,
    "EVAL_MAX_BATCHES": 3,
    "CHECKPOINT_EVERY_N_STEPS": 5,
    "LR_COS_WARMUP": 2,
    "LR_COS_DECAY_START": 3,
    "LR_COS_DECAY_END": 12,
    "MAX_STEPS": 12,
}


def write_text(folder: pathlib.Path) -> dict[str, str]:
    """Training and held-out JSON lines and a SentencePiece model in `folder`; the knobs that name them."""
    import json

    from paxlike.data.tokenizers import train_sentencepiece

    sources = sorted((ROOT / "paxlike").rglob("*.py"))
    texts = [path.read_text() for path in sources]
    for name, part in (
        ("train", texts[: len(texts) * 3 // 4]),
        ("heldout", texts[len(texts) * 3 // 4 :]),
    ):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in part)
        )
    train_sentencepiece(texts, output=str(folder / "tiny.model"), vocab_size=512)
    return {
        "TRAIN_FILES": str(folder / "train.jsonl"),
        "EVAL_FILES": str(folder / "heldout.jsonl"),
        "VOCAB_PATH": str(folder / "tiny.model"),
        "CACHE_DIR": str(folder / "cache"),
    }


def command(job_log_dir, knobs, *flags, config="Quickstart") -> list[str]:
    """The command line of a tiny run."""
    overrides = [f"--fdl.{name}={value}" for name, value in {**TINY, **knobs}.items()]
    main = [
        sys.executable,
        "-u",
        str(ROOT / "main.py"),
        f"--fdl_config={config}",
        f"--job_log_dir={job_log_dir}",
    ]
    return [*main, *overrides, *flags]


def environment(devices: int = 1, *, quick: bool = True) -> dict[str, str]:
    """The environment of a run on some virtual CPU devices; not `quick` where computing outweighs compiling."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} {QUICK_COMPILE}" if quick else flags,
        "PYTHONFAULTHANDLER": "1",
    }


def run(
    job_log_dir, knobs, *flags, devices=1, expect=0, quick=True, **kwargs
) -> subprocess.CompletedProcess:
    """Runs to the end and checks the exit code."""
    done = subprocess.run(
        command(job_log_dir, knobs, *flags, **kwargs),
        env=environment(devices, quick=quick),
        capture_output=True,
        text=True,
        timeout=400,
        cwd=ROOT,
    )
    assert done.returncode == expect, (
        f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )
    return done


def run_processes(job_log_dir, knobs, *flags, processes, devices=1) -> None:
    """The same in several processes of so many devices each, joined by `jax.distributed` on loopback."""
    address = f"127.0.0.1:{free_port()}"
    started = [
        subprocess.Popen(
            command(
                job_log_dir,
                knobs,
                *flags,
                "--multiprocess_gpu",
                f"--server_addr={address}",
                f"--num_hosts={processes}",
                f"--host_idx={index}",
            ),
            env=environment(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        for index in range(processes)
    ]
    outputs = [process.communicate(timeout=400)[0] for process in started]
    codes = [process.returncode for process in started]
    assert codes == [0] * processes, "\n".join(output[-3000:] for output in outputs)


def losses(job_log_dir, split="train") -> dict[int, float]:
    """step -> loss of a run."""
    return {
        line["step"]: line["loss"] for line in read_metrics(job_log_dir) if line["split"] == split
    }


def final_state(job_log_dir, step=12) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, by name."""
    from paxlike.checkpoint import arrays, layout

    folder = layout.locate(pathlib.Path(job_log_dir), step=step)[0]
    stored = arrays.read_item(folder, "metadata")["arrays"]
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {
        k: jax.ShapeDtypeStruct(tuple(v["shape"]), v["dtype"], sharding=one)
        for k, v in stored.items()
    }
    return {name: np.asarray(value) for name, value in arrays.read_arrays(folder, abstract).items()}


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
