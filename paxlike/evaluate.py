"""Evaluation: one pass over a held-out set, sums and weights until the end."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jax
from flax import linen as nn

from paxlike import parallel
from paxlike.checkpoint import ModelMismatch, wait_for_new_checkpoint
from paxlike.log.metric import Metric
from paxlike.train.program import batch_spec
from paxlike.train.state import abstract_variables

if TYPE_CHECKING:
    from paxlike.experiment import Experiment
    from paxlike.ops.kernel_check import KernelCheck, Settled


class Interrupted(Exception):
    """An evaluation that was not carried to its end, because the run is to stop."""


class HeldOut(Protocol):
    """A finite data set in batches of one shape; rows that fill the last one have `example_weight` 0."""

    def spec(
        self, global_batch: int, *, evaluation: bool = False
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a batch."""
        ...

    def epoch(self, *, global_batch: int, sharding: Any) -> Iterator[Mapping[str, jax.Array]]:
        """All batches, once."""
        ...


class Evaluator:
    """Evaluates one model on one held-out set, again and again, with one compilation.

    Example:
      evaluator = Evaluator("heldout", data, task, model, global_batch=8, mesh=mesh)
      metrics = evaluator.run(state.variables())  # {"loss": Metric(...), ...}
    """

    def __init__(
        self,
        name: str,
        data: HeldOut,
        task: Any,
        model: nn.Module,
        *,
        global_batch: int,
        mesh: jax.sharding.Mesh,
        max_batches: int | None = None,
    ):
        """`max_batches` bounds the pass; None takes all of it."""
        self.name, self._data, self._max_batches = name, data, max_batches
        self._global_batch = global_batch
        self._sharding = parallel.named_sharding(mesh, ("batch", "length"))
        self._mesh, self._task, self._model = mesh, task, model
        self._step = self._new_step()

    def _new_step(self):
        task, model = self._task, self._model
        return jax.jit(
            lambda variables, batch: task.evaluate(model, variables, batch),
            out_shardings=jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec()),
        )

    def metric_names(self, abstract: Mapping[str, Any]) -> list[str]:
        """What `run` will give for variables of these shapes; nothing is computed."""
        spec = batch_spec(self._data.spec(self._global_batch, evaluation=True), self._mesh)
        # A function of its own: the program of `run` is traced when its kernels of attention are known.
        return sorted(
            jax.eval_shape(lambda *of: self._task.evaluate(self._model, *of), abstract, spec)
        )

    def settle(self, kernels: KernelCheck, abstract: Mapping[str, Any]) -> Settled:
        """Its program for variables of these shapes with kernels of attention that were compared; nothing runs yet."""
        spec = self._data.spec(self._global_batch, evaluation=True)

        def trace():
            self._step = self._new_step()  # the one before keeps the kernels that it chose
            return self._step.trace(abstract, batch_spec(spec, self._mesh))

        return kernels.settle(trace)

    def run(
        self, variables: Mapping[str, Any], *, stopping: Callable[[], bool] | None = None
    ) -> dict[str, Metric]:
        """Metrics over the pass, summed on the host in float64; `stopping` is asked before each batch.

        Raises:
          Interrupted: `stopping` said so.
          ValueError: the set has no example.
        """
        totals: dict[str, Metric] = {}
        pending: deque[dict[str, Metric]] = deque()
        batches = self._data.epoch(global_batch=self._global_batch, sharding=self._sharding)
        try:
            for batch in itertools.islice(batches, self._max_batches):
                if stopping is not None and stopping():
                    raise Interrupted
                pending.append(self._step(variables, batch))
                if len(pending) > _in_flight():
                    _add(totals, pending.popleft())
        finally:
            close = getattr(batches, "close", None)
            if close is not None:
                close()
        while pending:
            _add(totals, pending.popleft())
        if not totals:
            raise ValueError(f"the evaluation set '{self.name}' has no example")
        return totals


def _add(totals: dict[str, Metric], metrics: Mapping[str, Metric]) -> None:
    for name, metric in jax.device_get(dict(metrics)).items():
        exact = Metric(float(metric.sum), float(metric.weight))
        totals[name] = totals[name] + exact if name in totals else exact


