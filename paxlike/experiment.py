"""The root of every run: one frozen dataclass of real objects, every choice of the run in it.

A config expands to a Fiddle tree of this class; `main.py` builds it and calls `train`, `evaluate` or `decode`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn

from paxlike import decode, evaluate, parallel
from paxlike.checkpoint import CheckpointOptions, read_metadata
from paxlike.data.loader import Loader
from paxlike.data.statistics import unigram_entropy_of
from paxlike.data.tokenizers import check_vocabulary
from paxlike.evaluate import EvalOptions
from paxlike.log.run_log import RunLog
from paxlike.train import loop
from paxlike.train.optimizer import Optimizer


@dataclasses.dataclass(frozen=True)
class LogOptions:
    """What a run writes about itself.

    Attributes:
      summary_interval_steps: steps between two lines of `metrics.jsonl` and points in TensorBoard.
      tensorboard: write `summaries/`.
      profiler_capture_step: first step of a profiler trace (counted from 1), None for none.
      profiler_num_steps: steps in the trace.
      peak_tflops: peak rate of one device in TFLOP/s for the MFU, None takes it from the chip table.
    """

    summary_interval_steps: int = 100
    tensorboard: bool = True
    profiler_capture_step: int | None = None
    profiler_num_steps: int = 2
    peak_tflops: float | None = None


@dataclasses.dataclass(frozen=True)
class InitialWeights:
    """Parameters that a fresh run starts from (step, optimizer and data start anew).

    Attributes:
      path: a job_log_dir, its `checkpoints` folder or one checkpoint.
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
      percore_batch_size: rows per device and step; may be a fraction.
      num_microbatches: parts of the batch whose gradients are accumulated.
      train_data, eval_data: loaders; the held-out ones by name.
      tokenizer: text <-> ids, None where there is no text.
      sampling: options of decoding.
    """

    name: str
    model: nn.Module
    task: Any
    optimizer: Optimizer
    mesh: parallel.Mesh
    num_steps: int
    percore_batch_size: float
    train_data: Any = None
    eval_data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: Any = None
    rules: parallel.Rules | None = None
    num_microbatches: int = 1
    seed: int = 1234
    compute_dtype: str = "float32"
    initial_weights: InitialWeights | None = None
    checkpoints: CheckpointOptions = CheckpointOptions()
    evaluation: EvalOptions = EvalOptions()
    logging: LogOptions = LogOptions()
    sampling: Any = None

    @property
    def global_batch_size(self) -> int:
        """Rows of one step over all devices; ValueError where the numbers do not fit together."""
        rows = self.mesh.global_batch_size(self.percore_batch_size)
        if rows % (self.num_microbatches * self.mesh.num_batch_shards):
            shards = self.mesh.num_batch_shards
            raise ValueError(
                f"NUM_MICROBATCHES={self.num_microbatches} does not divide the {rows // shards} rows of each of the "
                f"{shards} batch shards ({rows} rows in all)"
            )
        return rows

    def check(self) -> None:
        """Raises one clear ValueError for what cannot work, before anything is allocated."""
        self.mesh.check_devices(jax.device_count())
        parallel.check_axes(self.mesh.shape, self.rules)
        if self.num_microbatches < 1:
            raise ValueError(f"NUM_MICROBATCHES={self.num_microbatches} must be at least 1")
        _ = self.global_batch_size
        if self.num_steps < 0:
            raise ValueError(f"MAX_STEPS={self.num_steps} is negative")

    def check_data(self, loaders: Iterable[Loader]) -> None:
        """Raises one clear ValueError where data is missing or has ids that the model does not know."""
        for data in loaders:
            if data.tokenizer is not None:
                check_vocabulary(data.tokenizer, self.model.vocab_size)
            data.check()

    def on_these_devices(self) -> Experiment:
        """This experiment with a mesh that says how many devices it takes (-1 replaced), checked."""
        resolved = dataclasses.replace(self, mesh=self.mesh.resolve(jax.device_count()))
        resolved.check()
        return resolved

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
            peak_flops_per_device=None
            if options.peak_tflops is None
            else options.peak_tflops * 1e12,
        )

    def train(self, job_log_dir: str, *, config: str = "{}", config_text: str = "") -> int:
        """Trains, or goes on with, the run in `job_log_dir`; returns the exit code of the process."""
        if self.train_data is None:
            raise ValueError(f"{self.name} has no training data; use --mode=eval")
        return loop.train(
            self.on_these_devices(), job_log_dir, config=config, config_text=config_text
        )

    def evaluate(
        self,
        job_log_dir: str,
        *,
        checkpoint: str | None = None,
        step: int | None = None,
        follow: bool = False,
    ) -> int:
        """Evaluates a checkpoint (default: the latest of `job_log_dir`) on the held-out sets; returns the exit code.

        With `follow`, every new checkpoint of a running job, until the run has finished.
        """
        here = self.on_these_devices()
        if not here.eval_data:
            raise ValueError(f"{here.name} has no held-out set; name some with --fdl.EVAL_SETS")
        here.check_data(here.eval_data.values())
        if not follow:
            read_metadata(
                Path(checkpoint or job_log_dir), step=step
            )  # refuses before a file is written
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
        )

    def decode(self, job_log_dir: str, **options: Any) -> int:
        """Continues prompts with a checkpoint; see `paxlike.decode.decode` for the options."""
        return decode.decode(self.on_these_devices(), job_log_dir, **options)
