"""Does the order of planned step times agree with the order of measured ones? On four virtual CPU devices.

    source scripts/lib/malloc.sh && python scripts/plan_ranking.py --output docs/benchmarks [--rounds 7]

Each candidate (mesh x microbatches x remat policy) of one small GPT is planned as `--mode=plan --chip=cpu` plans it,
and the very program that was planned is run. The candidates take turns, one step each in a round, so that what else the
machine does meets them all: each time is divided by the mean of its round, and the median over the rounds counts. CPU
seconds (all threads) stand beside the time on the clock: they are less disturbed where the machine is shared. Reported
is Spearman's rank correlation with each.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import shlex
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
from paxlike.plan import planner  # noqa: E402
from paxlike.plan.chips import CHIPS  # noqa: E402
from paxlike.train.state import StateFactory  # noqa: E402

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
    runs = [_Run(*candidate) for candidate in CANDIDATES]
    for number in range(options.rounds + 1):
        for run in runs:
            run.step(count=number > 0)  # the first round warms up
        print(f"round {number} of {options.rounds}", file=sys.stderr, flush=True)
    planned = [run.plan.estimate.step_seconds for run in runs]
    clock, cpu = (relative([run.times[kind] for run in runs]) for kind in ("clock", "cpu"))
    correlations = {"clock": spearman(planned, clock), "cpu": spearman(planned, cpu)}
    rows = sorted(zip(clock, cpu, planned, runs, strict=True), key=lambda row: row[0])
    print(
        f"{'mesh':<10} {'microbatches':>12}  {'policy':<16} {'clock':>7} {'cpu':>7} {'planned s':>10}"
    )
    for by_clock, by_cpu, estimate, run in rows:
        mesh, parts, policy = run.candidate
        print(
            f"{mesh:<10} {parts:>12}  {policy:<16} {by_clock:>7.2f} {by_cpu:>7.2f} {estimate:>10.3f}"
        )
    for kind, correlation in correlations.items():
        print(
            f"Spearman's rank correlation of {len(runs)} candidates, by {kind}: {correlation:.2f}"
        )
    if options.output is not None:
        record = {
            "command": shlex.join(["python", "scripts/plan_ranking.py", *(argv or sys.argv[1:])]),
            "machine": _machine(),
            "model": MODEL,
            "spearman": correlations,
            "candidates": [
                {
                    "mesh": run.candidate[0],
                    "microbatches": run.candidate[1],
                    "policy": run.candidate[2],
                    "planned_seconds": estimate,
                    "clock_over_mean": by_clock,
                    "cpu_over_mean": by_cpu,
                    "seconds": run.times,
                }
                for by_clock, by_cpu, estimate, run in rows
            ],
        }
        path = options.output / "plan_ranking.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
    return 0


class _Run:
    """A candidate: its plan, and its program with a state of its own."""

    def __init__(self, mesh: str, microbatches: int, policy: str):
        self.candidate = (mesh, microbatches, policy)
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
        self.compiled = program.lowered.compile()
        self.plan = program.read(self.compiled, time.perf_counter() - started)
        shapes = experiment.train_data.spec(self.plan.rows)
        self.times: dict[str, list[float]] = {"clock": [], "cpu": []}
        with parallel.activate(program.mesh, experiment.rules):
            factory = StateFactory(experiment.model, experiment.optimizer, shapes, program.mesh)
            self.state = factory.initialize(0)
        self.batches = experiment.train_data.batches(
            global_batch=self.plan.rows,
            sharding=parallel.named_sharding(program.mesh, ("batch", "length")),
        )
        print(f"planned {mesh} {microbatches} {policy}", file=sys.stderr, flush=True)

    def step(self, *, count: bool) -> None:
        """One step; its time is kept if it counts."""
        batch = next(self.batches)
        jax.block_until_ready(batch)
        started, used = time.perf_counter(), time.process_time()
        self.state, metrics = self.compiled(self.state, batch)
        jax.block_until_ready((self.state, metrics))
        if count:
            self.times["clock"].append(time.perf_counter() - started)
            self.times["cpu"].append(time.process_time() - used)


def relative(times: list[list[float]]) -> list[float]:
    """Of each candidate's times, a column a round: the median of what they are beside the mean of their round."""
    values = np.array(times)
    return np.median(values / values.mean(axis=0), axis=1).tolist()


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder for plan_ranking.json")
    parser.add_argument("--rounds", type=int, default=7, help="measured steps of each candidate")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
