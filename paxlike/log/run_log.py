"""The log of one run: console, TensorBoard and `metrics.jsonl`, all from the same numbers.

`metrics.jsonl` holds one JSON object a line. Lines with `event` tell what happened (`environment`
at every start, `resumed`, `checkpoint_saved`, ...); lines with `split` hold metrics, of training
(`"split": "train"`) or of a held-out set (its name). Numbers that are not finite become null and
are named in `non_finite`. TensorBoard gets the same under `summaries/train` and
`summaries/eval_test_<name>`, with the tags of `paxlike.log.tensorboard`.

Between two summaries `Metric`s are merged, sums with sums and weights with weights, so the loss
that is written is exact whatever the interval; of plain numbers (learning rate, norms) the last
one is written.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from paxlike.log.environment import describe_environment
from paxlike.log.experts import TABLE, ExpertWatch, WatchOptions, is_table
from paxlike.log.files import AppendFile, check_writable, to_jsonable
from paxlike.log.history import METRICS_FILE, TRAIN, read_metrics
from paxlike.log.interval import Interval, numbers
from paxlike.log.metric import Metric
from paxlike.log.progress import Progress, quantity
from paxlike.log.tensorboard import EventFile, tag_of
from paxlike.log.throughput import MFU_CONVENTION, memory_peak, peak_flops

__all__ = ["RunLog", "check_writable"]


class RunLog:
    """Writes what happens in one run; a context manager.

    Processes other than the main one may call everything; nothing happens there.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        num_steps: int | None,
        summary_interval_steps: int = 100,
        tensorboard: bool = True,
        is_main: bool = True,
        progress: bool = True,
        num_devices: int | None = None,
        compute_dtype: Any = "bfloat16",
        peak_flops_per_device: float | None = None,
        experts: WatchOptions | None = None,
    ):
        """Opens the log, appending to what an earlier start of the run wrote.

        Args:
            directory: `job_log_dir`; created where it is missing.
            num_steps: steps of the whole run; None where there is no training (eval, decode).
            summary_interval_steps: steps between two summaries.
            tensorboard: whether to write `summaries/`.
            is_main: True in the one process that writes.
            progress: whether to show the progress line on standard error.
            num_devices: devices that share the work; all of `jax.devices()` when None.
            compute_dtype: picks the peak rate of the chip table.
            peak_flops_per_device: FLOP/s; given, it takes the place of the chip table.
            experts: when a router counts as collapsed; None: the default.

        Raises:
            ValueError: the folder cannot be written to, or the interval is not positive.
        """
        if summary_interval_steps < 1:
            raise ValueError(
                f"summary_interval_steps must be at least 1, not {summary_interval_steps}"
            )
        self.directory = check_writable(directory) if is_main else pathlib.Path(directory)
        self._num_steps, self._interval_steps = num_steps, summary_interval_steps
        self._is_main, self._tensorboard = is_main, tensorboard
        self._num_devices = num_devices or jax.device_count()
        self._peak = peak_flops_per_device or peak_flops(
            jax.devices()[0].device_kind, compute_dtype
        )
        self.progress = Progress(num_steps, enabled=progress and is_main)
        # Other processes come to no place that uses it.
        self._lines: Any = AppendFile(self.directory / METRICS_FILE) if is_main else None
        self._event_files: dict[str, EventFile] = {}
        self._hide_from_step: int | None = None
        self._lost: dict[str, int] = {}  # records lost since a sink failed, by sink
        self._interval = Interval()
        self._tokens = 0  # tokens trained on since step 0, earlier starts included
        self._in_pause = False
        self._experts = ExpertWatch(experts or WatchOptions())

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def environment(self, **info: Any) -> None:
        """Writes where this start of the run happens; `info` (the mesh, say) adds to it."""
        if self._is_main:
            described = describe_environment() | info | {"mfu_convention": MFU_CONVENTION}
            self._write_line({"event": "environment", "time": _now()} | described)
            self.text("environment", json.dumps(to_jsonable(described), indent=2))
            self.text("mfu_convention", MFU_CONVENTION, preformatted=False)

    def resumed(self, from_step: int, **fields: Any) -> None:
        """Says that training goes on after `from_step`; what was logged beyond it is void."""
        if not self._is_main:
            return
        # Tokens are carried over from the last summary; the steps after it had as many each.
        before = [line for line in read_metrics(self.directory) if line["split"] == TRAIN]
        before = [line for line in before if line["step"] <= from_step and line.get("tokens")]
        if before:
            self._tokens = round(before[-1]["tokens"] * from_step / before[-1]["step"])
        self._interval = Interval()
        self._close_event_files()
        self._hide_from_step = from_step + 1
        fields = {"from_step": from_step} | fields
        self._write_line({"event": "resumed", "time": _now()} | fields)

    def event(self, name: str, /, **fields: Any) -> None:
        """Writes that something happened (a checkpoint was saved, a step was skipped, ...)."""
        if name in ("resumed", "environment"):
            raise ValueError(f"event {name!r} has a method of its own: call RunLog.{name}(...)")
        if self._is_main:
            self._write_line({"event": name, "time": _now()} | fields)

    def warning(self, message: str, /, **fields: Any) -> None:
        """Shows one line to the person who watches, and writes it as an event."""
        if self._is_main:
            self.progress.write(f"warning: {message}")
            self.event("warning", message=message, **fields)

    def text(self, tag: str, text: str, *, preformatted: bool = True) -> None:
        """Writes a text (the resolved config, say) for TensorBoard's text page."""
        if self._is_main and self._tensorboard:
            # Markdown shows lines indented by four as they are.
            shown = "\n".join("    " + line for line in text.split("\n")) if preformatted else text
            self._with_event_file("train", lambda file: file.text(tag, shown))

    @contextlib.contextmanager
    def busy(self, message: str) -> Iterator[None]:
        """Shows `message` ("compiling the train step") while the block runs; logs the seconds."""
        start = time.monotonic()
        with self.progress.busy(message):
            yield
        self.event("phase", message=message, seconds=round(time.monotonic() - start, 3))

    @contextlib.contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        """Time in the block is no step time; it is written as `<kind>_seconds` ("evaluation", ...).

        The steps in flight must be finished before, or their time is counted as pause.
        """
        if self._in_pause:  # a pause inside a pause is part of it
            yield
            return
        self._in_pause, start = True, time.monotonic()
        try:
            yield
        finally:
            self._in_pause = False
            paused = self._interval.paused
            paused[kind] = paused.get(kind, 0.0) + time.monotonic() - start

    def train(
        self,
        step: int,
        metrics: Mapping[str, Any],
        *,
        data_wait_seconds: float = 0.0,
        tokens: int = 0,
        flops: float = 0,
    ) -> None:
        """Takes the metrics of a finished step; call it once for every step.

        Args:
            step: steps completed, 1 after the first.
            metrics: name -> `Metric`, scalar array or number, on the device or the host.
            data_wait_seconds: time that the host waited for the batch of this step.
            tokens: in the global batch.
            flops: model FLOPs of the step over all devices; 0 where they are not known.
        """
        if not self._is_main:
            return
        self._tokens += tokens
        self._interval.add(step, metrics)
        self._interval.count(data_wait_seconds, tokens, flops)
        if self.progress.due(step):
            self.progress.update(step, self._detail(metrics))
        else:
            self.progress.update(step)
        if step % self._interval_steps == 0 or step == self._num_steps:
            self._write_train_summary()

    def evaluate(self, split: str, step: int, metrics: Mapping[str, Any], **fields: Any) -> None:
        """Writes the metrics of the held-out set `split`; `fields` go to its line only."""
        if split == TRAIN:
            raise ValueError(f"a held-out set cannot be called {TRAIN!r}: give it another name")
        if not self._is_main:
            return
        values, weights = numbers(metrics)
        self._write_metrics(split, f"eval_test_{split}", step, values, weights, fields)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.progress.write(f"eval {split}: step {step:,} | {shown}")

    def close(self) -> None:
        """Writes what was counted since the last summary and closes the files."""
        if self._is_main:
            if not self._interval.is_empty():
                self._write_train_summary()
            self._close_event_files()
            self.progress.close()
            self._lines.close()

    def _write_train_summary(self) -> None:
        interval = self._interval
        merged = interval.merged()
        tables = {name: merged.pop(name) for name in list(merged) if is_table(merged[name])}
        values, weights = numbers(merged)
        speed = interval.speed(self._num_devices, self._peak)
        if self._tokens:
            speed["tokens"] = self._tokens
        speed |= memory_peak()
        pauses = {f"{kind}_seconds": round(s, 3) for kind, s in interval.paused.items()}
        fields = pauses | {"eta_seconds": self.progress.eta_seconds()}
        if TABLE in tables:
            fields |= self._watch_experts(interval.last_step, tables[TABLE], values)
        self._write_metrics(TRAIN, TRAIN, interval.last_step, values | speed, weights, fields)
        self._interval = Interval(start=time.monotonic(), recent_speed=speed)

    def _watch_experts(
        self, step: int, metric: Metric, values: Mapping[str, float]
    ) -> dict[str, Any]:
        """Shows what experts were given; returns it for the line of the summary."""
        table = np.asarray(metric.sum) / metric.weight
        for message in self._experts.add(table, values):
            self.warning(message, step=step)
        if self._tensorboard:
            picture = self._experts.picture()
            self._with_event_file(TRAIN, lambda file: file.image(step, TABLE, picture))
        return {TABLE: np.round(table, 5).tolist()}

    def _write_metrics(
        self,
        split: str,
        folder: str,
        step: int,
        values: dict[str, float],
        weights: dict[str, float],
        fields: Mapping[str, Any],
    ) -> None:
        line = {"time": _now(), "step": step, "split": split} | values | dict(fields)
        non_finite = [name for name, value in values.items() if not math.isfinite(value)]
        self._write_line(line | ({"non_finite": non_finite} if non_finite else {}))
        scalars = {tag_of(name): value for name, value in values.items()}
        scalars |= {f"Metrics/{name}-weight": weight for name, weight in weights.items()}
        if self._tensorboard:
            self._with_event_file(folder, lambda file: file.scalars(step, scalars))

    def _detail(self, metrics: Mapping[str, Any]) -> str:
        """The middle of the progress line: the loss of this step and the recent speed."""
        parts = []
        if "loss" in metrics:
            parts.append(f"loss {numbers({'loss': metrics['loss']})[0]['loss']:.4f}")
        speed = self._interval.speed(self._num_devices, self._peak) or self._interval.recent_speed
        if "tokens_per_second" in speed:
            parts.append(f"{quantity(speed['tokens_per_second'])} tokens/s")
        if "mfu" in speed:
            parts.append(f"MFU {speed['mfu']:.1%}")
        return " | ".join(parts)

    def _write_line(self, line: Mapping[str, Any]) -> None:
        text = json.dumps(to_jsonable(dict(line)), allow_nan=False)

        def append() -> None:
            # A line that a power cut tore must not swallow the next one.
            start = b"" if self._lines.ends_with(b"\n") else b"\n"
            self._lines.append(start + text.encode() + b"\n")

        self._try_to_write(METRICS_FILE, append)

    def _with_event_file(self, folder: str, write: Callable[[EventFile], None]) -> None:
        def open_and_write() -> None:
            if folder not in self._event_files:
                path = self.directory / "summaries" / folder
                self._event_files[folder] = EventFile(path, hide_from_step=self._hide_from_step)
            write(self._event_files[folder])

        self._try_to_write(f"summaries/{folder}", open_and_write)

    def _try_to_write(self, sink: str, write: Callable[[], None]) -> None:
        """Training outlives a full disk: lost records are told once, and again when it is over."""
        try:
            write()
        except OSError as error:
            if sink not in self._lost:
                self.progress.write(
                    f"warning: cannot write {self.directory / sink}: {error.strerror or error}; "
                    "training goes on without it until there is room again"
                )
            self._lost[sink] = self._lost.get(sink, 0) + 1
        else:
            lost = self._lost.pop(sink, 0)
            if lost:
                path = self.directory / sink
                self.progress.write(f"warning: {path} is written again; {lost} records are lost")

    def _close_event_files(self) -> None:
        for file in self._event_files.values():
            file.close()
        self._event_files = {}


def _now() -> float:
    return round(time.time(), 3)
