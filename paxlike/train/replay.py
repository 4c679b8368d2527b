"""Takes one recorded step again, with every module watched: which of them is the first to go wrong.

From the newest checkpoint before it the run is repeated up to that step, by the same program, without writing what a
run writes. Then each output of each module and layer is measured, and each gradient and update. With a pipeline the
watched pass takes the layers in turn, on whole batches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from paxlike import parallel
from paxlike.checkpoint import Checkpointer
from paxlike.log.progress import Progress
from paxlike.train import loop, recorder
from paxlike.train.matrices import is_box, named
from paxlike.train.ramp import Feed
from paxlike.train.state import StateFactory, TrainState, replicated
from paxlike.train.step import TrainStep

if TYPE_CHECKING:
    from paxlike.experiment import Experiment

FILE = "replay.json"
OUTLIER = 10.0  # times the RMS of the same module in other layers, or at the step before
_SOWN = "intermediates"
_MODULES, _GRADIENTS, _UPDATES = "replay_modules", "replay_gradients", "replay_updates"
_SHOWN = 12  # lines of a table

Stats = dict[str, Any]  # max, rms and non_finite: scalars, or vectors over the layers


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


def replay(experiment: Experiment, job_log_dir: str, *, step: int | None = None) -> int:
    """Replays `step` (default: the newest recorded spike) of the run in `job_log_dir`; returns the exit code.

    Prints a table and writes `replay.json` into the folder of the spike. Raises a one-line `ValueError` where the step
    cannot be replayed.
    """
    directory = Path(job_log_dir)
    spike = _recorded(directory, step)
    number = spike["step"]
    if spike.get("seed", experiment.seed) != experiment.seed:
        raise ValueError(
            f"step {number} was recorded with SEED={spike['seed']}, and here it is {experiment.seed}: give the run's"
        )
    experiment.check_data([experiment.train_data])
    with contextlib.ExitStack() as stack:
        mesh = experiment.mesh.build()
        stack.enter_context(parallel.activate(mesh, experiment.training_rules))
        options = experiment.checkpoints
        checkpoints = stack.enter_context(Checkpointer(directory, options, read_only=True))
        start = max((each for each in checkpoints.all_steps() if each < number), default=None)
        if start is None:
            raise ValueError(
                f"step {number} cannot be replayed: {checkpoints.folder} has no checkpoint of an earlier step"
            )
        spec = experiment.train_data.spec(experiment.global_batch_size)
        factory = loop.state_factory(experiment, spec, mesh)
        abstract = factory.abstract()
        restored = checkpoints.restore(loop.saved_part(experiment, abstract), step=start)
        state = loop.with_frozen(experiment, abstract, restored.state)
        first_row = loop.data_position(experiment, directory, restored.data)
        _check_rows(experiment, spike, start, first_row)
        batches = Feed(
            experiment.train_data,
            whole=experiment.global_batch_size,
            ramp=experiment.ramp,
            first_row=first_row,
            sharding=parallel.named_sharding(mesh, ("batch", "length")),
        )
        stack.callback(batches.close)
        recorded = recorder.folder_of(directory, number) / recorder.BATCH_FILE
        seen = _steps(experiment, factory, state, batches, range(start + 1, number + 1), recorded)
    modules = _module_rows(seen)
    parameters = _parameter_rows(seen, modules)
    result = Result(spike, start, seen.metrics, modules, parameters, seen.before is not None)
    if jax.process_index() == 0:
        place = recorder.folder_of(directory, number)
        place.mkdir(parents=True, exist_ok=True)
        recorder.write_json(place / FILE, result.as_json())
        print(result.text())
        print(f"all modules and parameters: {place / FILE}")
    return 0


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


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What was measured in the step, and in the one before (None where that was not taken)."""

    now: dict[str, dict[str, Stats]]
    before: dict[str, dict[str, Stats]] | None
    order: list[str]  # of the modules
    metrics: Mapping[str, Any]


def _recorded(directory: Path, step: int | None) -> dict[str, Any]:
    """What the recorder wrote about the step; of one that was not recorded, its number alone."""
    spikes = recorder.read_all(directory)
    if step is None:
        if not spikes:
            raise ValueError(
                f"no spike is recorded in {directory / recorder.FOLDER}: name the step with --replay_step"
            )
        return spikes[-1]
    if step < 1:
        raise ValueError(f"--replay_step={step} must be at least 1, the first step of a run")
    return next((each for each in spikes if each["step"] == step), {"step": step})


