"""The processes behind `parts.py`: `python -m scripts.benchmarks.jobs NAME '{...}'` prints one JSON object."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from paxlike import parallel
from scripts.benchmarks import paxlike_step
from scripts.benchmarks.protocol import cpu_seconds, serve
from scripts.benchmarks.shapes import SHAPES


def compile_time(layers: int, scan: bool) -> dict[str, float]:
    """Of the whole step at width 64: tracing and XLA grow with the number of operations, not with their size."""
    shape = dataclasses.replace(SHAPES["smoke"], layers=layers, width=64)
    started = time.perf_counter(), cpu_seconds()
    lowered = paxlike_step.lower(shape, scan=scan)
    traced = time.perf_counter(), cpu_seconds()
    lowered.compile()
    done = time.perf_counter(), cpu_seconds()
    return {
        "trace_seconds": traced[0] - started[0],
        "compile_seconds": done[0] - traced[0],
        "trace_cpu_seconds": traced[1] - started[1],
        "compile_cpu_seconds": done[1] - traced[1],
    }


def data(packing: str, megabytes: float, batches: int) -> dict[str, float]:
    """Bytes of the standard library as tokens, rows of 2,048, 32 of them in a batch."""
    from paxlike.data import stdlib_text
    from paxlike.data.loader import Loader
    from paxlike.data.sources import JsonLines
    from paxlike.data.tokenizers import ByteTokenizer

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        stdlib_text.write(Path(folder), max_megabytes=megabytes)
        source = JsonLines(os.path.join(folder, "train.jsonl"))
        loader = Loader(source, 2048, ByteTokenizer(), packing=packing, cache_dir=folder)
        started = time.perf_counter()
        with loader.batches(global_batch=32) as iterator:  # builds the token cache
            next(iterator)
            prepared = time.perf_counter() - started
            before = time.perf_counter(), cpu_seconds()
            for _ in range(batches):
                batch = next(iterator)
            wall, cpu = time.perf_counter() - before[0], cpu_seconds() - before[1]
        tokens = batches * int(np.prod(batch["tokens"].shape))
    return {
        "tokens_per_second": tokens / wall,
        "tokens_per_cpu_second": tokens / cpu,
        "prepare_seconds": prepared,
    }


def checkpoint(shape: str, saves: int, steps: int) -> dict[str, float]:
    """`steps` steps, a save, and so on: how long `save` keeps the loop, how long steps take while it is written."""
    from paxlike.checkpoint import Checkpointer, CheckpointOptions

    function, state, batches = paxlike_step.make(SHAPES[shape])
    stalls, during, quiet = [], [], []

    def take(number: int, into: list[float]) -> None:
        nonlocal state
        for i in range(number):
            started = time.perf_counter()
            state, metrics = function(state, batches[i % len(batches)])
            jax.block_until_ready((state, metrics))
            into.append(time.perf_counter() - started)

    take(2, [])
    with tempfile.TemporaryDirectory() as folder:
        options = CheckpointOptions(every_n_steps=1, keep_last=2)
        with Checkpointer(Path(folder), options) as checkpointer:
            for i in range(saves):
                checkpointer.wait()
                take(steps, quiet)
                checkpointer.save(i + 1, state, data={}, config="{}", force=True)
                stalls.append(checkpointer.last_stall_seconds)
                take(steps, during)
    step = statistics.median(quiet)
    stall = statistics.median(stalls)
    return {
        "stall_seconds": stall,
        "step_seconds": step,
        "stall_over_step": stall / step,
        "step_while_writing_over_step": statistics.median(during) / step,
        "share_of_time_at_one_save_in_100_steps": stall / (stall + 100 * step),
        "state_megabytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6,
    }


def decode(shape: str, rows: int, prompt: int, tokens: int, family: str) -> None:
    """A worker (`protocol.serve`) whose step generates `tokens` tokens in each of `rows` rows."""
    from paxlike.decode import Generator, SamplingOptions

    size = SHAPES[shape]
    model = paxlike_step.llama(size) if family == "llama" else paxlike_step.model(size, scan=True)
    mesh = parallel.Mesh().build(jax.devices()[:1])
    with parallel.activate(mesh):
        variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8), np.int32))
        variables = jax.tree.map(
            lambda x: getattr(x, "value", x), variables, is_leaf=lambda x: hasattr(x, "names")
        )
        options = SamplingOptions(max_tokens=tokens, temperature=0.0, batch_size=rows)
        length = min(size.length, prompt + tokens + 8)
        generator = Generator(model, variables, _Letters(size.vocab), options, max_length=length)
        prompts = [chr(97 + i) * prompt for i in range(rows)]

        def step() -> float:
            made = sum(len(result.tokens) for result in generator.generate(prompts))
            if made != rows * tokens:
                raise RuntimeError(f"{made} tokens were made, not {rows} x {tokens}")
            return 0.0

        serve(step, {"jax": jax.__version__})


@dataclasses.dataclass(frozen=True)
class _Letters:
    """A letter is a token; the end of a document never comes, so that all rows run to the end."""

    vocab_size: int
    bos_id: int = 0
    eos_id: int = -1
    pad_id: int = 0

    def encode(self, text: str) -> list[int]:
        return [ord(c) % self.vocab_size for c in text]

    def decode(self, ids) -> str:
        return " ".join(str(int(i)) for i in ids)


if __name__ == "__main__":
    numbers = globals()[sys.argv[1]](**json.loads(sys.argv[2]))
    if numbers is not None:  # a worker has said its own
        print(json.dumps(numbers))
