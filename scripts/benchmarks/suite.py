"""Training steps on one H100: rows of models x backends, measured where there is a GPU and planned where there is none.

    python scripts/benchmark.py --suite=h100 --output FOLDER

Each row is a process of its own, and its numbers are written when it ends: the same command goes on behind rows that
are there already (`--rows` measures some of them anew). With a GPU the file is `h100.json`, and what was planned
beforehand (`docs/benchmarks/h100_plan.json`) stands beside what was measured. Without one, every row is compiled for an
H100 without a device, models that do not fit are cut to the layers that do by the plan's own memory, and the file is
`h100_plan.json`: nothing in it was measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
PLANNED = ROOT / "docs" / "benchmarks" / "h100_plan.json"
SUITES = ("h100",)
TE = ("transformer_engine",)


@dataclasses.dataclass(frozen=True)
class Row:
    """One model with one backend.

    Attributes:
      config: by its dotted path; `knobs` change it.
      layers: of the whole model; fewer are measured where they do not fit, None: the config's own, uncut.
      environment: of the process.
      needs: Python modules without which the row is skipped.
      pax: sequences per second and GPU of Pax for the whole model, and with what.
    """

    name: str
    config: str
    knobs: dict[str, Any]
    layers: int | None = None
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    needs: tuple[str, ...] = ()
    pax: tuple[float, str] | None = None


_REFERENCE = {"USE_CUDNN_FLASH_ATTENTION": False}
_FP8 = {"USE_FP8": True}
_TE = {"environment": {"ENABLE_TE": "1", "NVTE_FUSED_ATTN": "1"}, "needs": TE}
_TE_FP8 = {
    "environment": {"ENABLE_TE": "1", "ENABLE_FP8": "1", "NVTE_FUSED_ATTN": "1"},
    "needs": TE,
}
# Pax on H100 with Transformer Engine, per GPU: 126M on 64, 5B and 175B on 256, LLaMA 7B on 16.
_126M = {"config": "configs.gpt.Synthetic126M", "pax": (73.6, "TE bf16")}
_1B = {"config": "scripts.benchmarks.suite_models.Synthetic1B"}
_5B = {"config": "configs.gpt.Synthetic5B", "layers": 24}
_175B = {"config": "configs.gpt.Synthetic175B", "layers": 96}
# One GPU keeps everything for the backward pass, as more layers would not be faster; unrolled layers save the copies
# into and out of the arrays of a scan, and three weights those out of a combined one.
_KEEP = {"USE_REPEATED_LAYER": False, "CHECKPOINT_POLICY": "SAVE_EVERYTHING"}
_OPEN = {**_KEEP, "COMBINE_QKV": False}
_RECOMPUTED = {"CHECKPOINT_POLICY": "SAVE_DOT_WITH_NO_BATCH_DIM"}  # all scores would not fit
_OPEN_175B = {**_OPEN, "LOGITS_CHUNK": 512}  # its table is so large that fewer, larger chunks pay
_OPEN_7B = {**_KEEP, "PERCORE_BATCH_SIZE": 4}
_7B = {"config": "scripts.benchmarks.suite_models.SyntheticLLaMA7B", "layers": 32}
_BF16_5B, _FP8_5B = {"pax": (6.47, "TE bf16")}, {"pax": (9.28, "TE FP8")}
_BF16_175B, _FP8_175B = {"pax": (0.199, "TE bf16")}, {"pax": (0.330, "TE FP8")}
_LORA = {"USE_LORA": True, "LORA_RANK": 32, "LORA_BASE": "bfloat16"}

ROWS = (  # what matters most comes first: time may run out
    Row("126m cudnn", knobs={"PERCORE_BATCH_SIZE": 4}, **_126M),
    Row("5b cudnn", knobs=_OPEN, **_5B, **_BF16_5B),
    Row("5b fp8", knobs={**_OPEN, **_FP8}, **_5B, **_FP8_5B),
    Row("7b sft", knobs=_OPEN_7B, **_7B, pax=(2.70, "bf16, 16 GPUs")),
    Row("7b lora", knobs={**_KEEP, "PERCORE_BATCH_SIZE": 2, **_LORA}, **_7B),
    Row("175b cudnn", knobs=_OPEN_175B, **_175B, **_BF16_175B),
    Row("175b fp8", knobs={**_OPEN_175B, **_FP8}, **_175B, **_FP8_175B),
    Row("1.3b cudnn", knobs={"PERCORE_BATCH_SIZE": 8}, **_1B),
    Row("1.3b fp8", knobs={"PERCORE_BATCH_SIZE": 8, **_FP8}, **_1B),
    Row("126m 16 rows", knobs={"PERCORE_BATCH_SIZE": 16}, **_126M),
    Row("126m reference", knobs={"PERCORE_BATCH_SIZE": 4, **_REFERENCE}, **_126M),
    Row("126m chunked", knobs={"PERCORE_BATCH_SIZE": 4, "ATTENTION_KERNEL": "chunked"}, **_126M),
    Row("126m deterministic", knobs={"PERCORE_BATCH_SIZE": 4, "DETERMINISTIC": True}, **_126M),
    Row("5b reference", knobs={**_OPEN, **_RECOMPUTED, **_REFERENCE}, **_5B, **_BF16_5B),
    Row("7b fp8", knobs={**_OPEN_7B, **_FP8}, **_7B),
    Row("126m te", knobs={"PERCORE_BATCH_SIZE": 4}, **_126M, **_TE),
    Row("5b te", knobs=_OPEN, **_5B, **_BF16_5B, **_TE),
    Row("5b te fp8", knobs=_OPEN, **_5B, **_FP8_5B, **_TE_FP8),
    Row("175b te", knobs=_OPEN_175B, **_175B, **_BF16_175B, **_TE),
    Row("175b te fp8", knobs=_OPEN_175B, **_175B, **_FP8_175B, **_TE_FP8),
    Row("7b te fp8", knobs=_OPEN_7B, **_7B, **_TE_FP8),
)


def run(options: argparse.Namespace) -> int:
    """All rows that have no numbers yet, one after the other; 0 unless a row failed."""
    started = time.monotonic()
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    if options.wheelhouse is not None:
        environment["PYTHONPATH"] += os.pathsep + str(_install(options.wheelhouse))
    device = None if options.plan_only else _device(environment)
    rows = [row for row in ROWS if _is_wanted(row, options.rows)]
    if not rows:
        raise SystemExit(f"--rows: {options.rows} is in none of {', '.join(r.name for r in ROWS)}")
    path = None
    kept: dict[str, Any] = {"rows": {}}
    if options.output is not None:
        path = options.output / ("h100.json" if device else "h100_plan.json")
        options.output.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = json.loads(path.read_text())
    kept |= {"measured": device is not None, "device": device, "command": _command()}
    planned = json.loads(PLANNED.read_text())["rows"] if PLANNED.exists() else {}
    print(
        f"{'measured on ' + device if device else 'not measured: planned for an H100'}", flush=True
    )
    for number, row in enumerate(rows, start=1):
        there = kept["rows"].get(row.name, {})
        if "failed" not in there and "skipped" not in there and there and not options.rows:
            continue
        if device and time.monotonic() - started > 60 * options.minutes:
            print(f"{len(rows) - number + 1} rows are left: give the same command again")
            break
        print(f"[{number}/{len(rows)}] {row.name} ...", file=sys.stderr, flush=True)
        before = _known(row, planned if device else kept["rows"])
        found = measure(row, before, environment, device, smoke=options.smoke)
        kept["rows"][row.name] = found
        if path is not None:
            part = path.with_suffix(".part")
            part.write_text(json.dumps(kept, indent=1) + "\n")
            part.replace(path)
        if reason := found.get("failed") or found.get("skipped"):
            print(f"  {row.name}: {reason}", flush=True)
    print(table(kept["rows"]))
    return 1 if any("failed" in found for found in kept["rows"].values()) else 0


def measure(
    row: Row,
    planned: dict[str, Any],
    environment: dict[str, str],
    device: str | None,
    *,
    smoke: bool = False,
) -> dict[str, Any]:
    """The numbers of one row; where it did not run, why: `skipped` or `failed`."""
    missing = [name for name in row.needs if not _has(name, environment)]
    about = {"config": row.config, "knobs": row.knobs, "environment": row.environment}
    about |= {"pax": row.pax}
    if missing:
        return {**about, "skipped": f"{', '.join(missing)} is not installed"}
    task = {
        "config": row.config,
        "knobs": {"ICI_MESH_SHAPE": [1, 1, 1], "DCN_MESH_SHAPE": [1, 1, 1], **row.knobs},
        "whole": row.layers,
        "guess": planned.get("layers"),
        "plan": device is None,
        "smoke": smoke,
    }
    env = {**environment, **row.environment, "TF_CPP_MIN_LOG_LEVEL": "2"}
    if device is None:
        env["JAX_PLATFORMS"] = "cpu"
    else:
        env.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    layers = None if row.layers is None else planned.get("layers", row.layers)
    # Where memory is in pieces, a layer or two less than planned.
    for fewer in range(1 if device is None or layers is None else min(3, layers)):
        task["layers"] = layers if layers is None else layers - fewer
        found = _in_a_process(task, env)
        if "RESOURCE_EXHAUSTED" not in found.get("failed", ""):
            break
    if (
        "seconds" in found
        and found["layers"] == planned.get("layers")
        and "plan_seconds" in planned
    ):
        for name in ("plan_seconds", "plan_peak_bytes"):
            found[name] = planned[name]
    return {**about, **found}


def _in_a_process(task: dict[str, Any], env: dict[str, str]) -> dict[str, Any]:
    """What `suite_row` answers, or `failed` with the end of its report."""
    command = [sys.executable, "-m", "scripts.benchmarks.suite_row", json.dumps(task)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": "took more than 900 s"}
    answers = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode == 0 and answers:
        return json.loads(answers[-1])
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    said = next(
        (line for line in lines if "RESOURCE_EXHAUSTED" in line), (lines or ["nothing"])[-1]
    )
    return {"failed": said[:400]}


def _known(row: Row, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What is known of this row; where that is nothing, the fewest layers that fitted with another backend."""
    found = rows.get(row.name, {})
    if "layers" in found:
        return found
    size = lambda config, knobs: (config, knobs.get("PERCORE_BATCH_SIZE"), knobs.get("USE_LORA"))
    wanted = size(row.config, row.knobs)
    others = [r for r in rows.values() if size(r["config"], r.get("knobs", {})) == wanted]
    layers = [r["layers"] for r in others if "layers" in r]
    return {"layers": min(layers)} if layers else {}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown of what is known. Sequences of the whole model: at this MFU, from the FLOPs of all of its layers."""
    head = [
        "",
        "layers",
        "rows",
        "step ms",
        "tokens/s",
        "MFU",
        "peak GiB",
        "compile s",
        "first step s",
    ]
    head += ["plan: ms", "GiB", "whole model, seq/s", "Pax"]
    lines = [head, ["---"] * len(head)]
    for name, row in rows.items():
        pax = "" if not row.get("pax") else f"{row['pax'][0]} ({row['pax'][1]})"
        reason = row.get("skipped") or row.get("failed")
        if reason:
            lines.append([name, *[""] * 3, _short(reason), *[""] * 7, pax])
            continue
        measured = "seconds" in row
        seconds = row["seconds"] if measured else None
        speed = seconds or row["plan_seconds"]
        peak = row.get("peak_bytes")
        cells = [
            name,
            f"{row['layers']} of {row['whole_layers']}",
            str(row["rows"]),
            f"{1e3 * seconds:.1f}" if seconds else "not measured",
            f"{row['tokens'] / seconds:,.0f}" if seconds else "",
            f"{row['flops'] / speed / row['peak_flops']:.1%}" + ("" if measured else " (planned)"),
            f"{peak / 2**30:.1f}" if peak else "",
            f"{row['compile_seconds']:.0f}",
            f"{row['first_step_seconds']:.1f}" if measured else "",
            f"{1e3 * row['plan_seconds']:.1f}" if "plan_seconds" in row else "",
            f"{row['plan_peak_bytes'] / 2**30:.1f}" if "plan_peak_bytes" in row else "",
            _number(row["rows"] / speed * row["flops"] / row["whole_flops"])
            + ("" if measured else " (planned)"),
            pax,
        ]
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: float) -> str:
    return f"{value:.3g}"


def _short(text: str) -> str:
    return text if len(text) < 100 else text[:97] + "..."


def _is_wanted(row: Row, names: str | None) -> bool:
    return names is None or any(name.strip() in row.name for name in names.split(","))


def _command() -> str:
    return " ".join(["python", "scripts/benchmark.py", *sys.argv[1:]])


def _device(environment: dict[str, str]) -> str | None:
    """Name of the first NVIDIA GPU that jax finds, None where there is none."""
    script = "import jax; d = jax.devices()[0]; print('kind:', d.platform, d.device_kind)"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    found = re.search(r"^kind: gpu (.*)$", done.stdout, re.MULTILINE)
    return found[1] if found else None


def _has(module: str, environment: dict[str, str]) -> bool:
    script = f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{module}') is None)"
    return (
        subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == 0
    )


def _install(wheelhouse: Path) -> Path:
    """A folder with those wheels of which no version is installed; nothing is taken from a network."""
    wheels = sorted(wheelhouse.glob("*.whl"))
    if not wheels:
        raise SystemExit(f"--wheelhouse: there is no wheel in {wheelhouse}")
    missing = [wheel for wheel in wheels if not _is_installed(wheel.name.split("-")[0])]
    folder = Path(tempfile.mkdtemp(prefix="paxlike-wheels-"))
    if missing:
        print("wheels:", ", ".join(wheel.name.split("-")[0] for wheel in missing), file=sys.stderr)
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
        command += ["--target", str(folder), *map(str, missing)]
        subprocess.run(command, check=True)
    return folder


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
