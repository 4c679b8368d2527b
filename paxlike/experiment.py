"""The root of every run: one frozen dataclass of real objects, every choice of the run in it.

A config expands to a Fiddle tree of this class; `main.py` builds it and calls `train`, `evaluate` or `decode`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn

from paxlike import decode, evaluate, parallel, xla_flags
from paxlike.checkpoint import (
    CheckpointOptions,
    Use,
    Weights,
    named_leaves,
    nested,
    read_metadata,
    restore_params,
    restore_variables,
    with_leaves,
)
from paxlike.cluster import (
    ClusterOptions,
    HangOptions,
    Job,
    Watchdog,
    processes,
    startup,
)
from paxlike.data.loader import Loader
from paxlike.data.statistics import unigram_entropy_of
from paxlike.data.tokenizers import check_vocabulary
from paxlike.evaluate import EvalOptions
from paxlike.layers import lora
from paxlike.log.experts import WatchOptions
from paxlike.log.progress import Progress
from paxlike.log.run_log import RunLog
from paxlike.ops import attention, platform
from paxlike.plan import fp8, hlo
from paxlike.train import loop, replay
from paxlike.train.best import BestOptions
from paxlike.train.optimizer import Optimizer
from paxlike.train.ramp import Ramp
from paxlike.train.recorder import RecorderOptions
from paxlike.train.state import check_offload
from paxlike.weights import import_params, is_foreign, open_folder

_CHECK_MINUTES = 5.0  # of the start-up check; a network that hangs is found there first


@dataclasses.dataclass(frozen=True)
class LogOptions:
    """What a run writes about itself.

    Attributes:
      summary_interval_steps: steps between two lines of `metrics.jsonl` and points in TensorBoard.
      tensorboard: write `summaries/`.
      profiler_capture_step: first step of a profiler trace (counted from 1), None for none.
      profiler_num_steps: steps in the trace.
      peak_tflops: peak rate of one device in TFLOP/s for the MFU, None takes it from the chip table.
      experts: when a router counts as collapsed, which is a warning.
    """

    summary_interval_steps: int = 100
    tensorboard: bool = True
    profiler_capture_step: int | None = None
    profiler_num_steps: int = 2
    peak_tflops: float | None = None
    experts: WatchOptions = WatchOptions()

    def __post_init__(self):
        first, num_steps = self.profiler_capture_step, self.profiler_num_steps
        if self.summary_interval_steps < 1:
            raise ValueError(
                f"SUMMARY_INTERVAL_STEPS={self.summary_interval_steps} must be at least 1"
            )
        if num_steps < 1 or (first is not None and first < 1):
            raise ValueError(
                f"PROFILER_CAPTURE_STEP={first} and PROFILER_NUM_STEPS={num_steps} must be at least 1: steps count "
                "from 1"
            )
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            raise ValueError(f"PEAK_TFLOPS={self.peak_tflops} must be above 0")


@dataclasses.dataclass(frozen=True)
class InitialWeights:
    """Parameters that a fresh run starts from (step, optimizer and data start anew).

    Attributes:
      path: a job_log_dir, its `checkpoints` folder or one checkpoint, or a folder of Hugging Face or Meta.
      rules: (regex, replacement) pairs on parameter names; a replacement of None keeps the fresh value.
    """

    path: str
    rules: tuple[tuple[str, str | None], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Every choice of a run.

    Attributes:
      name: of the config.
      model, task, optimizer: what is trained, on what objective, and how.
      mesh, rules: shape of the device mesh, and logical axis -> mesh axis.
      num_steps: optimizer steps of the whole run.
      max_skipped_steps: training gives up after so many in a row, None for never.
      percore_batch_size: rows per device and step; may be a fraction.
      zero: which part of parameters, gradients and optimizer state a device keeps while training.
      offload_optimizer_state: keep it in the memory of the host between its uses.
      ramp: of the batch, up to that size; None for none.
      num_microbatches: parts of the batch; on a mesh with a pipeline they go through it, elsewhere their gradients are
        accumulated, in `accumulation_dtype`.
      train_data, eval_data: loaders; the held-out ones by name.
      tokenizer: text <-> ids, None where there is no text.
      deterministic: on GPUs too, the same run gives the same bits (see `paxlike.xla_flags`).
      xla_bundle: compiler flags by name (see `paxlike.xla_bundles`); main.py sets them before jax starts.
      initial_weights: what a fresh run starts from, None for random weights.
      weights: how other programs name the weights (`paxlike.weights`), None where none has such a model.
      recorder: which steps are recorded as loss spikes.
      kernels: what compares fast kernels with plain ones before they are used (`ops.kernel_check`), None trusts them.
      cluster: time limit, watchdog and start-up check.
      sampling: options of decoding.
      chat: template that makes prompts conversations when decoding, None for plain texts.
    """

    name: str
    model: nn.Module
    task: Any
    optimizer: Optimizer
    mesh: parallel.Mesh
    num_steps: int
    percore_batch_size: float
    max_skipped_steps: int | None = 100
    ramp: Ramp | None = None
    train_data: Any = None
    eval_data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: Any = None
    rules: parallel.Rules | None = None
    zero: parallel.Zero = parallel.Zero()
    offload_optimizer_state: bool = False
    num_microbatches: int = 1
    accumulation_dtype: str = "float32"
    seed: int = 1234
    deterministic: bool = False
    xla_bundle: str = "none"
    compute_dtype: str = "float32"
    initial_weights: InitialWeights | None = None
    weights: Any = None
    checkpoints: CheckpointOptions = CheckpointOptions()
    evaluation: EvalOptions = EvalOptions()
    best: BestOptions = BestOptions()
    recorder: RecorderOptions = RecorderOptions()
    kernels: Any = None
    logging: LogOptions = LogOptions()
    cluster: ClusterOptions = ClusterOptions()
    sampling: Any = None
    chat: Any = None

    @property
    def global_batch_size(self) -> int:
        """Rows of one step over all devices; ValueError where the numbers do not fit together."""
        rows = self.mesh.global_batch_size(self.percore_batch_size)
        if rows % self._rows_multiple:
            shards = self._rows_multiple // self.num_microbatches
            raise ValueError(
                f"NUM_MICROBATCHES={self.num_microbatches} does not divide the {rows // shards} rows of each of the "
                f"{shards} batch shards ({rows} rows in all)"
            )
        return rows

    @property
    def training_rules(self) -> parallel.Rules:
        """Logical axis -> mesh axis of parameters and activations while training."""
        return self.zero.parameter_rules(self.rules)

    @property
    def _rows_multiple(self) -> int:
        """What the rows of every batch divide by."""
        # A pipeline holds different microbatches at its stages: each is spread over the other axes only.
        shards = self.mesh.num_batch_shards // self.mesh.shape.get("pipeline", 1)
        return self.num_microbatches * shards

    @property
    def num_accumulated(self) -> int:
        """Parts of the batch whose gradients are accumulated."""
        return 1 if self.mesh.shape.get("pipeline", 1) > 1 else self.num_microbatches

    def check_anywhere(self) -> None:
        """Raises one clear ValueError for what no devices can mend; the model is traced, nothing is allocated."""
        self._check_numbers()

        def start(seed: jax.Array, tokens: jax.Array) -> Any:
            keys = {"params": jax.random.key(seed), "dropout": jax.random.key(seed)}
            return self.model.init(keys, tokens, train=True)

        with attention.plain():  # its kernels are chosen where the devices are
            made = jax.eval_shape(start, *(jax.ShapeDtypeStruct(s, "int32") for s in ((), (1, 1))))
        if self.train_data is not None:
            self._check_training()
            self.optimizer.bound(made["params"])

    def _check_numbers(self) -> None:
        parallel.check_axes(self.mesh.axes, self.rules)
        if self.num_microbatches < 1:
            raise ValueError(f"NUM_MICROBATCHES={self.num_microbatches} must be at least 1")
        if not 0 < self.percore_batch_size < math.inf:
            raise ValueError(f"PERCORE_BATCH_SIZE={self.percore_batch_size} must be above 0")
        if self.num_steps < 0:
            raise ValueError(f"MAX_STEPS={self.num_steps} is negative")
        if self.max_skipped_steps is not None and self.max_skipped_steps < 1:
            raise ValueError(f"MAX_SKIPPED_STEPS={self.max_skipped_steps} must be at least 1")

    def _check_training(self) -> None:
        self.best.check(list(self.eval_data), evaluates=bool(self.evaluation.every_n_steps))
        self.cluster.check()

    def check(self, num_devices: int | None = None) -> None:
        """Raises one clear ValueError for what cannot work on so many devices, before anything is allocated."""
        self._check_numbers()
        self.mesh.check_devices(jax.device_count() if num_devices is None else num_devices)
        self.zero.check(self.mesh.shape)
        if self.offload_optimizer_state:
            check_offload()
        if self.accumulation_dtype != "float32" and self.num_accumulated == 1:
            why = "NUM_MICROBATCHES=1" if self.num_microbatches == 1 else "a pipeline"
            raise ValueError(
                f"GRADIENT_ACCUMULATION_DTYPE={self.accumulation_dtype} has no effect with {why}"
            )
        _ = self.global_batch_size
        if self.ramp is not None:
            self.ramp.check(self.global_batch_size, self._rows_multiple)

    def check_data(self, loaders: Iterable[Loader]) -> None:
        """Raises one clear ValueError where data is missing, or does not fit the model or the mesh."""
        for data in loaders:
            parallel.check_length(data.seq_len, self.model.context, self.mesh.shape, self.rules)
            if data.tokenizer is not None:
                check_vocabulary(data.tokenizer, self.model.vocab_size)
            data.check()

    def on_these_devices(self) -> Experiment:
        """This experiment with a mesh that says how many devices it takes (-1 replaced), checked."""
        on_gpu = self.deterministic and jax.default_backend() == "gpu"
        if on_gpu and not xla_flags.is_deterministic(os.environ):
            raise ValueError(
                f"DETERMINISTIC=True needs XLA_FLAGS={xla_flags.DETERMINISTIC} before jax starts; main.py sets it"
            )
        return self.on_devices(jax.device_count())

    def on_devices(self, num_devices: int) -> Experiment:
        """The same for so many devices, which need not be here."""
        resolved = dataclasses.replace(self, mesh=self.mesh.resolve(num_devices))
        resolved.check(num_devices)
        return resolved

    def read_variables(
        self, path: Path, abstract: Mapping[str, Any], *, step: int | None = None, use: Use = "auto"
    ) -> Weights:
        """The variables of a checkpoint of ours, or of a folder of Hugging Face or Meta, in `abstract`'s shardings.

        Adapters that a foreign folder cannot have are as the model starts them: they add nothing. Raises `ValueError`
        in one line for what is not there or does not fit the model.
        """
        if is_foreign(path):
            rest = {name: tree for name, tree in abstract.items() if name != "params"}
            params = abstract["params"]
            fresh = self._initial({"params": lora.adapters_of(params), **rest})
            base = self._import(path, lora.base_of(params))
            params = lora.adopt(base, lora.with_adapters(params, fresh.pop("params", {})))
            return Weights({"params": params, **fresh}, 0, "params")

        def complete(missing: Mapping[str, Any]) -> dict[str, Any]:
            if self.initial_weights is None:
                raise ValueError(
                    f"{path} holds what was trained only: name the weights that it was trained on with "
                    "CHECKPOINT_RESTORE_PATH"
                )
            whole = named_leaves(self.read_initial_params(abstract["params"], abstract["params"]))
            return {name: whole[name] for name in missing}

        return restore_variables(
            path,
            abstract,
            step=step,
            use=use,
            checksums=self.checkpoints.checksums,
            complete=complete,
        )

    def read_initial_params(self, abstract: Any, initial: Any) -> Any:
        """Parameters of `initial_weights`, in `abstract`'s shardings.

        `initial` are the values that are kept: of adapters, which no base has, and of what its rules name.
        """
        weights, base = self.initial_weights, lora.base_of(abstract)
        assert weights is not None  # the callers have looked
        path = Path(weights.path)
        if is_foreign(path):
            if weights.rules:
                raise ValueError(
                    f"CHECKPOINT_IGNORE_RULES={[pattern for pattern, _ in weights.rules]} cannot be used on "
                    f"{path}, which is no checkpoint of paxlike: convert it first (scripts/convert.py)"
                )
            return lora.adopt(self._import(path, base, initial), initial)
        rules = weights.rules
        if any(f"/{lora.NAME}/" in name for name in read_metadata(path)["arrays"]):
            rules = (*rules, (rf".*/{lora.NAME}/.*", None))  # the adapters of that run lie unused
        found = restore_params(
            path, base, rules=rules, init_params=initial, checksums=self.checkpoints.checksums
        )
        return lora.adopt(found, initial)

    def check_initial_weights(self) -> None:
        """Raises a one-line ValueError where they are not there; reads no array."""
        if self.initial_weights is None:
            return
        path = Path(self.initial_weights.path)
        if is_foreign(path):
            open_folder(path)
        else:
            read_metadata(path)

    def _import(self, path: Path, abstract: Any, initial: Any = None) -> Any:
        """The weights in `path`; of `initial` what they do not have and need not (routers of an upcycled model)."""
        if self.weights is None:
            raise ValueError(
                f"{path} holds weights of another program, and {self.name} does not know their names"
            )
        bars: list[Progress] = []  # made when the number of tensors is known

        def report(done: int, total: int) -> None:
            if not bars:
                shows = jax.process_index() == 0
                bars.append(Progress(total, description="import", unit="tensor", enabled=shows))
            bars[0].update(done)

        names = getattr(self.weights, "fresh", None)
        fresh = {}
        if initial is not None and names is not None:
            kept = named_leaves(initial)
            fresh = {name: value for name, value in kept.items() if re.fullmatch(names, name)}
        wanted = named_leaves(abstract)
        part = nested({name: leaf for name, leaf in wanted.items() if name not in fresh})
        params = import_params(path, part, self.weights, report=report)
        params = with_leaves(abstract, named_leaves(params) | fresh)
        for bar in bars:
            bar.close()
        return params

    def _initial(self, abstract: Mapping[str, Any]) -> dict[str, Any]:
        """What no other program keeps, as the model starts it: scales of FP8, adapters."""
        if not jax.tree.leaves(abstract):
            return {}
        wanted = named_leaves(dict(abstract))

        def start() -> dict[str, Any]:
            tokens = jax.numpy.zeros((1, 1), "int32")
            found = named_leaves(nn.meta.unbox(dict(self.model.init(jax.random.key(0), tokens))))
            return {name: found[name] for name in wanted}

        places = {name: leaf.sharding for name, leaf in wanted.items()}
        return with_leaves(dict(abstract), jax.jit(start, out_shardings=places)())

    def fp8_products(self, traced: Any, compiled: Any) -> fp8.Products | None:
        """8-bit products in a step that was compiled for a GPU; None where none were asked for, and elsewhere."""
        if not platform.is_nvidia() or not fp8.asked_for(traced):
            return None
        return fp8.count(traced, hlo.parse(compiled.as_text()))

    def open_log(self, directory: Path, *, num_steps: int | None = None) -> RunLog:
        """The log in `directory`; `num_steps` of the training, None where there is none."""
        options = self.logging
        return RunLog(
            directory,
            num_steps=num_steps,
            summary_interval_steps=options.summary_interval_steps,
            tensorboard=options.tensorboard,
            is_main=jax.process_index() == 0,
            compute_dtype=self.compute_dtype,
            experts=options.experts,
            peak_flops_per_device=None
            if options.peak_tflops is None
            else options.peak_tflops * 1e12,
        )

    def train(
        self,
        job_log_dir: str,
        *,
        config: str = "{}",
        config_text: str = "",
        job: Job | None = None,
    ) -> int:
        """Trains, or goes on with, the run in `job_log_dir`; returns the exit code of the process."""
        if self.train_data is None:
            raise ValueError(f"{self.name} has no training data; use --mode=eval")
        self._check_training()
        if self.cluster.startup_check and not processes.alone():
            self.check_start(job_log_dir, config=config, job=job)
        return loop.train(
            self.on_these_devices(), job_log_dir, config=config, config_text=config_text, job=job
        )

    def check_start(self, job_log_dir: str, *, config: str = "{}", job: Job | None = None) -> int:
        """Compares the processes and sums over each mesh axis, as training does before its first step; returns 0."""
        directory, peers = Path(job_log_dir), None if job is None else job.peers
        limits = HangOptions(busy_minutes=_CHECK_MINUTES)
        with Watchdog(limits, directory, peers, what="the start-up check"):
            report = startup.compare_processes(directory, config)
            mesh = self.on_these_devices().mesh.build()
            shape = f"mesh {dict(mesh.shape)}"
            axes = startup.measure_axes(mesh, [each["host"] for each in report.facts])
        if processes.is_first():
            print("\n".join(["check: " + report.line + f"; {shape}", *axes]), file=sys.stderr)
        return 0

    def replay(self, job_log_dir: str, *, step: int | None = None) -> int:
        """Takes a step of the run in `job_log_dir` again with every module watched; see `train.replay`."""
        if self.train_data is None:
            raise ValueError(f"{self.name} has no training data: there is no step to replay")
        return replay.replay(self.on_these_devices(), job_log_dir, step=step)

    def evaluate(
        self,
        job_log_dir: str,
        *,
        checkpoint: str | None = None,
        step: int | None = None,
        follow: bool = False,
        config_text: str = "",
    ) -> int:
        """Evaluates a checkpoint (default: the latest of `job_log_dir`) on the held-out sets; returns the exit code.

        With `follow`, the newest of a running job whenever there is a new one, until the run has finished.
        """
        here = self.on_these_devices()
        if not here.eval_data:
            raise ValueError(f"{here.name} has no held-out set; name some with --fdl.EVAL_SETS")
        here.check_data(here.eval_data.values())
        source = Path(checkpoint or job_log_dir)
        if not follow and not is_foreign(source):
            read_metadata(source, step=step)  # refuses before a file is written
        # What a model without context could reach at best: says how much a loss is worth.
        references = {
            name: unigram_entropy_of(
                data,
                global_batch=here.global_batch_size,
                max_batches=here.evaluation.max_batches,
            )
            for name, data in here.eval_data.items()
            if data.tokenizer is not None
        }
        return evaluate.evaluate(
            here,
            job_log_dir,
            checkpoint=checkpoint,
            step=step,
            follow=follow,
            references=references,
            config_text=config_text,
        )

    def decode(self, job_log_dir: str, **options: Any) -> int:
        """Continues prompts with a checkpoint; see `paxlike.decode.decode` for the options."""
        return decode.decode(self.on_these_devices(), job_log_dir, **options)