def _in_flight() -> int:
    """Batches dispatched ahead; none on several CPU devices, whose collectives can deadlock when queued."""
    return 0 if jax.default_backend() == "cpu" and jax.local_device_count() > 1 else 1


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """When held-out sets are evaluated while training.

    Attributes:
      every_n_steps: 0 for never.
      at_end: also after the last step.
      max_batches: bound of one pass, None for all of it.
    """

    every_n_steps: int = 0
    at_end: bool = True
    max_batches: int | None = None

    def __post_init__(self):
        if self.every_n_steps < 0:
            raise ValueError(f"EVAL_INTERVAL_STEPS={self.every_n_steps} must be 0 (never) or more")
        if self.max_batches is not None and self.max_batches < 1:
            raise ValueError(f"EVAL_MAX_BATCHES={self.max_batches} must be at least 1, or None")

    def due(self, step: int, num_steps: int) -> bool:
        """Whether to evaluate after `step` steps."""
        return bool(self.every_n_steps) and (
            step % self.every_n_steps == 0 or (self.at_end and step == num_steps)
        )


def make_evaluators(experiment: Experiment, mesh: jax.sharding.Mesh) -> list[Evaluator]:
    """One evaluator for each held-out set of the experiment."""
    return [
        Evaluator(
            name,
            data,
            experiment.task,
            experiment.model,
            global_batch=experiment.global_batch_size,
            mesh=mesh,
            max_batches=experiment.evaluation.max_batches,
        )
        for name, data in experiment.eval_data.items()
    ]


def evaluate(
    experiment: Experiment,
    job_log_dir: str,
    *,
    checkpoint: str | None,
    step: int | None,
    follow: bool,
    references: Mapping[str, float],
    config_text: str = "",
) -> int:
    """Evaluates one checkpoint, or with `follow` the newest again and again, on all held-out sets of the experiment.

    Weights only are read (the averaged ones where there are any), onto this mesh, whatever mesh wrote them.
    `references` are unigram entropies by set, in nats per token, shown beside the loss. Settings of the model and a
    tokenizer that are not those of the training are warned of, where `config_text` is this start's resolved config.

    Raises:
      ValueError: no checkpoint, or weights that do not fit the model.
    """
    source, directory = Path(checkpoint or job_log_dir), Path(job_log_dir)
    mesh = experiment.mesh.build()
    with experiment.open_log(directory) as log, parallel.activate(mesh, experiment.rules):
        evaluators = make_evaluators(experiment, mesh)
        abstract = abstract_variables(experiment.model, mesh)
        _settle(experiment, evaluators, abstract, log)
        steps = wait_for_new_checkpoint(source, say=log.progress.write) if follow else [step]
        first = True
        for wanted in steps:
            try:
                with log.busy(f"reading weights from {source}"):
                    weights = experiment.read_variables(source, abstract, step=wanted)
            except (ValueError, OSError) as error:
                if not follow or isinstance(error, ModelMismatch):
                    raise
                log.warning(
                    f"step {wanted} is passed over: {error}"
                )  # dropped by the run, or damaged
                continue
            if first:
                for line in weights.doubts(config_text=config_text, tokenizer=experiment.tokenizer):
                    log.warning(line)
                first = False
            for evaluator in evaluators:
                with log.busy(f"evaluating {evaluator.name} at step {weights.step:,}"):
                    metrics = evaluator.run(weights.variables)
                if evaluator.name in references:
                    metrics["unigram_entropy"] = Metric(references[evaluator.name], 1.0)
                log.evaluate(evaluator.name, weights.step, metrics)
                _write_result(directory, evaluator.name, weights.step, metrics)
    return 0


def _settle(experiment: Experiment, evaluators, abstract, log) -> None:
    """Compares the kernels that the evaluators are going to use with the reference, and says which they are."""
    said = ""
    for evaluator in evaluators if experiment.kernels is not None else ():
        settled = evaluator.settle(experiment.kernels, abstract)
        settled.report(log.progress.write, log.warning)
        if news := settled.news(said):
            said = news
            log.event("attention", kernels=said)
            log.progress.write(f"attention: {said}")


def _write_result(directory: Path, name: str, step: int, metrics: Mapping[str, Metric]) -> None:
    """`eval_out/<name>/eval_out_<step>.json`: value and weight of every metric."""
    if jax.process_index() != 0:
        return
    path = directory / "eval_out" / name / f"eval_out_{step:08d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {
        key: {"value": metric.value(), "weight": float(metric.weight)}
        for key, metric in metrics.items()
    }
    path.write_text(json.dumps({"step": step, "split": name, "metrics": values}, indent=1) + "\n")
