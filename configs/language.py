"""The knobs that all language models share, and what they expand to apart from the model itself."""

from typing import Annotated, Any, Literal

import fiddle as fdl

from configs.bounds import Above, AtLeast, AtMost, Below
from configs.cluster import ClusterKnobs
from configs.data import DataKnobs
from configs.knobs import Knobs
from configs.mesh import MeshKnobs
from configs.optimization import OptimizerKnobs
from paxlike import parallel
from paxlike.checkpoint import CheckpointOptions
from paxlike.data.chat import ChatTemplate
from paxlike.decode import SamplingOptions
from paxlike.evaluate import EvalOptions
from paxlike.experiment import Experiment, InitialWeights, LogOptions
from paxlike.ops.kernel_check import KernelCheck
from paxlike.tasks.language import CausalLanguage
from paxlike.train.best import BestOptions
from paxlike.train.recorder import RecorderOptions


class RunKnobs(Knobs):
    """Evaluation, checkpoints and logs."""

    EVAL_INTERVAL_STEPS: Annotated[int, "steps between evaluations while training", AtLeast(0)] = (
        100
    )
    EVAL_ON_TEST: Annotated[bool, "evaluate EVAL_SETS while training"] = False
    BEST_METRIC: Annotated[
        str | None, "SET/METRIC whose best checkpoint is kept, as BoolQ/boolq_acc"
    ] = None
    BEST_MODE: Annotated[Literal["min", "max"], "what is best"] = "min"
    EARLY_STOPPING_PATIENCE: Annotated[
        int, "stop after so many evaluations without a better BEST_METRIC, 0: never", AtLeast(0)
    ] = 0
    EVAL_MAX_BATCHES: Annotated[int | None, "bound of one evaluation, in batches", AtLeast(1)] = (
        None
    )
    CHECKPOINT_EVERY_N_STEPS: Annotated[
        int | None, "steps between checkpoints, None: only the last", AtLeast(0)
    ] = 5000
    CHECKPOINT_EVERY_MINUTES: Annotated[float | None, "minutes between checkpoints", AtLeast(0)] = (
        None
    )
    CHECKPOINT_MAX_TO_KEEP: Annotated[int, "newest checkpoints that are kept", AtLeast(1)] = 10
    CHECKPOINT_KEEP_EVERY_N_STEPS: Annotated[int | None, "keep these for ever", AtLeast(0)] = None
    CHECKPOINT_CHECKSUMS: Annotated[
        bool, "checksum every file; False: sizes only, for huge ones"
    ] = True
    CHECKPOINT_RESTORE_PATH: Annotated[
        str | None, "checkpoint whose weights a fresh run starts from"
    ] = None
    CHECKPOINT_IGNORE_RULES: Annotated[
        tuple[str, ...], "regexes of parameters not to take from there"
    ] = ()
    DETERMINISTIC: Annotated[
        bool, "the same run gives the same bits on GPUs too, where that takes slower kernels"
    ] = False
    XLA_BUNDLE: Annotated[
        Literal["auto", "none", "gpu", "gpu-sharded"],
        "compiler flags; auto: gpu where there is an NVIDIA GPU, else none",
    ] = "auto"
    CHECK_KERNELS: Annotated[
        bool, "compare fast kernels with the plain ones before their first use on a machine"
    ] = True
    SPIKE_SIGMAS: Annotated[
        float, "standard deviations above the median that make a loss a spike, 0: only non-finite"
    ] = 8.0
    SPIKE_WINDOW: Annotated[int, "steps that a loss is compared with"] = 100
    SPIKE_MAX: Annotated[int, "spikes of a run that are recorded in spikes/, 0: none"] = 10
    SUMMARY_INTERVAL_STEPS: Annotated[int, "steps between log lines", AtLeast(1)] = 100
    PROFILER_CAPTURE_STEP: Annotated[int | None, "first step of a profiler trace", AtLeast(1)] = (
        None
    )
    PROFILER_NUM_STEPS: Annotated[int, "steps in the trace", AtLeast(1)] = 2
    PEAK_TFLOPS: Annotated[
        float | None, "peak TFLOP/s of a device for MFU; None: chip table", Above(0)
    ] = None


class DecodeKnobs(Knobs):
    """Decoding (--mode=decode)."""

    DECODE_MAX_TOKENS: Annotated[int, "tokens of a continuation at most", AtLeast(1)] = 64
    DECODE_TEMPERATURE: Annotated[float, "0: always the most likely token", AtLeast(0)] = 1.0
    DECODE_TOP_K: Annotated[int, "choose among the k most likely, 0: all", AtLeast(0)] = 0
    DECODE_TOP_P: Annotated[
        float, "choose among the most likely with this total probability", Above(0), AtMost(1)
    ] = 1.0
    DECODE_REPETITION_PENALTY: Annotated[
        float, "divides the scores of tokens that came before", Above(0)
    ] = 1.0
    DECODE_STOP_STRINGS: Annotated[tuple[str, ...], "a continuation ends before any of these"] = ()
    DECODE_NUM_SAMPLES: Annotated[int, "continuations of each prompt", AtLeast(1)] = 1
    DECODE_CHAT: Annotated[
        bool, "each prompt is a user's message, written as CHAT_TEMPLATE says"
    ] = False
    DECODE_SEED: Annotated[int, "of the choices", AtLeast(0), Below(2**32)] = 0


