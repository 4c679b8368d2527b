"""What a watched step showed: which module or gradient is the first to go wrong, as a page and as JSON."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

from paxlike.train.watch import Stats

OUTLIER = 10.0  # times the RMS of the same module in other layers, or at the step before
_SHOWN = 12  # lines of a table


@dataclasses.dataclass(frozen=True)
class Row:
    """One module, or one parameter, in one layer.

    Attributes:
      name: its path in the model.
      layer: None outside stacks.
      max, rms: of the absolute values, over what is finite.
      non_finite: share of its numbers that are not.
      to_layers: rms over the median of that of the same module in the other layers; None where there is none.
      to_before: rms over that of the step before; None where that was not taken.
      norm, update, value_non_finite: of parameters: norm of the gradient, RMS of the change over that of the values,
        and share of the values that is not finite.
    """

    name: str
    layer: int | None
    max: float
    rms: float
    non_finite: float
    to_layers: float | None = None
    to_before: float | None = None
    norm: float | None = None
    update: float | None = None
    value_non_finite: float | None = None

    @property
    def where(self) -> str:
        """Name and layer."""
        return self.name if self.layer is None else f"{self.name}, layer {self.layer}"

    @property
    def outlying(self) -> float:
        """The larger of its two ratios, 0 where there is none."""
        return max(self.to_layers or 0.0, self.to_before or 0.0)


@dataclasses.dataclass(frozen=True)
class Seen:
    """What was measured in the step, and in the one before (None where that was not taken)."""

    now: dict[str, dict[str, Stats]]
    before: dict[str, dict[str, Stats]] | None
    order: list[str]  # of the modules
    metrics: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a replay found.

    Attributes:
      spike: what was recorded; of a step that was not, its number alone.
      checkpoint: step that the replay started from.
      metrics: of the step, on the host.
      modules: outputs, in the order in which they are computed.
      parameters: gradients, in the order in which they are computed: backwards.
      has_before: whether the step before was measured too.
    """

    spike: Mapping[str, Any]
    checkpoint: int
    metrics: Mapping[str, Any]
    modules: list[Row]
    parameters: list[Row]
    has_before: bool

    def verdict(self) -> list[str]:
        """One line on the outputs, and one on the gradients where something is wrong with them."""
        lines = []
        bad = next((row for row in self.modules if row.non_finite), None)
        odd = next((row for row in self.modules if row.outlying > OUTLIER), None)
        if bad is not None:
            lines.append(
                f"first output that is not finite: {bad.where} ({bad.non_finite:.3%} of its numbers)"
            )
            lines += [
                f"its parameter {row.where} is not finite itself ({row.value_non_finite:.3%})"
                for row in self.parameters
                if row.value_non_finite
                and (row.name.rpartition("/")[0], row.layer) == (bad.name, bad.layer)
            ]
            if odd is not None and self.modules.index(odd) < self.modules.index(bad):
                lines.append(
                    f"first outlier before it: {odd.where} (RMS {odd.rms:.3g}{_ratios(odd)})"
                )
        elif odd is not None:
            lines.append(f"first outlying output: {odd.where} (RMS {odd.rms:.3g}{_ratios(odd)})")
        else:
            most = max((row.outlying for row in self.modules), default=0.0)
            lines.append(
                f"all outputs are finite, and none stands out: the largest ratio is {most:.3g}"
            )
        bad = next((row for row in self.parameters if row.non_finite), None)
        if bad is not None:
            lines.append(f"first gradient that is not finite, from the loss back: {bad.where}")
        return lines

    def text(self) -> str:
        """The page that is printed."""
        loss, norm = self.metrics["loss"].value(), float(self.metrics["grad_norm"])
        lines = [
            f"step {self.spike['step']:,} again, from the checkpoint of step {self.checkpoint:,}: "
            f"loss {loss:.6g}, gradient norm {norm:.4g}{self._compared(loss)}",
            *self.verdict(),
        ]
        if not self.has_before:
            lines.append(
                "no step before to compare with: the checkpoint is the one just before this step"
            )
        lines += _table("output of", self.modules)
        return "\n".join(lines + _table("gradient of", self.parameters))

    def _compared(self, loss: float) -> str:
        if "loss" not in self.spike:
            return " (it was not recorded)"
        if self.is_same(loss):
            return ", the loss that was recorded"
        return f"; recorded was the loss {self.spike['loss']!r}"

    def is_same(self, loss: float) -> bool:
        """Whether the loss is that of the record, to the bit; JSON has one word for all that is not finite."""
        there = self.spike.get("loss")
        return not math.isfinite(loss) if there is None else loss == there

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        loss = self.metrics["loss"].value()
        return {
            "step": self.spike["step"],
            "checkpoint": self.checkpoint,
            "loss": loss,
            "grad_norm": float(self.metrics["grad_norm"]),
            "same_loss": self.is_same(loss) if "loss" in self.spike else None,
            "compared_with_step_before": self.has_before,
            "verdict": self.verdict(),
            "modules": [dataclasses.asdict(row) for row in self.modules],
            "parameters": [dataclasses.asdict(row) for row in self.parameters],
        }


