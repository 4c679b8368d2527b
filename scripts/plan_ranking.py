"""Does the order of planned step times agree with the order of measured ones? On four virtual CPU devices.

    source scripts/lib/malloc.sh && python scripts/plan_ranking.py --output docs/benchmarks [--rounds 7]

Each candidate (mesh x microbatches x remat policy) of one small GPT is planned as `--mode=plan --chip=cpu` plans it,
and the very program that was planned is run, in a process of its own: beside other candidates some took three times as
long as alone. CPU seconds of a step (all threads, median) stand beside the time on the clock, which other programs
disturb. Reported is Spearman's rank correlation with each.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")

import fiddle as fdl  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402

from configs import flags  # noqa: E402
from paxlike import parallel  # noqa: E402
from paxlike.arguments import ArgumentParser  # noqa: E402
from paxlike.plan import planner  # noqa: E402
from paxlike.plan.chips import CHIPS  # noqa: E402
from paxlike.train.program import state_factory  # noqa: E402

MODEL = {
    "NUM_LAYERS": 4,
    "NUM_HEADS": 4,
    "DIMS_PER_HEAD": 64,
    "MODEL_DIMS": 256,
    "HIDDEN_DIMS": 1024,
    "VOCAB_SIZE": 8192,
    "MAX_SEQ_LEN": 256,
    "PERCORE_BATCH_SIZE": 4,
    "USE_REPEATED_LAYER": True,
    "FPROP_DTYPE": "float32",
    "SYNTHETIC_RANDOM": True,
    "DCN_MESH_SHAPE": "[1,1,1]",
}
# Mesh, microbatches, policy.
CANDIDATES = [
    ("[4,1,1]", 1, "SAVE_EVERYTHING"),
    ("[1,4,1]", 1, "SAVE_EVERYTHING"),
    ("[1,1,4]", 1, "SAVE_EVERYTHING"),
    ("[2,1,2]", 1, "SAVE_EVERYTHING"),
    ("[1,2,2]", 1, "SAVE_EVERYTHING"),
    ("[4,1,1]", 1, "SAVE_NOTHING"),
    ("[1,4,1]", 1, "SAVE_NOTHING"),
    ("[1,1,4]", 1, "SAVE_NOTHING"),
    ("[4,1,1]", 4, "SAVE_NOTHING"),
    ("[1,4,1]", 4, "SAVE_NOTHING"),
    ("[1,1,4]", 4, "SAVE_NOTHING"),
    ("[1,1,4]", 16, "SAVE_NOTHING"),
]


def main(argv: list[str] | None = None) -> int:
    """Plans, measures, prints a table and writes plan_ranking.json."""
    options = _parse(sys.argv[1:] if argv is None else argv)
    if options.candidate is not None:
        print(json.dumps(_measure(CANDIDATES[options.candidate], options.rounds)))
        return 0
    found = []
    for number in range(len(CANDIDATES)):
        command = [sys.executable, __file__, f"--candidate={number}", f"--rounds={options.rounds}"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{number + 1} of {len(CANDIDATES)}", file=sys.stderr, flush=True)
    planned = [result["planned_seconds"] for result in found]
    correlations = {
        kind: spearman(planned, [result[f"{kind}_seconds"] for result in found])
        for kind in ("clock", "cpu")
    }
    found.sort(key=lambda result: result["cpu_seconds"])
    print(
        f"{'mesh':<10} {'microbatches':>12}  {'policy':<16} {'clock':>7} {'cpu':>7} {'planned':>8}"
    )
    for result in found:
        times = [result[f"{kind}_seconds"] for kind in ("clock", "cpu", "planned")]
        print(
            f"{result['mesh']:<10} {result['microbatches']:>12}  {result['policy']:<16} "
            f"{times[0]:>7.3f} {times[1]:>7.3f} {times[2]:>8.3f}"
        )
    for kind, correlation in correlations.items():
        print(
            f"Spearman's rank correlation of {len(found)} candidates, by {kind}: {correlation:.2f}"
        )
    if options.output is not None:
        record = {
            "command": shlex.join(["python", "scripts/plan_ranking.py", *(argv or sys.argv[1:])]),
            "machine": _machine(),
            "model": MODEL,
            "spearman": correlations,
            "candidates": found,
        }
        path = options.output / "plan_ranking.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def _measure(candidate: tuple[str, int, str], rounds: int) -> dict[str, object]:
    """The plan of a candidate, and the times of `rounds` steps of its program after one that warms up."""
    mesh, microbatches, policy = candidate
    knobs = {
        **MODEL,
        "ICI_MESH_SHAPE": mesh,
        "NUM_MICROBATCHES": microbatches,
        "CHECKPOINT_POLICY": policy,
    }
    given = [f"--fdl.{name}={value}" for name, value in knobs.items()]
    request, _ = flags.split(["main.py", "--fdl_config=Synthetic126M", *given])
    experiment = fdl.build(flags.resolve(request, {}).tree)
    program = planner.lower(experiment, CHIPS["cpu"])
    started = time.perf_counter()
    compiled = program.lowered.compile()
    plan = program.read(compiled, time.perf_counter() - started)
    shapes = experiment.train_data.spec(plan.rows)
    with parallel.activate(program.mesh, experiment.training_rules):
        state = state_factory(experiment, shapes, program.mesh).initialize(0)
        place = parallel.named_sharding(program.mesh, ("batch", "length"))
    clock, cpu = [], []
    with experiment.train_data.batches(global_batch=plan.rows, sharding=place) as batches:
        for _ in range(rounds + 1):
            batch = jax.block_until_ready(next(batches))
            started, used = time.perf_counter(), time.process_time()
            state, _ = jax.block_until_ready(compiled(state, batch))
            clock.append(time.perf_counter() - started)
            cpu.append(time.process_time() - used)
    return {
        "mesh": mesh,
        "microbatches": microbatches,
        "policy": policy,
        "planned_seconds": plan.estimate.step_seconds,
        "clock_seconds": statistics.median(clock[1:]),
        "cpu_seconds": statistics.median(cpu[1:]),
        "clock": clock[1:],
        "cpu": cpu[1:],
    }


def spearman(first: list[float], second: list[float]) -> float:
    """Rank correlation of numbers without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _machine() -> dict[str, object]:
    return {
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ""),
        "python": sys.version.split()[0],
        "jax": importlib.metadata.version("jax"),
        "date": datetime.date.today().isoformat(),
    }


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder for plan_ranking.json")
    parser.add_argument("--candidate", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=7, help="measured steps of each candidate")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