class LanguageModelKnobs(
    MeshKnobs, OptimizerKnobs, DataKnobs, RunKnobs, ClusterKnobs, DecodeKnobs, abstract=True
):
    """Vocabulary.

    The base of causal language models on text: a family adds `model()`.
    """

    VOCAB_SIZE: Annotated[int, "rows of the token table", AtLeast(1)] = 50304

    def model(self) -> fdl.Config[Any]:
        """The model of the family."""
        raise NotImplementedError

    def weights(self) -> fdl.Config[Any] | None:
        """How other programs name the weights; None where none has such a model."""
        return None

    def experiment(self) -> fdl.Config[Experiment]:
        """The whole tree."""
        mesh = self.mesh()
        return fdl.Config(
            Experiment,
            name=type(self).__name__,
            model=self.model(),
            task=fdl.Config(CausalLanguage, z_loss=self.Z_LOSS_WEIGHT, chunk=self.LOGITS_CHUNK),
            optimizer=self.optimization(),
            mesh=fdl.Config(parallel.Mesh, ici=mesh.ici, dcn=mesh.dcn, axes=mesh.axes),
            rules=self.rules(),
            num_steps=self.MAX_STEPS,
            max_skipped_steps=self.MAX_SKIPPED_STEPS,
            percore_batch_size=self.PERCORE_BATCH_SIZE,
            ramp=self.batch_growth(),
            zero=fdl.Config(parallel.Zero, stage=self.ZERO_STAGE, axes=self.ZERO_AXES),
            offload_optimizer_state=self.OFFLOAD_OPTIMIZER_STATE,
            num_microbatches=self.microbatches(),
            accumulation_dtype=self.GRADIENT_ACCUMULATION_DTYPE,
            seed=self.SEED,
            deterministic=self.DETERMINISTIC,
            xla_bundle=self.XLA_BUNDLE,
            compute_dtype=self.FPROP_DTYPE,
            train_data=self.train_data(),
            eval_data={name: self.eval_data(name) for name in self.EVAL_SETS},
            tokenizer=self.tokenizer(),
            initial_weights=self.initial_weights(),
            weights=self.weights(),
            sampling=self.sampling(),
            chat=fdl.Config(ChatTemplate, name=self.CHAT_TEMPLATE) if self.DECODE_CHAT else None,
            checkpoints=fdl.Config(
                CheckpointOptions,
                every_n_steps=self.CHECKPOINT_EVERY_N_STEPS,
                every_minutes=self.CHECKPOINT_EVERY_MINUTES,
                keep_last=self.CHECKPOINT_MAX_TO_KEEP,
                keep_every_n_steps=self.CHECKPOINT_KEEP_EVERY_N_STEPS,
                checksums=self.CHECKPOINT_CHECKSUMS,
            ),
            evaluation=fdl.Config(
                EvalOptions,
                every_n_steps=self.EVAL_INTERVAL_STEPS if self.EVAL_ON_TEST else 0,
                max_batches=self.EVAL_MAX_BATCHES,
            ),
            best=fdl.Config(
                BestOptions,
                metric=self.BEST_METRIC,
                mode=self.BEST_MODE,
                patience=self.EARLY_STOPPING_PATIENCE,
            ),
            recorder=fdl.Config(
                RecorderOptions,
                sigmas=self.SPIKE_SIGMAS,
                window=self.SPIKE_WINDOW,
                max_recordings=self.SPIKE_MAX,
            ),
            kernels=fdl.Config(KernelCheck, enabled=self.CHECK_KERNELS),
            cluster=self.cluster(),
            logging=fdl.Config(
                LogOptions,
                summary_interval_steps=self.SUMMARY_INTERVAL_STEPS,
                profiler_capture_step=self.PROFILER_CAPTURE_STEP,
                profiler_num_steps=self.PROFILER_NUM_STEPS,
                peak_tflops=self.PEAK_TFLOPS,
            ),
        )

    def initial_weights(self) -> fdl.Config[InitialWeights] | None:
        """Weights of another run, if asked for."""
        if self.CHECKPOINT_RESTORE_PATH is None:
            return None
        rules = tuple((pattern, None) for pattern in self.CHECKPOINT_IGNORE_RULES)
        return fdl.Config(InitialWeights, path=self.CHECKPOINT_RESTORE_PATH, rules=rules)

    def sampling(self) -> fdl.Config[SamplingOptions]:
        """How continuations are chosen."""
        return fdl.Config(
            SamplingOptions,
            max_tokens=self.DECODE_MAX_TOKENS,
            temperature=self.DECODE_TEMPERATURE,
            top_k=self.DECODE_TOP_K,
            top_p=self.DECODE_TOP_P,
            repetition_penalty=self.DECODE_REPETITION_PENALTY,
            stop_strings=self.DECODE_STOP_STRINGS,
            num_samples=self.DECODE_NUM_SAMPLES,
            seed=self.DECODE_SEED,
        )