def _check_rows(
    experiment: Experiment, spike: Mapping[str, Any], start: int, first_row: int
) -> None:
    """Refuses a batch that is not the recorded one: another size or mesh cuts the data in other places."""
    whole, ramp = experiment.global_batch_size, experiment.ramp
    size = lambda: whole if ramp is None else ramp.size(first_row, whole)
    for _ in range(start + 1, spike["step"]):
        first_row += size()
    here = (first_row, size())
    there = (spike.get("first_row", here[0]), spike.get("rows", here[1]))
    if here != there:
        raise ValueError(
            f"step {spike['step']} was recorded with {there[1]} rows from row {there[0]} on, and here it would have "
            f"{here[1]} from row {here[0]} on: replay on as many devices, with the same PERCORE_BATCH_SIZE"
        )


def _check_batch(batch: Mapping[str, jax.Array], path: Path) -> None:
    if not path.is_file() or not all(array.is_fully_addressable for array in batch.values()):
        return
    with np.load(path) as recorded:
        for name, array in batch.items():
            if name not in recorded or not np.array_equal(recorded[name], np.asarray(array)):
                raise ValueError(
                    f"the data gives other {name} than {path}: it was changed since, and the step cannot be replayed"
                )


def _steps(
    experiment: Experiment,
    factory: StateFactory,
    state: TrainState,
    batches: Feed,
    numbers: range,
    recorded: Path,
) -> _Seen:
    """Takes the steps `numbers`, and measures the last two of them."""
    abstract, number = factory.abstract(), numbers[-1]
    programs: dict[int, Any] = {}  # by rows: a batch may grow
    watches: dict[int, _Watch] = {}
    now = before = watch = None
    bar = Progress(len(numbers), description="replay", enabled=jax.process_index() == 0)
    for done in numbers:
        rows = batches.size
        spec = loop.batch_spec(experiment.train_data.spec(rows), factory.mesh)
        batch = next(batches)
        if done == number:
            _check_batch(batch, recorded)
        if done >= number - 1:
            if rows not in watches:
                watches[rows] = _Watch(experiment, factory, abstract, spec)
            watch = watches[rows]
            before, now = now, watch(state, batch)
        if rows not in programs:
            programs[rows] = loop.jit_step(experiment, factory).lower(abstract, spec).compile()
        state, metrics = programs[rows](state, batch)
        jax.block_until_ready(metrics)
        bar.update(done - numbers[0] + 1)
    bar.close()
    return _Seen(now, before, watch.order, jax.device_get(metrics))


class _Watch:
    """The training step, compiled to measure rather than to train: the state is left as it is."""

    def __init__(self, experiment: Experiment, factory: StateFactory, abstract, spec):
        task = _WatchedTask(experiment.task, [])
        step = _WatchedStep.of(factory, task, **loop.step_options(experiment))
        boxes = named(factory.boxed().params)
        # Arrays of a stack have the layers in front.
        stacked = {
            name: is_box(box) and box.names[:1] == ("layers",) for name, box in boxes.items()
        }

        def measure(state, batch):
            new, metrics = step(state, batch)
            moved = jax.tree.map(
                lambda a, b: a.astype(jnp.float32) - b.astype(jnp.float32),
                experiment.optimizer.select(new.params),
                experiment.optimizer.select(state.params),
            )
            layers = lambda tree: {
                name: _measured([leaf], keep=int(stacked[name]), with_norm=True)
                for name, leaf in named(tree).items()
            }
            return {
                "modules": metrics[_MODULES],
                "gradients": layers(metrics[_GRADIENTS]),
                "updates": layers(moved),
                "values": layers(state.params),
            }

        with parallel.without_pipeline():
            jitted = jax.jit(measure, out_shardings=replicated(factory.mesh))
            self._program = jitted.lower(abstract, spec).compile()
        self.order = task.order

    def __call__(self, state: TrainState, batch) -> dict[str, dict[str, Stats]]:
        return jax.device_get(self._program(state, batch))


