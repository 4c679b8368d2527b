"""The recorder of loss spikes: what was seen, the batch, and the checkpoint to replay the step from.

A step is a spike when its loss or its gradient norm is not finite, or when its loss is above

    median + sigmas x max(1.4826 x median absolute deviation, 1e-3 nats)

of the last `window` steps. Median and deviation rather than mean and variance: one spike in the window would raise
these so much that it hides the next one. 1.4826 makes the deviation that of a normal distribution (Rousseeuw and Croux
1993); the floor keeps the rounding of a loss that hardly moves from looking like a spike.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from paxlike.log.files import to_jsonable
from paxlike.log.run_log import RunLog

FOLDER = "spikes"
SPIKE_FILE, BATCH_FILE = "spike.json", "batch.npz"
_NORMAL = 1.4826
_FLOOR = 1e-3  # nats


@dataclasses.dataclass(frozen=True)
class RecorderOptions:
    """What is a spike, and how many are recorded.

    Attributes:
      sigmas: standard deviations above the median that make a loss a spike; 0: only what is not finite.
      window: steps before that a loss is compared with, and that must be none before the next one is recorded.
      max_recordings: of a whole run, its later starts included; 0 records nothing.
    """

    sigmas: float = 8.0
    window: int = 100
    max_recordings: int = 10

    def __post_init__(self):
        if not self.sigmas >= 0 or math.isinf(self.sigmas):
            raise ValueError(
                f"SPIKE_SIGMAS={self.sigmas} must be 0 (only what is not finite) or more"
            )
        if self.window < 4:
            raise ValueError(f"SPIKE_WINDOW={self.window} must be at least 4 steps")
        if self.max_recordings < 0:
            raise ValueError(f"SPIKE_MAX={self.max_recordings} must be 0 (off) or more")


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the numbers of a step come from.

    Attributes:
      first_row: number of the batch's first row in the order of the data.
      batch: the arrays of the step.
    """

    first_row: int
    batch: Mapping[str, jax.Array]


class Watch:
    """Tells spikes from noise; plain numbers in, plain text out."""

    def __init__(self, options: RecorderOptions):
        self._options = options
        self._losses: deque[float] = deque(maxlen=options.window)  # finite ones only

    def look(self, loss: float, norm: float) -> str | None:
        """Takes the next step; what is wrong with it, or None."""
        why = self._judge(loss, norm)
        if math.isfinite(loss):
            self._losses.append(loss)
        return why

    def _judge(self, loss: float, norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"its loss is {loss}"
        if not math.isfinite(norm):
            return f"its gradient norm is {norm}"
        if not self._options.sigmas or len(self._losses) < self._options.window:
            return None
        median = _median(list(self._losses))
        if loss <= median:
            return None
        deviation = max(_NORMAL * _median([abs(each - median) for each in self._losses]), _FLOOR)
        if loss <= median + self._options.sigmas * deviation:
            return None
        return (
            f"its loss {loss:.4g} is {(loss - median) / deviation:.1f} standard deviations ({deviation:.3g}) above "
            f"the median {median:.4g} of {len(self._losses)} steps"
        )


class Recorder:
    """Writes `spikes/step_NNNNNNNN/` of a run; every process calls it with the same numbers, the first one writes.

    Attributes:
      checkpoints: steps of the checkpoints that recorded spikes can be replayed from; they must be kept.
    """

    def __init__(
        self,
        directory: Path,
        options: RecorderOptions,
        *,
        config: str,
        seed: int,
        data: Any,
        log: RunLog,
    ):
        """`data` is the loader of the run: it is read again where the batch is spread over processes."""
        self._folder, self._options, self._log = directory / FOLDER, options, log
        self._about = {"config": config, "seed": seed}
        self._data = data
        self._watch = Watch(options)
        self._history: deque[tuple[int, float, float]] = deque(maxlen=options.window)
        self._last: int | None = None  # spike, recorded or not
        self._known = {each["step"] for each in read_all(directory)}
        self._full_told = False
        kept = {each["checkpoint"] for each in read_all(directory)}
        self.checkpoints: set[int] = kept - {None}

    def look(
        self, step: int, metrics: Mapping[str, Any], origin: Origin, checkpoint: int | None
    ) -> bool:
        """Takes the metrics, on the host, of a finished step; whether it is a spike that was recorded.

        `checkpoint` is the step of the newest one before it.
        """
        if not self._options.max_recordings:
            return False
        if not float(metrics["loss"].weight):  # no token of the batch is scored
            return False
        loss, norm = metrics["loss"].value(), float(metrics["grad_norm"])
        why = self._watch.look(loss, norm)
        before = list(self._history) if why else []
        self._history.append((step, loss, norm))
        if why is None:
            return False
        last, self._last = self._last, step
        if last is not None and step - last < self._options.window:  # the same trouble goes on
            return False
        if step not in self._known and len(self._known) >= self._options.max_recordings:
            if not self._full_told:
                self._full_told = True
                self._log.warning(
                    f"step {step:,} is a spike: {why}; it is not recorded, nor are later ones: there are "
                    f"SPIKE_MAX={self._options.max_recordings} in {self._folder}",
                    step=step,
                )
            return False
        self._known.add(step)
        if checkpoint is not None:
            self.checkpoints.add(checkpoint)
        if jax.process_index() == 0:
            seen = {
                "step": step,
                "why": why,
                "loss": loss,
                "grad_norm": norm,
                "checkpoint": checkpoint,
                "first_row": origin.first_row,
                "rows": origin.batch["tokens"].shape[0],
            }
            self._write(seen, before, origin)
        return True

    def _write(self, seen: dict[str, Any], before: list, origin: Origin) -> None:
        step = seen["step"]
        place = folder_of(self._folder.parent, step)
        names = ("step", "loss", "grad_norm")
        history = [dict(zip(names, each)) for each in before]
        about = seen | self._about | {"history": history}
        try:
            place.mkdir(parents=True, exist_ok=True)
            np.savez(place / BATCH_FILE, **self._host(origin))
            write_json(place / SPIKE_FILE, about)
        except OSError as error:  # a run is worth more than its record
            self._log.warning(f"{place} cannot be written: {error.strerror or error}", step=step)
            return
        self._log.progress.write(f"warning: step {step:,} is a spike: {seen['why']}; see {place}")
        self._log.event("spike", folder=str(place), **seen)

    def _host(self, origin: Origin) -> dict[str, Any]:
        """The whole batch, as it was; where it is spread over processes, as the data gives it again."""
        batch = origin.batch
        if all(array.is_fully_addressable for array in batch.values()):
            return {name: np.asarray(array) for name, array in batch.items()}
        rows = batch["tokens"].shape[0]
        with self._data.batches(global_batch=rows, first_row=origin.first_row, prefetch=1) as again:
            return next(again)


def folder_of(directory: Path, step: int) -> Path:
    """Where the spike of `step` is recorded."""
    return directory / FOLDER / f"step_{step:08d}"


def read_all(directory: Path) -> list[dict[str, Any]]:
    """What `spike.json` of each recorded spike says, by step."""
    found = []
    for path in sorted((directory / FOLDER).glob(f"step_*/{SPIKE_FILE}")):
        try:
            found.append(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}; delete its folder") from error
    return sorted(found, key=lambda each: each["step"])


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Numbers that are not finite become null; the file is whole or not there."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(to_jsonable(dict(value)), allow_nan=False, indent=1) + "\n")
    temporary.replace(path)


def _median(values: list[float]) -> float:
    values.sort()
    middle = len(values) // 2
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2
