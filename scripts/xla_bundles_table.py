"""What flags of XLA do to training steps compiled for H100s that are not there: the table of docs/training.md.

    python scripts/xla_bundles_table.py              # compiles what docs/benchmarks/xla_flags.json lacks: a minute each
    python scripts/xla_bundles_table.py --again tensor  # compiles the rows of one mesh anew
    python scripts/xla_bundles_table.py --check      # ends with 1 where the table is not that of the file

A flag is worth a bundle (`paxlike/xla_bundles.py`) where it changes the program for the better: collectives that start
apart from where they end, so that something can run beside them; time that the operations wait for collectives; the
peak. Times are those of `--mode=plan`; nothing is measured.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fiddle as fdl  # noqa: E402
import jax  # noqa: E402

from configs import flags  # noqa: E402
from paxlike.arguments import ArgumentParser  # noqa: E402
from paxlike.plan import hlo, planner, target  # noqa: E402
from paxlike.plan.chips import find_chip  # noqa: E402
from scripts.lib import page  # noqa: E402

NUMBERS = ROOT / "docs" / "benchmarks" / "xla_flags.json"
PAGE = ROOT / "docs" / "training.md"
MODEL = ["--fdl_config=Synthetic5B", "--fdl.NUM_LAYERS=4"]
FLAT = ["--fdl.DCN_MESH_SHAPE=[1,1,1]"]
PIPELINE = ['--fdl.MESH_AXES=["pipeline","data","fsdp","tensor"]', "--fdl.DCN_MESH_SHAPE=[1,1,1,1]"]
MESHES: dict[str, list[str]] = {
    "one GPU": [*FLAT, "--fdl.ICI_MESH_SHAPE=[1,1,1]"],
    "fsdp 8": [*FLAT, "--fdl.ICI_MESH_SHAPE=[1,8,1]", "--fdl.PERCORE_BATCH_SIZE=4"],
    "tensor 8": [*FLAT, "--fdl.ICI_MESH_SHAPE=[1,1,8]", "--fdl.PERCORE_BATCH_SIZE=1"],
    "tensor 8, SEQUENCE_PARALLEL": [
        *FLAT,
        "--fdl.ICI_MESH_SHAPE=[1,1,8]",
        "--fdl.PERCORE_BATCH_SIZE=1",
        "--fdl.SEQUENCE_PARALLEL=True",
    ],
    "pipeline 4 x fsdp 2": [
        *PIPELINE,
        "--fdl.ICI_MESH_SHAPE=[4,1,2,1]",
        "--fdl.PERCORE_BATCH_SIZE=4",
        "--fdl.NUM_MICROBATCHES=8",
    ],
}
_GIB = 1 << 30
_WINDOWED = {"xla_gpu_threshold_for_windowed_einsum_mib": 0}
OPTIONS: dict[str, dict[str, Any]] = {
    "`gpu`": {},
    "`gpu-sharded` (O1)": {"level": "O1"},
    "gathers and reductions of up to 1 GiB as one": {
        "xla_gpu_all_gather_combine_threshold_bytes": _GIB,
        "xla_gpu_reduce_scatter_combine_threshold_bytes": _GIB,
        "xla_gpu_all_reduce_combine_threshold_bytes": _GIB,
    },
    "all-reduces of up to 51,200 bytes as one": {
        "xla_gpu_all_reduce_combine_threshold_bytes": 51200
    },
    "loops unrolled by two": {
        "xla_gpu_enable_while_loop_unrolling": "WHILE_LOOP_UNROLLING_DOUBLE_BUFFER"
    },
    "windowed einsum": _WINDOWED,
    "windowed einsum, several streams": {
        **_WINDOWED,
        "xla_gpu_multi_streamed_windowed_einsum": True,
    },
    "pipelined p2p": {
        "xla_gpu_enable_pipelined_p2p": True,
        "xla_gpu_collective_permute_decomposer_threshold": 1024,
    },
    "pipeline parallelism level": {
        "xla_gpu_experimental_pipeline_parallelism_opt_level": "PIPELINE_PARALLELISM_OPT_LEVEL_ENABLE"
    },
}
# Pax and its successors set these for such meshes.
ROWS = {
    "one GPU": ("`gpu`", "`gpu-sharded` (O1)", "loops unrolled by two"),
    "fsdp 8": (
        "`gpu`",
        "`gpu-sharded` (O1)",
        "gathers and reductions of up to 1 GiB as one",
        "all-reduces of up to 51,200 bytes as one",
    ),
    "tensor 8": ("`gpu`", "windowed einsum"),
    "tensor 8, SEQUENCE_PARALLEL": (
        "`gpu`",
        "`gpu-sharded` (O1)",
        "windowed einsum",
        "windowed einsum, several streams",
    ),
    "pipeline 4 x fsdp 2": (
        "`gpu`",
        "`gpu-sharded` (O1)",
        "pipelined p2p",
        "pipeline parallelism level",
    ),
}


def compiled(program: planner.Program, options: dict[str, Any]) -> dict[str, Any]:
    """What the compiler made of a step with options of its own."""
    given = {"xla_gpu_autotune_level": 0, **options}
    level = given.pop("level", None)
    jax.config.update("jax_optimization_level", level or "UNKNOWN")
    if level:  # jax keeps compiled programs by their options, and the level is none
        given["xla_gpu_first_collective_call_warn_stuck_timeout_seconds"] = 20 + int(level[1])
    started = time.monotonic()
    executable = program.lowered.compile(compiler_options=given)
    seconds = time.monotonic() - started
    plan = program.read(executable, seconds)
    module = hlo.parse(executable.as_text())
    apart: collections.Counter[str] = collections.Counter()
    for computation in module.computations.values():
        for instruction in computation.instructions.values():
            found = module.collective(instruction, computation)
            if found is not None and found.group_size > 1 and found.is_async:
                apart[found.kind] += 1
            elif instruction.opcode == "send":
                apart["send"] += 1
    return {
        "apart": dict(sorted(apart.items())),
        "waiting_ms": round(1e3 * plan.estimate.exposed_seconds, 2),
        "step_ms": round(1e3 * plan.estimate.step_seconds, 2),
        "peak_gib": round(plan.memory.peak / 2**30, 2),
    }


def measure(rows: dict[str, Any], again: str | None) -> None:
    """Compiles what is missing, and writes after each."""
    chip = find_chip("h100")
    target.prepare_environment(chip, os.environ)
    jax.config.update("jax_platforms", "cpu")
    for mesh, labels in ROWS.items():
        there = rows.setdefault(mesh, {})
        missing = [label for label in labels if label not in there or (again and again in mesh)]
        if not missing:
            continue
        resolved = flags.resolve(["flags", *MODEL, *MESHES[mesh]], os.environ)
        program = planner.lower(fdl.build(resolved.tree), chip)
        for label in missing:
            print(f"{mesh}: {label} ...", file=sys.stderr)
            there[label] = {"options": OPTIONS[label], **compiled(program, OPTIONS[label])}
            kept = {"jax": jax.__version__, "model": MODEL, "meshes": MESHES, "rows": rows}
            NUMBERS.write_text(json.dumps(kept, indent=1) + "\n")


def table(rows: dict[str, Any]) -> str:
    """Markdown; a row with the numbers of `gpu` says so (a peak within 1 %)."""
    lines = [
        "| mesh | flags | collectives that start apart | waiting for them | step | peak |",
        "|---|---|---|---|---|---|",
    ]
    for mesh in (mesh for mesh in ROWS if mesh in rows):
        found = rows[mesh]
        plain = {name: found["`gpu`"][name] for name in ("apart", "waiting_ms", "step_ms")}
        peak = found["`gpu`"]["peak_gib"]
        for label, row in found.items():
            same = {name: row[name] for name in plain} == plain
            if label != "`gpu`" and same and abs(row["peak_gib"] / peak - 1) < 0.01:
                lines.append(f"| {mesh} | {label} | as with `gpu`, all numbers | | | |")
                continue
            apart = ", ".join(f"{n} {kind}" for kind, n in row["apart"].items()) or "none"
            lines.append(
                f"| {mesh} | {label} | {apart} | {abs(row['waiting_ms']):.1f} ms | {row['step_ms']:.1f} ms | "
                f"{row['peak_gib']:.1f} GiB |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--again", metavar="MESH", help="compile meshes with this in their name")
    parser.add_argument("--check", action="store_true", help="compile and change nothing")
    options = parser.parse_args()
    rows = json.loads(NUMBERS.read_text())["rows"] if NUMBERS.exists() else {}
    if not options.check:
        measure(rows, options.again)
    return page.renew(PAGE, "xla_bundles_table.py", {"flags": table(rows)}, check=options.check)


if __name__ == "__main__":
    sys.exit(main())