def module_rows(seen: Seen) -> list[Row]:
    """Outputs in the order of computation: all modules of a layer, then those of the next."""
    before = seen.before["modules"] if seen.before else {}
    rows: list[Row] = []
    in_layers = lambda name: np.ndim(seen.now["modules"][name]["rms"]) > 0
    for _, names in itertools.groupby(seen.order, in_layers):
        parts = [_rows_of(name, seen.now["modules"][name], before.get(name)) for name in names]
        rows += [row for layer in zip(*parts) for row in layer]
    return rows


def parameter_rows(seen: Seen, modules: list[Row]) -> list[Row]:
    """Gradients in the order of computation: from the loss back."""
    before = seen.before["gradients"] if seen.before else {}
    place = {(row.name, row.layer): number for number, row in enumerate(modules)}
    rows = []
    for name, stats in seen.now["gradients"].items():
        moved, value = seen.now["updates"][name], seen.now["values"][name]
        found = _rows_of(name, stats, before.get(name))
        for index, row in enumerate(found):
            at = lambda array, i=index: float(np.atleast_1d(array)[i])
            size = at(value["rms"])
            rows.append(
                dataclasses.replace(
                    row,
                    norm=at(stats["norm"]),
                    update=at(moved["rms"]) / size if size else None,
                    value_non_finite=at(value["non_finite"]),
                )
            )
    return sorted(rows, key=lambda row: -place.get((row.name.rpartition("/")[0], row.layer), -1))


def _rows_of(name: str, stats: Stats, before: Stats | None) -> list[Row]:
    """A row for each layer; one where there are none."""
    columns = {key: np.atleast_1d(stats[key]) for key in ("max", "rms", "non_finite")}
    rms = [float(each) for each in columns["rms"]]
    rows = []
    for layer in range(len(rms)):
        others = rms[:layer] + rms[layer + 1 :]
        numbers = {key: float(column[layer]) for key, column in columns.items()}
        rows.append(
            Row(
                name,
                layer if np.ndim(stats["rms"]) else None,
                **numbers,
                to_layers=_ratio(rms[layer], statistics.median(others)) if others else None,
                to_before=None
                if before is None
                else _ratio(rms[layer], float(np.atleast_1d(before["rms"])[layer])),
            )
        )
    return rows


def _ratio(a: float, b: float) -> float | None:
    return a / b if b > 0 else None


def _ratios(row: Row) -> str:
    parts = {"other layers": row.to_layers, "the step before": row.to_before}
    return "".join(f", {v:.3g} x {name}" for name, v in parts.items() if v is not None)


def _table(title: str, rows: list[Row]) -> list[str]:
    """What is wrong, in order; where nothing is, the largest ratios."""
    shown = [row for row in rows if row.non_finite or row.outlying > OUTLIER][:_SHOWN]
    if not shown:
        largest = sorted(rows, key=lambda row: -row.outlying)[: _SHOWN // 2]
        shown = [row for row in rows if row in largest]
    names = [title, *(row.where for row in shown)]
    width = max(map(len, names))
    of_parameters = any(row.norm is not None for row in shown)
    head = ["max", "RMS", "not finite", "x other layers", "x step before"]
    head += ["norm", "update/value"] if of_parameters else []
    lines = ["", f"{title:<{width}}  " + "  ".join(f"{each:>10}" for each in head)]
    for row in shown:
        cells = [row.max, row.rms, row.non_finite, row.to_layers, row.to_before]
        cells += [row.norm, row.update] if of_parameters else []
        texts = ["-" if cell is None else f"{cell:.4g}" for cell in cells]
        ends = (f"{text:>{max(10, len(name))}}" for text, name in zip(texts, head))
        lines.append(f"{row.where:<{width}}  " + "  ".join(ends))
    if len(rows) > len(shown):
        lines.append(f"... of {len(rows)}")
    return lines
