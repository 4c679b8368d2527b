"""Worker process for the JAX sides: `-m scripts.benchmarks.jax_worker '{"kind": "paxlike", "shape": "tiny"}'`."""

from __future__ import annotations

import importlib
import json
import sys
import time

import jax

from scripts.benchmarks import protocol, shapes

MODULES = {"paxlike": "paxlike_step", "bare": "bare_jax"}


def main() -> None:
    options = json.loads(sys.argv[1])
    module = importlib.import_module(f"scripts.benchmarks.{MODULES[options.pop('kind')]}")
    started = time.perf_counter()
    function, state, data = module.make(shapes.SHAPES[options.pop("shape")], **options)
    about = {"jax": jax.__version__, "compile_seconds": time.perf_counter() - started}
    memory = function.memory_analysis()
    about["temporary_bytes"] = getattr(memory, "temp_size_in_bytes", None)
    count = 0

    def step() -> float:
        nonlocal state, count
        state, metrics = function(state, data[count % len(data)])
        count += 1
        jax.block_until_ready((state, metrics))  # queued steps could deadlock the CPU's collectives
        loss = metrics["loss"]
        return float(loss.value() if hasattr(loss, "value") else loss)

    protocol.serve(step, about)


if __name__ == "__main__":
    main()
