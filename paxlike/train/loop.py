"""The training loop: restore or initialise, then step, log, evaluate, save, in this order, until the last step.

The order matters: a checkpoint of step n holds the state after n steps and the position of batch n; it is written after
the evaluation of step n, so that a run which goes on does not evaluate it again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from paxlike import parallel
from paxlike.checkpoint import (
    EXIT_PREEMPTED,
    Checkpointer,
    TerminationSignal,
    changes,
    clear_finished,
    mark_finished,
)
from paxlike.cluster import Deadline, Job, Watchdog
from paxlike.evaluate import Evaluator, Interrupted, make_evaluators
from paxlike.log import goodput
from paxlike.log.metric import Metric
from paxlike.log.profiler import Profiler
from paxlike.log.run_log import RunLog
from paxlike.train.best import Best
from paxlike.train.optimizer import merge
from paxlike.train.program import batch_spec, jit_step, model_flops, state_factory
from paxlike.train.ramp import Feed
from paxlike.train.recorder import Origin, Recorder
from paxlike.train.saved import data_position, saved_part, saves_trained_only, with_frozen
from paxlike.train.skipped import SkippedSteps
from paxlike.train.state import TrainState, num_parameters

if TYPE_CHECKING:
    from paxlike.experiment import Experiment

_OWES = "owes_evaluation"  # in a checkpoint whose step was to be evaluated when the run had to stop
_SHORT_RUN_SECONDS = 60.0


def train(
    experiment: Experiment,
    job_log_dir: str,
    *,
    config: str,
    config_text: str,
    job: Job | None = None,
) -> int:
    """Trains to `num_steps`; 0 when complete, `EXIT_PREEMPTED` when asked to stop (a checkpoint is saved first).

    Raises:
      ValueError: data that does not fit, or nothing but skipped steps for long.
    """
    job = job or Job()
    evaluated = experiment.eval_data.values() if experiment.evaluation.every_n_steps else ()
    experiment.check_data([experiment.train_data, *evaluated])
    directory = Path(job_log_dir)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(experiment.open_log(directory, num_steps=experiment.num_steps))
        mesh = experiment.mesh.build()
        stack.enter_context(parallel.activate(mesh, experiment.training_rules))
        run = _Run(experiment, directory, mesh, log, config, config_text, job)
        stack.enter_context(run.watchdog)
        try:
            code = run.run(stack)
        except BaseException as error:
            if job.peers is not None:  # now: what is closed below may wait for the others
                job.peers.report(error)
            raise
    run.report()
    return code


class _Run:
    """One start of a run: what is made once, and the loop over it."""

    def __init__(
        self,
        experiment: Experiment,
        directory: Path,
        mesh,
        log: RunLog,
        config: str,
        config_text: str,
        job: Job,
    ):
        self.ledger = goodput.Ledger(job.began)
        self.deadline = Deadline.of(experiment.cluster, job, self.ledger.began)
        self.watchdog = Watchdog(experiment.cluster.hang, directory, job.peers)
        self.stop = TerminationSignal()
        self.from_step: int | None = None  # set when this start has work to do
        self.owes_evaluation = False  # of the step that it begins with
        self.experiment, self.directory, self.mesh, self.log = experiment, directory, mesh, log
        self.config, self.config_text = config, config_text
        self.global_batch = experiment.global_batch_size
        spec = experiment.train_data.spec(self.global_batch)
        self.factory = state_factory(experiment, spec, mesh)
        self.abstract = self.factory.abstract()
        self.tokens_per_step = math.prod(spec["tokens"].shape)
        self.kernels = ""  # of attention, as they were last said
        self.first_row = 0  # number of the row that the first step of this start begins with

    def run(self, stack: contextlib.ExitStack) -> int:
        experiment, log = self.experiment, self.log
        if experiment.best.metric is not None:  # now, not at the first evaluation
            abstract = self.abstract.variables()
            names = {each.name: each.metric_names(abstract) for each in self._evaluators()}
            experiment.best.check_metric(names)
        checkpointer = stack.enter_context(Checkpointer(self.directory, experiment.checkpoints))
        stop = stack.enter_context(self.stop)
        state, start = self._restore_or_initialize(checkpointer)
        best = Best(self.directory, experiment.best, step=start)
        recorder = Recorder(
            self.directory,
            experiment.recorder,
            config=experiment.name,
            seed=experiment.seed,
            data=experiment.train_data,
            log=log,
        )

        def protect() -> None:
            """Keeps the checkpoints of the best step and before recorded spikes."""
            of_best = set() if best.step is None else {best.step}
            checkpointer.protected = frozenset(recorder.checkpoints | of_best)

        protect()
        if (start >= experiment.num_steps or best.exhausted) and not self.owes_evaluation:
            mark_finished(self.directory, start)
            last = experiment.num_steps
            where = f"step {start:,} of {last:,}"
            if start > last:
                where = f"the checkpoint is at step {start:,}, and MAX_STEPS is {last:,}"
            log.progress.write(f"training is complete: {where}; nothing to do")
            return 0
        clear_finished(self.directory)
        self.from_step = start
        self._record(start)
        for name, data in (
            experiment.eval_data.items() if experiment.evaluation.every_n_steps else ()
        ):
            with log.busy(f"opening the held-out set {name}"):
                data.num_examples()  # now, not at the first evaluation, when the devices wait
        batches = Feed(
            experiment.train_data,
            whole=self.global_batch,
            ramp=experiment.ramp,
            first_row=self.first_row,
            sharding=parallel.named_sharding(self.mesh, ("batch", "length")),
        )
        stack.callback(batches.close)
        rows = batches.size  # of a step; it changes while a ramp lasts
        with log.busy("compiling the training step"), self.ledger.on("compilation"):
            step_function = self._compile(rows)
            flops = self._flops(rows)
        evaluators = self._evaluators()
        options = experiment.logging
        profiler = Profiler(
            self.directory / "profile",
            options.profiler_capture_step,
            options.profiler_num_steps,
            log=log,
        )
        stack.callback(profiler.close)
        waiting: deque[tuple[int, Mapping[str, Any], dict[str, Any], Origin]] = deque()
        skipped = SkippedSteps(int(state.skipped_steps), experiment.max_skipped_steps, log)
        done, better, enough, postponed = start, False, False, False

        def settle(limit: int) -> None:
            """Logs finished steps until at most `limit` are in flight."""
            while len(waiting) > limit:
                done, metrics, its, origin = waiting.popleft()
                metrics = jax.device_get(metrics)  # waits for this step, while later ones run
                self.watchdog.step(done)
                log.train(done, metrics, **its)
                if done % options.summary_interval_steps == 0:
                    self._record(done)
                newest = checkpointer.newest_before(done)
                if recorder.look(done, metrics, origin, newest):
                    protect()
                skipped.look(done, metrics, newest)

        def evaluate(done: int) -> bool:
            """The evaluation of this step; False where it was given up because the run is to stop."""
            nonlocal better, enough
            if self._is_stopping(before="evaluation", ask=True):
                return False
            settle(0)
            with self._phase("evaluation"):
                results = self._evaluate(evaluators, state, done)
            if results is None:
                return False
            self._record(done)
            if experiment.best.metric is not None:
                better = best.add(done, results)
                protect()
                enough = best.exhausted and done < experiment.num_steps
                best.write()
            return True

        if stop.agreed(ask=True) or (self.owes_evaluation and not evaluate(start)):
            self._say_stopped(start)
            return EXIT_PREEMPTED
        self.ledger.switch("step")
        for done in range(start + 1, experiment.num_steps + 1) if not enough else ():
            if batches.size != rows:
                settle(0)
                rows = batches.size
                with self._phase("compilation"):
                    step_function, flops = self._compile(rows), self._flops(rows)
                log.progress.write(f"from step {done:,} on a batch has {rows:,} rows")
                log.event("batch_size", step=done, rows=rows)
            waited, first_row = batches.waited_seconds, batches.rows
            batch = next(batches)
            profiler.before_step(done)
            state, metrics = step_function(state, batch)
            profiler.after_step(done, metrics)
            about: dict[str, Any] = {
                "data_wait_seconds": batches.waited_seconds - waited,
                "tokens": math.prod(batch["tokens"].shape),
                "flops": flops,
            }
            self.ledger.move(about["data_wait_seconds"], "step", "data")
            waiting.append((done, metrics, about, Origin(first_row, batch)))
            settle(_max_in_flight())
            last, better, enough = done == experiment.num_steps, False, False
            due = experiment.evaluation.due(done, experiment.num_steps)
            owes = due and not evaluate(done)
            stopping = self._is_stopping()
            wait = stopping or last or better or enough
            if wait or checkpointer.due(done) or postponed:
                settle(0)
                # After several skipped steps the state may be broken: it must not drive out good ones.
                postponed = skipped.in_a_row > 1 and not wait
                if not postponed:
                    with self._phase("checkpoint"):
                        self._save(checkpointer, state, done, batches, wait=wait, owes=owes)
                    self._record(done)
            if checkpointer.last_save_seconds:
                self.deadline.took("checkpoint", checkpointer.last_save_seconds)
            if enough:
                log.progress.write(
                    f"stopped early at step {done:,}: {experiment.best.metric} was best at step {best.step:,} "
                    f"({best.value:.4g}) and {experiment.best.patience} evaluations since were no better"
                )
                log.event("stopped_early", step=done, best_step=best.step, best=best.value)
                break
            if stopping and (owes or not last):
                settle(0)
                self._say_stopped(done)
                return EXIT_PREEMPTED
        mark_finished(self.directory, done)
        folder = self.directory / "checkpoints"
        log.progress.write(
            f"training is complete: step {done:,}, {folder / f'checkpoint_{done:08d}'}"
        )
        if best.step is not None:
            log.progress.write(
                f"best {experiment.best.metric}: {best.value:.4g} at step {best.step:,}, "
                f"{folder / f'checkpoint_{best.step:08d}'}"
            )
        return 0

    def report(self) -> None:
        """Where the time went: a few lines for who watches, `goodput.json`, and a picture of what took long."""
        if self.from_step is None or jax.process_index() != 0:
            return
        try:
            # A picture costs a second or two: not for the shortest runs.
            long = sum(self.ledger.seconds().values()) > _SHORT_RUN_SECONDS
            self.log.progress.write(goodput.write_report(self.directory, picture=long).table())
        except (OSError, ValueError) as error:
            self.log.progress.write(f"warning: no report on the time: {error}")

    def _record(self, step: int | None) -> None:
        """The time of this start until now, into `metrics.jsonl`."""
        self.log.event(goodput.EVENT, **self.ledger.record(step, self.from_step))

    @contextlib.contextmanager
    def _phase(self, kind: str) -> Iterator[None]:
        """Within the loop, a block that is no step."""
        began = time.monotonic()
        with self.log.pause(kind), self.ledger.on(kind), self.watchdog.busy(kind):
            yield
        if kind == "evaluation":
            self.deadline.took(kind, time.monotonic() - began)

    def _is_stopping(self, *, before: str | None = None, ask: bool = False) -> bool:
        """Whether all processes stop now: at a signal, or while there is time for what is `before`, and a save."""
        if self.deadline.ends is not None:
            ahead = self.stop.steps_between * (self.watchdog.usual_step_seconds() or 0.0)
            if self.deadline.is_near(step_seconds=ahead, before=before):
                self.stop.request("time limit")
        return self.stop.agreed(ask=ask)

    def _say_stopped(self, done: int) -> None:
        self.log.progress.write(f"stopped at step {done:,}; the same command goes on from there")
        self.log.event("stopped", step=done, signal=self.stop.received)
        self._record(done)

    def _restore_or_initialize(self, checkpointer: Checkpointer) -> tuple[TrainState, int]:
        experiment, log = self.experiment, self.log
        count = num_parameters(self.abstract.params)
        trained = num_parameters(experiment.optimizer.select(self.abstract.params))
        part = "" if trained == count else f" ({trained:,} trained)"
        log.environment(
            config=experiment.name,
            mesh=dict(self.mesh.shape),
            global_batch_size=self.global_batch,
            tokens_per_step=self.tokens_per_step,
            num_parameters=count,
            num_trained_parameters=trained,
            deterministic=experiment.deterministic,
        )
        log.progress.write(
            f"{experiment.name}: {count:,} parameters{part}, mesh {dict(self.mesh.shape)} on {jax.device_count()} x "
            f"{jax.devices()[0].device_kind} in {jax.process_count()} process(es), "
            f"{self.global_batch:,} rows = {self.tokens_per_step:,} tokens a step"
            + (", deterministic" if experiment.deterministic else "")
        )
        there = checkpointer.latest_step()
        if (there or 0) < experiment.num_steps:
            self._record(None)
        reading = contextlib.nullcontext() if there is None else self._restoring()
        with reading:
            restored = checkpointer.restore(
                saved_part(experiment, self.abstract), config_text=self.config_text
            )
        if restored is not None:
            self.first_row = data_position(experiment, self.directory, restored.data)
            self.owes_evaluation = bool(restored.data.get(_OWES))
            self._write_config()
            log.resumed(restored.step)
            log.progress.write(f"going on from the checkpoint of step {restored.step:,}")
            if changed := changes.allowed(restored.config_text, self.config_text):
                log.progress.write(f"changed since that checkpoint: {changed}")
            if not saves_trained_only(experiment):
                return restored.state, restored.step
            assert experiment.initial_weights is not None  # else all would be saved
            with log.busy(f"reading frozen weights from {experiment.initial_weights.path}"):
                return with_frozen(experiment, self.abstract, restored.state), restored.step
        experiment.check_initial_weights()  # before anything is allocated
        self._write_config()
        with log.busy("initialising the parameters"):
            state = jax.block_until_ready(self.factory.initialize(experiment.seed))
        if experiment.initial_weights is not None:
            weights, select = experiment.initial_weights, experiment.optimizer.select
            if saves_trained_only(
                experiment
            ):  # the random values of frozen weights only take memory
                state = state.replace(params=merge(select(state.params), self.abstract.params))
            with log.busy(f"reading weights from {weights.path}"):
                params = experiment.read_initial_params(self.abstract.params, state.params)
            ema = None if state.ema is None else jax.tree.map(jax.numpy.copy, select(params))
            state = state.replace(params=params, ema=ema)
        return state, 0

    @contextlib.contextmanager
    def _restoring(self) -> Iterator[None]:
        with self.log.busy("reading the newest checkpoint"), self.ledger.on("restore"):
            yield

    def _write_config(self) -> None:
        """The resolved config, to read and to reload; only once this start is known to fit what is there."""
        if jax.process_index() == 0:
            (self.directory / "config.json").write_text(self.config)
            (self.directory / "config.txt").write_text(self.config_text)
        self.log.text("config", self.config_text)

    def _spec(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        return batch_spec(self.experiment.train_data.spec(rows), self.mesh)

    def _compile(self, rows: int):
        def trace():
            jitted = jit_step(self.experiment, self.factory)
            return jitted.trace(self.abstract, self._spec(rows))

        traced = self._settled(trace)
        compiled = traced.lower().compile()
        if (products := self.experiment.fp8_products(traced, compiled)) is not None:
            say = self.log.warning if products.missing else self.log.progress.write
            say(products.line())
            self.log.event("fp8_products", **dataclasses.asdict(products))
        return compiled

    def _settled(self, trace):
        """The traced step with kernels of attention that were checked; says which they are."""
        if self.experiment.kernels is None:
            return trace()
        settled = self.experiment.kernels.settle(trace)
        settled.report(self.log.progress.write, self.log.warning)
        if settled.line and settled.line != self.kernels:
            self.kernels = settled.line
            self.log.event("attention", kernels=settled.line)
            if settled.is_news:
                self.log.progress.write(f"attention: {settled.line}")
        return settled.traced

    def _flops(self, rows: int) -> int:
        return model_flops(self.experiment, self.abstract, self._spec(rows))

    def _evaluators(self) -> list[Evaluator]:
        return (
            make_evaluators(self.experiment, self.mesh)
            if self.experiment.evaluation.every_n_steps
            else []
        )

    def _evaluate(
        self, evaluators: list[Evaluator], state: TrainState, done: int
    ) -> dict[str, dict[str, Metric]] | None:
        """The metrics of every held-out set; None, and nothing logged, where the run is to stop."""

        def stopping() -> bool:
            self.watchdog.alive()
            return self._is_stopping()

        results = {}
        try:
            for evaluator in evaluators:
                variables = state.variables(use_ema=True)
                results[evaluator.name] = evaluator.run(variables, stopping=stopping)
        except Interrupted:
            return None
        for name, metrics in results.items():
            self.log.evaluate(name, done, metrics)
        return results

    def _save(
        self,
        checkpointer: Checkpointer,
        state: TrainState,
        done: int,
        batches,
        *,
        wait: bool,
        owes: bool = False,
    ) -> None:
        data: dict[str, Any] = {
            "rows": batches.rows,
            "fingerprint": self.experiment.train_data.fingerprint(),
        }
        if owes:
            data[_OWES] = True
        saved = checkpointer.save(
            done,
            saved_part(self.experiment, state),
            data=data,
            config=self.config,
            config_text=self.config_text,
            wait=wait,
            force=True,
        )
        if saved:
            self.log.event(
                "checkpoint_saved",
                step=done,
                stall_seconds=round(checkpointer.last_stall_seconds, 4),
            )


def _max_in_flight() -> int:
    """Steps dispatched ahead of the logged one; none on several CPU devices, whose collectives can deadlock."""
    return 0 if jax.default_backend() == "cpu" and jax.local_device_count() > 1 else 2
