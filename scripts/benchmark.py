"""Measures paxlike beside what it could be: a bare JAX step, PyTorch, Hugging Face; writes JSON and prints tables.

    python scripts/benchmark.py --suite=h100 --output docs/benchmarks
    python scripts/benchmark.py --parts step,mesh,compile,startup,host,data,checkpoint,decode --output docs/benchmarks

The sides of a comparison are processes of their own that take turns, a few steps each, so that what else the machine
does meets them all; a ratio is the median over the rounds of the ratios within a round. CPU seconds (all threads) stand
beside the time on the clock: they are less disturbed where the machine is shared.

`--suite=h100` measures training steps on one GPU, or plans them where there is none (`scripts/benchmarks/suite.py`).
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from paxlike.arguments import ArgumentParser  # noqa: E402
from scripts.benchmarks import suite  # noqa: E402

# Imported when they are asked for: the suite runs where not all of their imports are installed.
PARTS = {
    "step": "steps.step",
    "mesh": "steps.mesh",
    "host": "steps.host",
    "compile": "parts.compile_time",
    "startup": "parts.startup",
    "data": "parts.data",
    "checkpoint": "parts.checkpoint",
    "decode": "parts.decode",
    "lora": "lora.lora",
    "moe": "moe.moe",
}


def main(argv: list[str] | None = None) -> int:
    options = _parse(sys.argv[1:] if argv is None else argv)
    if options.suite:
        return suite.run(options)
    for name in options.parts:
        print(f"== {name}", flush=True)
        module, function = PARTS[name].split(".")
        result = getattr(importlib.import_module(f"scripts.benchmarks.{module}"), function)(options)
        record = {
            "part": name,
            "command": shlex.join(["python", "scripts/benchmark.py", *(argv or sys.argv[1:])]),
            "machine": _machine(),
            "result": result,
        }
        if options.output is not None:
            options.output.mkdir(parents=True, exist_ok=True)
            (options.output / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        print(flush=True)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="step", help=f"some of {','.join(PARTS)}")
    parser.add_argument(
        "--shapes", default="tiny,126m-slice", help="of the parts `step` and `mesh`"
    )
    parser.add_argument("--rounds", type=int, default=9, help="turns that each side takes")
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--torch-python", help="interpreter with torch and numpy (and transformers, for `decode`)"
    )
    parser.add_argument("--no-torch-compile", action="store_true", help="PyTorch eager only")
    parser.add_argument("--output", type=Path, help="folder for one JSON file per part")
    parser.add_argument("--suite", choices=suite.SUITES, help="rows of training steps on one GPU")
    parser.add_argument(
        "--rows", help="of the suite, whose names contain one of these, between commas"
    )
    parser.add_argument(
        "--minutes", type=float, default=8.5, help="of the suite: no row is begun after them"
    )
    parser.add_argument(
        "--wheelhouse", type=Path, help="of the suite: wheels that this machine may lack"
    )
    parser.add_argument(
        "--plan-only",
        action="store_true",
        help="of the suite and of `lora`: only what is planned for a GPU",
    )
    parser.add_argument("--smoke", action="store_true", help="smallest sizes: does it run at all")
    options = parser.parse_args(argv)
    options.parts, options.shapes = options.parts.split(","), options.shapes.split(",")
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown:
        parser.error(f"--parts: {', '.join(unknown)} is none of {', '.join(PARTS)}")
    if options.torch_python and not Path(options.torch_python).exists():
        parser.error(f"--torch-python: there is no {options.torch_python}")
    if options.smoke:
        options.shapes, options.rounds, options.steps = ["smoke"], 2, 1
    return options


def _machine() -> dict[str, object]:
    """What the numbers were measured on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    versions = {
        name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")
    }
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }


if __name__ == "__main__":
    sys.exit(main())