@dataclasses.dataclass(frozen=True, eq=False)
class _WatchedTask:
    """A task that also gives what the outputs of all modules are like.

    Attributes:
      order: paths of the modules as their calls end; filled in while the step is traced.
    """

    task: Any
    order: list[str]

    def weight(self, batch):
        return self.task.weight(batch)

    def loss(self, model, variables, batch, rngs):
        with nn.intercept_methods(self._see):
            loss = self.task.loss(model, {**variables, _SOWN: {}}, batch, rngs)
        collections = dict(loss.collections)
        modules = dict(_seen_in(collections.pop(_SOWN, {})))
        return dataclasses.replace(
            loss, collections=collections, metrics={**loss.metrics, _MODULES: modules}
        )

    def _see(self, call, args, kwargs, context):
        output = call(*args, **kwargs)
        if context.method_name == "__call__":
            arrays = [x for x in jax.tree.leaves(output) if jnp.issubdtype(x.dtype, jnp.floating)]
            if arrays and context.module.sow(_SOWN, FILE, _measured(arrays)):
                name = "/".join(context.module.path) or "model"
                if name not in self.order:
                    self.order.append(name)
        return output


class _WatchedStep(TrainStep):
    """A training step whose metrics hold what its modules give and the gradients themselves."""

    def _gradients(self, state, whole, batch):
        gradients, collections, metrics, *rest = super()._gradients(state, whole, batch)
        return gradients, collections, {**metrics, _GRADIENTS: gradients}, *rest

    def _of_all_parts(self, metrics):
        parts = dict(metrics)
        modules = {name: _merged(stats) for name, stats in parts.pop(_MODULES).items()}
        return {**super()._of_all_parts(parts), _MODULES: modules}


def _seen_in(collection: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator:
    """(path of a module, what was sown in it), calls of the same module together."""
    for name, node in collection.items():
        if name == FILE:
            stats = _merged(jax.tree.map(lambda *each: jnp.stack(each), *node))
            yield "/".join(path) or "model", stats
        else:
            yield from _seen_in(node, (*path, name))


def _measured(arrays: list[jax.Array], *, keep: int = 0, with_norm: bool = False) -> Stats:
    """Largest absolute value, root mean square and share that is not finite, but for the first `keep` dimensions."""
    parts = []
    for x in arrays:
        wide, axes = x.astype(jnp.float32), tuple(range(keep, x.ndim))
        finite = jnp.isfinite(wide)
        size = jnp.abs(jnp.where(finite, wide, 0.0))
        most = jnp.max(size, axis=axes, keepdims=True)
        # Over the maximum: squares of large numbers are no float32.
        shares = jnp.square(size / jnp.where(most > 0, most, 1.0))
        count = x.size / math.prod(x.shape[:keep])
        parts.append(
            {
                "max": jnp.squeeze(most, axes),
                "rms": jnp.squeeze(most, axes) * jnp.sqrt(jnp.sum(shares, axis=axes) / count),
                "non_finite": jnp.sum(~finite, axis=axes) / count,
            }
        )
    merged = _merged(jax.tree.map(lambda *each: jnp.stack(each), *parts))
    if with_norm:
        merged["norm"] = merged["rms"] * math.sqrt(count)
    return merged


def _merged(stats: Stats) -> Stats:
    """Of equal parts that are stacked in front."""
    most = jnp.max(stats["rms"], axis=0)
    shares = jnp.square(stats["rms"] / jnp.where(most > 0, most, 1.0)[None])
    return {
        "max": jnp.max(stats["max"], axis=0),
        "rms": most * jnp.sqrt(jnp.mean(shares, axis=0)),
        "non_finite": jnp.mean(stats["non_finite"], axis=0),
    }


def _module_rows(seen: _Seen) -> list[Row]:
    """Outputs in the order of computation: all modules of a layer, then those of the next."""
    before = seen.before["modules"] if seen.before else {}
    rows: list[Row] = []
    in_layers = lambda name: np.ndim(seen.now["modules"][name]["rms"]) > 0
    for _, names in itertools.groupby(seen.order, in_layers):
        parts = [_rows_of(name, seen.now["modules"][name], before.get(name)) for name in names]
        rows += [row for layer in zip(*parts) for row in layer]
    return rows


def _parameter_rows(seen: _Seen, modules: list[Row]) -> list[Row]:
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
