"""What each choice of CHECKPOINT_POLICY and CHECKPOINT_LAYERS takes, from plans: memory, FLOPs, time.

    python scripts/remat_table.py --output docs/benchmarks [--chip h100] [main.py's flags ...]

Compiles the training step of one model once for each choice (`--mode=plan`; nothing runs) and writes a JSON file and a
picture; prints the table. The memory is XLA's own analysis.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from paxlike.arguments import ArgumentParser  # noqa: E402

MODEL = [
    "--fdl_config=Synthetic5B",
    "--fdl.ICI_MESH_SHAPE=[1,8,1]",
    "--fdl.DCN_MESH_SHAPE=[1,1,1]",
    "--fdl.PERCORE_BATCH_SIZE=4",
]
CHOICES = [  # policy, layers
    ("SAVE_EVERYTHING", "all"),
    ("SAVE_NOTHING", "first:6"),
    ("SAVE_NOTHING", "every:2"),
    ("SAVE_DOT_ONLY", "all"),
    ("SAVE_DOT_EXCEPT_LOGITS", "all"),
    ("SAVE_DOT_WITH_NO_BATCH_DIM", "all"),
    ("SAVE_DOT_FOR_MLPERF_200B", "all"),
    ("SAVE_CONTEXT_AND_OUT_PROJ", "all"),
    ("host:context,out_proj", "all"),
    ("context", "all"),
    ("SAVE_NOTHING", "all"),
]
GIB = 2**30


def main() -> None:
    """Plans every choice in a process of its own."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of remat.json and .png")
    parser.add_argument("--chip", default="h100")
    options, flags = parser.parse_known_args()
    model = flags or MODEL
    rows = []
    for number, (policy, layers) in enumerate(CHOICES, start=1):
        print(f"[{number}/{len(CHOICES)}] {policy} {layers}", file=sys.stderr, flush=True)
        rows.append(
            {"policy": policy, "layers": layers, **plan(model, policy, layers, options.chip)}
        )
    command = f"python scripts/remat_table.py --output docs/benchmarks --chip {options.chip}"
    options.output.mkdir(parents=True, exist_ok=True)
    found = {
        "command": " ".join([command, *flags]),
        "model": model,
        "chip": options.chip,
        "rows": rows,
    }
    (options.output / "remat.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(rows, options.output / "remat.png")
    print(table(rows))


def plan(model: list[str], policy: str, layers: str, chip: str) -> dict[str, Any]:
    """Numbers of one choice; an error where it cannot be compiled."""
    with tempfile.TemporaryDirectory() as folder:
        choice = [f"--fdl.CHECKPOINT_POLICY={policy}", f"--fdl.CHECKPOINT_LAYERS={layers}"]
        command = [sys.executable, str(ROOT / "main.py"), *model, *choice, "--mode=plan"]
        command += [f"--chip={chip}", f"--job_log_dir={folder}"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            sys.exit(f"{policy} {layers}: {done.stderr.strip().splitlines()[-1]}")
        made = json.loads((Path(folder) / "plan.json").read_text())
    return {
        "peak_bytes": made["memory"]["peak"],
        "activation_bytes": made["memory"]["activations"],
        "fits": made["memory"]["fits"],
        "extra_flops": made["traced_flops"] / made["flops"] - 1.0,
        "step_seconds": made["estimate"]["step_seconds"],
        "compile_seconds": made["compile_seconds"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| `CHECKPOINT_POLICY` | `CHECKPOINT_LAYERS` | peak, GiB | activations, GiB | more FLOPs | step, s |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        peak = f"{row['peak_bytes'] / GIB:.1f}{'' if row['fits'] else ' (does not fit)'}"
        rest = f"{row['activation_bytes'] / GIB:.1f} | +{100 * row['extra_flops']:.0f} % | {row['step_seconds']:.3f}"
        lines.append(f"| `{row['policy']}` | `{row['layers']}` | {peak} | {rest} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Memory against FLOPs, a point for each choice."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for number, row in enumerate(sorted(rows, key=lambda row: -row["peak_bytes"])):
        layers = "" if row["layers"] == "all" else f", layers {row['layers']}"
        axes.plot(
            100 * row["extra_flops"],
            row["peak_bytes"] / GIB,
            marker=("o", "s", "^", "D", "v", "P", "X")[number % 7],
            markersize=9,
            linestyle="",
            alpha=0.8,
            label=row["policy"] + layers,
        )
    figure.legend(loc="outside right upper", fontsize=8)
    axes.set_xlabel("FLOPs beyond those that the model needs, %")
    axes.set_ylabel("peak memory of a device, GiB")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
