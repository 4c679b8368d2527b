"""Whether training in FP8 learns the same: a small GPT and a small LLaMA, bfloat16 beside FP8, several seeds.

    python scripts/fp8_curves.py FOLDER [--steps 1000] [--seeds 0 1 2] [--recipe delayed] [--warmup 200]
        [--output docs/benchmarks]

Text and tokenizer are those of the quickstart (the library of this Python); nothing is downloaded. Run again, it goes
on where it stopped. Writes `fp8_curves.json` (held-out losses of each run, means, and the difference in percent, of the
means and of each seed) and `fp8_curves.png` to `--output`. FP8 is imitated on a CPU: the numbers are those of its
rounding, the speed is not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from paxlike.arguments import ArgumentParser  # noqa: E402
from paxlike.log.history import read_history  # noqa: E402

AIM = 0.5  # percent of the held-out loss
VOCABULARY = 1024
FAMILIES = {"GPT": "configs.gpt.Quickstart", "LLaMA": "configs.llama.QuickstartLLaMA"}
SIZES = {
    "NUM_LAYERS": 2,
    "NUM_HEADS": 4,
    "MODEL_DIMS": 64,
    "HIDDEN_DIMS": 256,
    "VOCAB_SIZE": VOCABULARY,
    "MAX_SEQ_LEN": 64,
    "PERCORE_BATCH_SIZE": 8,
    "ICI_MESH_SHAPE": "[1,1,1]",
    "FPROP_DTYPE": "bfloat16",
    "EVAL_MAX_BATCHES": 60,
    "EVAL_INTERVAL_STEPS": 250,
    "SUMMARY_INTERVAL_STEPS": 10,
    "CHECKPOINT_EVERY_N_STEPS": 500,
    "CHECKPOINT_MAX_TO_KEEP": 1,
}


def main() -> int:
    """The command."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="for the runs")
    parser.add_argument("--steps", type=int, default=1000, help="of each run (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipe", default="delayed", choices=("delayed", "current"))
    parser.add_argument("--amax_history", type=int, default=1024, help="delayed (%(default)s)")
    parser.add_argument("--warmup", type=int, help="steps (a fifth of --steps); see docs/fp8.md")
    parser.add_argument("--output", type=Path, help="for the JSON file and the picture (FOLDER)")
    options = parser.parse_args()
    if options.warmup is None:
        options.warmup = max(1, options.steps // 5)
    data = prepare(options.folder / "data")
    runs = [
        (family, kind, seed)
        for seed in options.seeds
        for family in FAMILIES
        for kind in ("bf16", "fp8")
    ]
    for number, run in enumerate(runs, 1):
        print(f"run {number} of {len(runs)}: {' '.join(map(str, run))}", flush=True)
        train(options, data, *run)
    found = results(options, runs)
    output = options.output or options.folder
    output.mkdir(parents=True, exist_ok=True)
    (output / "fp8_curves.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(options, runs, output / "fp8_curves.png")
    for family, numbers in found["families"].items():
        print(
            f"{family}: held-out loss {numbers['bf16']:.4f} in bfloat16, {numbers['fp8']:.4f} in FP8, "
            f"{numbers['difference_percent']:+.2f} % ("
            + ", ".join(f"{percent:+.2f}" for percent in numbers["difference_percent_by_seed"])
            + " % by seed)"
        )
    if any(abs(n["difference_percent"]) > AIM for n in found["families"].values()):
        print(f"more than {AIM} % apart", file=sys.stderr)
        return 1
    return 0


def prepare(data: Path) -> Path:
    """Text and tokenizer, made once."""
    steps = {
        "heldout.jsonl": ["paxlike.data.stdlib_text", "--output", str(data)],
        "sentencepiece.model": [
            "paxlike.data.train_tokenizer",
            f"--input={data / 'train.jsonl'}",
            f"--vocab_size={VOCABULARY}",
            f"--output={data / 'sentencepiece.model'}",
        ],
    }
    for made, command in steps.items():
        if not (data / made).exists():
            subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True)
    return data


def train(options: argparse.Namespace, data: Path, family: str, kind: str, seed: int) -> None:
    """One run, or what is left of it."""
    knobs: dict[str, Any] = {
        **SIZES,
        "MAX_STEPS": options.steps,
        "LR_COS_WARMUP": options.warmup,
        "LR_COS_DECAY_START": options.warmup + 1,
        "LR_COS_DECAY_END": options.steps,
        "SEED": seed,
        "TRAIN_INPUT_RANDOM_SEED": seed,
        "TRAIN_FILES": data / "train.jsonl",
        "EVAL_FILES": data / "heldout.jsonl",
        "CACHE_DIR": data / "cache",
    }
    if kind == "fp8":
        knobs |= {"USE_FP8": True, "FP8_RECIPE": options.recipe}
        if options.recipe == "delayed":
            knobs["FP8_AMAX_HISTORY"] = options.amax_history
    place = directory(options, family, kind, seed)
    place.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "main.py", f"--fdl_config={FAMILIES[family]}", "--mode=train"]
    command += [
        f"--job_log_dir={place}",
        *(f"--fdl.{name}={value}" for name, value in knobs.items()),
    ]
    environ = {
        name: v for name, v in os.environ.items() if not name.startswith(("ENABLE_", "NVTE_"))
    }
    environ["VOCAB_PATH"] = str(data / "sentencepiece.model")
    with (place / "output.txt").open("a") as log:
        done = subprocess.run(command, cwd=ROOT, env=environ, stdout=log, stderr=log)
    if done.returncode:
        sys.exit(f"fp8_curves: {' '.join(command)} failed: see {place / 'output.txt'}")


