"""Reads what a run wrote to `metrics.jsonl`, as if it had never been interrupted.

A run that is stopped goes back to its last checkpoint and repeats the steps after it, so the file
may hold a step twice. Lines are only ever appended; a reader drops what a later start wrote over.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import warnings
from typing import Any

METRICS_FILE = "metrics.jsonl"
TRAIN = "train"


@dataclasses.dataclass(frozen=True)
class History:
    """The effective history of one run.

    Attributes:
        train: the summary lines of training, in the order of steps.
        evaluations: for each held-out split, its lines in the order of steps.
        events: every event line of every start, in the order of writing.
    """

    train: list[dict[str, Any]]
    evaluations: dict[str, list[dict[str, Any]]]
    events: list[dict[str, Any]]

    @property
    def environment(self) -> dict[str, Any]:
        """The environment of the latest start; empty when none was written."""
        environments = [event for event in self.events if event["event"] == "environment"]
        return environments[-1] if environments else {}

    def series(self, key: str, *, split: str = TRAIN) -> tuple[list[int], list[float]]:
        """The steps and values of `key` in `split`, where it is there and finite."""
        lines = self.train if split == TRAIN else self.evaluations.get(split, [])
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        return [step for step, _ in points], [value for _, value in points]

    def last(self, key: str, *, split: str = TRAIN) -> float | None:
        """The last value of `key` in `split`, or None."""
        values = self.series(key, split=split)[1]
        return values[-1] if values else None


def read_history(path: str | os.PathLike) -> History:
    """The effective history from a `metrics.jsonl` or from the log folder that holds it.

    Raises:
        ValueError: there is no such file.
    """
    lines = read_lines(path)
    metrics = _effective(lines)
    evaluations: dict[str, list[dict[str, Any]]] = {}
    for line in metrics:
        if line["split"] != TRAIN:
            evaluations.setdefault(line["split"], []).append(line)
    return History(
        train=[line for line in metrics if line["split"] == TRAIN],
        evaluations=evaluations,
        events=[line for line in lines if "event" in line],
    )


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The metric lines (train and held-out) that count, in the order of steps."""
    return _effective(read_lines(path))


def read_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Every line as it was written, events included; a torn line is left out with a warning."""
    path = pathlib.Path(path)
    path = path / METRICS_FILE if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"no metrics at {str(path)!r}: give the folder that was --job_log_dir of a run"
        )
    lines = []
    for number, text in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not text.strip():
            continue
        try:
            lines.append(json.loads(text))
        except ValueError:  # a power cut in the middle of a line; the rest of the file is sound
            warnings.warn(f"{path}: line {number} is torn and left out", stacklevel=2)
    return lines


def _effective(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept: dict[tuple[str, int], dict[str, Any]] = {}
    last_train_step = -1
    for line in lines:
        if line.get("event") == "resumed":
            kept = {key: old for key, old in kept.items() if key[1] <= line["from_step"]}
            last_train_step = line["from_step"]
        elif "split" in line:
            if line["split"] == TRAIN:
                # Training that goes backwards without a word started again from the beginning.
                if line["step"] <= last_train_step:
                    kept = {key: old for key, old in kept.items() if key[1] < line["step"]}
                last_train_step = line["step"]
            kept[line["split"], line["step"]] = line
    return [kept[key] for key in sorted(kept, key=lambda key: key[1])]
