"""Draws the loss curves of runs from what they logged.

    python -m paxlike.log.plot RUN_DIR [RUN_DIR ...] -o losses.png

The loss of each summary is drawn light, a smoothed line over it, and held-out losses as points.
Needs matplotlib, which `pip install paxlike[plot]` brings.
"""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from paxlike.arguments import ArgumentParser
from paxlike.log.history import TRAIN, History, read_history

# Okabe and Ito's palette without its yellow: told apart by colour-blind readers, too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#333333")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def plot_losses(
    metrics_paths: str | os.PathLike | Sequence[str | os.PathLike],
    output_png: str | os.PathLike,
    *,
    title: str = "",
    labels: Sequence[str] | None = None,
    reference: Mapping[str, float] | None = None,
    x: str = "tokens",
) -> pathlib.Path:
    """Writes a PNG with the training and held-out loss of one or several runs.

    Args:
        metrics_paths: log folders of runs or their `metrics.jsonl`; one, or a list of them.
        output_png: the picture; its folder is made where it is missing.
        title: above the picture.
        labels: a name for each run; the folders' names when None.
        reference: name -> loss in nats per token, drawn as horizontal lines (unigram entropy, say).
        x: "tokens" (steps where a run logged no tokens) or "steps".

    Raises:
        ValueError: no metrics there, no loss in them, or an unknown `x`.
        ModuleNotFoundError: matplotlib is missing; one line that says how to install it.
    """
    if x not in ("tokens", "steps"):
        raise ValueError(f"x must be 'tokens' or 'steps', not {x!r}")
    if isinstance(metrics_paths, str | os.PathLike):
        metrics_paths = [metrics_paths]
    paths = [pathlib.Path(path) for path in metrics_paths]
    histories = [read_history(path) for path in paths]
    for path, history in zip(paths, histories, strict=True):
        if not any(history.series("loss", split=split)[0] for split in _splits(history)):
            raise ValueError(f"nothing to draw: no loss was logged in {str(path)!r} yet")
    labels = labels or [_run_name(path) for path in paths]
    pyplot = import_pyplot()

    by_tokens = x == "tokens" and all(history.series("tokens")[0] for history in histories)
    scale, x_label = _x_axis(histories, by_tokens)
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(9, 5.4), layout="constrained")
        losses: list[float] = []
        for index, (history, label) in enumerate(zip(histories, labels, strict=True)):
            # One run: a colour for each split. Several: a colour for each run, markers by split.
            prefix = f"{label}: " if len(histories) > 1 else ""
            colors = [COLORS[index % 7]] * 7 if len(histories) > 1 else COLORS
            losses += _draw_run(axes, history, prefix, colors, by_tokens, scale)
        for name, value in (reference or {}).items():
            axes.axhline(
                value, color="0.35", linewidth=1.2, dashes=(5, 3), label=f"{name} ({value:.2f})"
            )
            losses.append(value)
        axes.set(xlabel=x_label, ylabel="loss (nats per token)", title=title)
        axes.set_ylim(*_y_range(losses))
        axes.margins(x=0.02)
        if len(axes.get_legend_handles_labels()[0]) <= 8:
            axes.legend()
        else:  # too tall to stand beside the curves
            figure.legend(loc="outside lower center", ncols=2)
        output = pathlib.Path(output_png)
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=150)
        pyplot.close(figure)
    return output


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: draws the runs that are named."""
    parser = ArgumentParser(
        prog="python -m paxlike.log.plot", description="Draws the loss curves of runs."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="job_log_dir of a run")
    parser.add_argument("-o", "--output", default="losses.png", help="the PNG (%(default)s)")
    parser.add_argument("--title", default="", help="above the picture")
    parser.add_argument("--labels", nargs="+", help="a name for each run (its folder's name)")
    parser.add_argument("--x", default="tokens", choices=("tokens", "steps"), help="(%(default)s)")
    parser.add_argument(
        "--reference",
        action="append",
        default=[],
        metavar="NAME=LOSS",
        help="a horizontal line, such as 'unigram entropy=6.2'; may be repeated",
    )
    options = parser.parse_args(arguments)
    if options.labels and len(options.labels) != len(options.runs):
        parser.error(
            f"{len(options.labels)} labels for {len(options.runs)} runs: give one for each"
        )
    try:
        reference = dict(_parse_reference(text) for text in options.reference)
        output = plot_losses(
            options.runs,
            options.output,
            title=options.title,
            labels=options.labels,
            reference=reference,
            x=options.x,
        )
    except (ValueError, ModuleNotFoundError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(output)
    return 0


def _draw_run(
    axes: Any,
    history: History,
    prefix: str,
    colors: Sequence[str],
    by_tokens: bool,
    scale: float,
) -> list[float]:
    """Draws one run; returns the losses that the picture must show."""
    steps, losses = history.series("loss")
    xs = _positions(history, steps, by_tokens) / scale
    shown: list[float] = []
    if losses:
        smooth = _smoothed(np.asarray(losses))
        axes.plot(xs, losses, color=colors[0], alpha=0.3, linewidth=1.0)
        axes.plot(xs, smooth, color=colors[0], linewidth=2.0, label=f"{prefix}train")
        shown += list(smooth)
    for index, split in enumerate(history.evaluations):
        steps, losses = history.series("loss", split=split)
        if not losses:
            continue
        axes.plot(
            _positions(history, steps, by_tokens) / scale,
            losses,
            color=colors[(index + 1) % 7],
            linestyle="none",
            marker=_MARKERS[index % 7],
            markersize=7,
            markerfacecolor="white",
            markeredgewidth=1.8,
            zorder=3,
            label=f"{prefix}{split} ({losses[-1]:.3f})",
        )
        shown += losses
    return shown


def _smoothed(values: np.ndarray) -> np.ndarray:
    """A centred mean over 1/40 of the points: no lag, unlike a running average.

    The window shrinks at the steep start, and is cut off at the flat end, where one value is noise.
    """
    indices = np.arange(len(values))
    before = np.minimum(len(values) // 80, indices)
    stop = np.minimum(indices + before + 1, len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[stop] - sums[indices - before]) / (stop - indices + before)


def _positions(history: History, steps: Sequence[int], by_tokens: bool) -> np.ndarray:
    if not by_tokens:
        return np.asarray(steps, np.float64)
    known_steps, tokens = history.series("tokens")
    return np.interp(steps, [0, *known_steps], [0, *tokens])


def _x_axis(histories: Sequence[History], by_tokens: bool) -> tuple[float, str]:
    """The unit that the x axis is divided by, and its label."""
    if not by_tokens:
        return 1.0, "step"
    most = max(history.last("tokens") or 0.0 for history in histories)
    for factor, word in (
        (1e12, "trillion "),
        (1e9, "billion "),
        (1e6, "million "),
        (1e3, "thousand "),
    ):
        if most >= factor:
            return factor, f"training tokens ({word.strip()}s)"
    return 1.0, "training tokens"


def _y_range(losses: Sequence[float]) -> tuple[float, float]:
    """All losses with a margin, but a first spike does not squeeze the rest of the curve."""
    low, high = min(losses), max(losses)
    usual = float(np.percentile(losses, 97)) if len(losses) > 100 else high
    high = min(high, low + 3 * (usual - low)) if usual > low else high
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin


def _splits(history: History) -> list[str]:
    return [TRAIN, *history.evaluations]


def _run_name(path: pathlib.Path) -> str:
    path = path.resolve()
    return path.parent.name if path.is_file() else path.name


def _parse_reference(text: str) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    try:
        return name or "reference", float(value)
    except ValueError:
        raise ValueError(f"--reference {text!r} is not NAME=LOSS, such as entropy=6.2") from None


def import_pyplot() -> Any:
    """matplotlib without a display; ModuleNotFoundError in one line where it is missing."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "drawing needs matplotlib, which is not installed: pip install 'paxlike[plot]'"
        ) from None
    matplotlib.use("Agg")  # no display on a cluster
    from matplotlib import pyplot

    return pyplot


STYLE = {
    "font.size": 12,
    "axes.titlesize": 14,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "legend.frameon": False,
    "legend.fontsize": 11,
}


if __name__ == "__main__":
    sys.exit(main())