def directory(options: argparse.Namespace, family: str, kind: str, seed: int) -> Path:
    """The log folder of a run; other steps, another warm-up or recipe are other runs."""
    recipe = options.recipe + (str(options.amax_history) if options.recipe == "delayed" else "")
    name = f"{family}_{kind if kind == 'bf16' else f'{kind}_{recipe}'}_{seed}"
    return (options.folder / f"{options.steps}_steps_{options.warmup}_warmup" / name).resolve()


def results(options: argparse.Namespace, runs: list[tuple[str, str, int]]) -> dict[str, Any]:
    """Last held-out loss of each run, means over the seeds, and how far apart they are."""
    listed = []
    for family, kind, seed in runs:
        history = read_history(directory(options, family, kind, seed))
        (split,) = history.evaluations
        steps, losses = history.series("loss", split=split)
        listed.append(
            {"family": family, "kind": kind, "seed": seed, "steps": steps, "held_out": losses}
        )
    last = {(r["family"], r["kind"], r["seed"]): r["held_out"][-1] for r in listed}
    percent = lambda fp8, bf16: 100 * (fp8 / bf16 - 1)
    families = {}
    for family in FAMILIES:
        of = {
            kind: [last[family, kind, seed] for seed in options.seeds] for kind in ("bf16", "fp8")
        }
        mean = {kind: float(np.mean(losses)) for kind, losses in of.items()}
        by_seed = [percent(*pair) for pair in zip(of["fp8"], of["bf16"], strict=True)]
        families[family] = {
            **mean,
            "difference_percent": percent(mean["fp8"], mean["bf16"]),
            "difference_percent_by_seed": by_seed,
        }
    sizes = {name: str(value) for name, value in SIZES.items()}
    about = {"steps": options.steps, "warmup": options.warmup, "seeds": options.seeds}
    about["recipe"] = options.recipe
    if options.recipe == "delayed":
        about["amax_history"] = options.amax_history
    return {**about, "sizes": sizes, "families": families, "runs": listed}


def draw(options: argparse.Namespace, runs: list[tuple[str, str, int]], output: Path) -> None:
    """Training loss, mean over the seeds, smoothed, with all held-out losses; below, how far FP8 is above bfloat16."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, every = pyplot.subplots(
        2, len(FAMILIES), figsize=(10, 6), sharex=True, sharey="row", layout="constrained",
        height_ratios=(2, 1),
    )  # fmt: skip
    styles = {"bf16": ("bfloat16", "#56B4E9", 5.0), "fp8": ("FP8", "#D55E00", 1.2)}
    for axes, below, family in zip(*every, FAMILIES, strict=True):
        smooth, held = {}, {}
        for kind, (label, color, width) in styles.items():
            histories = [
                read_history(directory(options, *run)) for run in runs if run[:2] == (family, kind)
            ]
            steps = np.array(histories[0].series("loss")[0])
            losses = np.mean([history.series("loss")[1] for history in histories], axis=0)
            window = max(1, len(steps) // 20)
            smooth[kind] = np.convolve(losses, np.ones(window) / window, mode="valid")
            axes.plot(steps[window - 1 :], smooth[kind], color=color, label=label, linewidth=width)
            (split,) = histories[0].evaluations
            evaluated = histories[0].series("loss", split=split)[0]
            held[kind] = np.array([h.series("loss", split=split)[1] for h in histories])
            axes.plot(evaluated, held[kind].T, "o", color=color, markersize=2.5 + width)
        percent = lambda of: 100 * (of["fp8"] / of["bf16"] - 1)
        below.plot(steps[window - 1 :], percent(smooth), color=color, linewidth=1.2)
        below.plot(evaluated, percent(held).T, "o", color=color, markersize=3.5)
        below.axhspan(-AIM, AIM, color="0.92", zorder=0)
        axes.set_title(f"{family}, {len(options.seeds)} seeds")
        axes.legend()
        below.set_xlabel("steps")
        for one in (axes, below):
            one.grid(alpha=0.3)
    every[0, 0].set_ylabel("loss (nats per token); dots: held out")
    every[1, 0].set_ylabel("over bfloat16, %; grey: aim")
    figure.savefig(output, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
