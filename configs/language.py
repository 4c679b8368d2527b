"""The knobs that all language models share, and what they expand to apart from the model itself."""

from typing import Annotated, Any, Literal

import fiddle as fdl

from configs.knobs import Knobs, knobs
from paxlike import parallel
from paxlike.checkpoint import CheckpointOptions
from paxlike.data.boolq import BoolQ
from paxlike.data.chat import ChatTemplate
from paxlike.data.instruct import Instruct
from paxlike.data.lambada import Lambada
from paxlike.data.loader import Loader
from paxlike.data.mixtures import Mixture
from paxlike.data.open_tokenizer import open_tokenizer
from paxlike.data.sources import JsonLines, TextFiles, TfdsSource
from paxlike.data.synthetic import SyntheticTokens
from paxlike.decode import SamplingOptions
from paxlike.evaluate import EvalOptions
from paxlike.experiment import Experiment, InitialWeights, LogOptions
from paxlike.tasks.language import CausalLanguage
from paxlike.train.best import BestOptions
from paxlike.train.optimizer import Adafactor, Lion, Muon, Optimizer, Schedule, Sgd
from paxlike.train.ramp import Ramp
from paxlike.train.recorder import RecorderOptions

NORMS_AND_BIASES = r"(scale|bias)$"

# What the choices of a knob read of the others; the constant rate reads none.
_SCHEDULE_PREFIXES: dict[str, tuple[str, ...]] = {
    "linear_rampup_cosine_decay": ("LR_COS_",),
    "linear_rampup_exponential_decay": ("LR_LRED_",),
    "linear_rampup_linear_decay": ("LR_LIN_",),
    "warmup_stable_decay": ("LR_WSD_",),
    "linear_rampup_constant": ("LR_CONST_",),
    "constant": (),
}
_ADAM = ("ADAM_BETA", "ADAM_EPSILON", "SECOND_MOMENT_")
_OPTIMIZER_PREFIXES: dict[str, tuple[str, ...]] = {
    "adam": (*_ADAM, "FIRST_MOMENT_"),
    "adafactor": ("ADAFACTOR_",),
    "lion": ("LION_", "FIRST_MOMENT_"),
    "muon": (*_ADAM, "MUON_", "FIRST_MOMENT_"),
    "sgd": ("SGD_", "FIRST_MOMENT_"),
}


class MeshKnobs(Knobs):
    """Devices and batch."""

    ICI_MESH_SHAPE: Annotated[
        tuple[int, ...], "mesh inside a node, [data, fsdp, tensor]; -1: what is left"
    ] = (8, 1, 1)
    DCN_MESH_SHAPE: Annotated[tuple[int, ...], "mesh across nodes, multiplied elementwise"] = (
        1,
        1,
        1,
    )
    MESH_AXES: Annotated[
        tuple[str, ...], "names of the mesh axes, outermost first; pipeline and context are others"
    ] = parallel.AXES
    SEQUENCE_PARALLEL: Annotated[
        bool, "the residual stream spread along the sequence over tensor, norms and dropout with it"
    ] = False
    CONTEXT_PARALLEL: Annotated[
        Literal["ring", "all_gather", "all_to_all"],
        "how attention works where MESH_AXES has a context axis, over which tokens of a row are spread",
    ] = "ring"
    PERCORE_BATCH_SIZE: Annotated[float, "rows per device and step, may be a fraction"] = 4
    NUM_MICROBATCHES: Annotated[
        int, "parts of the batch: follow one another through a pipeline, or are accumulated"
    ] = 1
    MICROBATCH_SIZE: Annotated[
        int | None, "rows of such a part over all devices, in place of NUM_MICROBATCHES"
    ] = None
    NUM_STAGES: Annotated[
        int | None, "pipeline stages: the first of four mesh sizes; None: what MESH_AXES say"
    ] = None
    CIRCULAR_REPEAT: Annotated[
        int, "times that a microbatch goes through the pipeline, each time with other layers"
    ] = 1
    PIPELINE_GATHER_ONCE: Annotated[
        bool,
        "stages gather weights over fsdp once a step, not for each microbatch: less is sent, more is held",
    ] = True
    BATCH_RAMP: Annotated[
        tuple[int, ...],
        "rows of the first batch, increment, rows until the batch is whole; []: whole at once",
    ] = ()
    GRADIENT_ACCUMULATION_DTYPE: Annotated[
        Literal["float32", "bfloat16"], "in which the gradients of microbatches are added"
    ] = "float32"
    ZERO_STAGE: Annotated[
        Literal[1, 2, 3],
        "what ZERO_AXES shard: 1 optimizer state, 2 and gradients, 3 and (over fsdp) parameters",
    ] = 3
    ZERO_AXES: Annotated[
        tuple[str, ...], "mesh axes over which the optimizer state is sharded, such as [fsdp, data]"
    ] = ("fsdp",)
    OFFLOAD_OPTIMIZER_STATE: Annotated[
        bool, "keep it in the memory of the host between its uses"
    ] = False
    FPROP_DTYPE: Annotated[
        Literal["bfloat16", "float32"], "compute dtype; parameters are float32"
    ] = "bfloat16"

    def mesh(self) -> parallel.Mesh:
        """The mesh that the knobs describe.

        Raises:
          ValueError: NUM_STAGES is not what the mesh has.
        """
        axes, ici, dcn = self.MESH_AXES, self.ICI_MESH_SHAPE, self.DCN_MESH_SHAPE
        if self.NUM_STAGES is not None and axes == parallel.AXES and len(ici) == len(axes) + 1:
            axes, dcn = ("pipeline", *axes), (1,) * (len(ici) - len(dcn)) + dcn
        if set(dcn) == {1}:  # nothing crosses nodes, whatever the axes
            dcn = (1,) * len(ici)
        mesh = parallel.Mesh(ici=ici, dcn=dcn, axes=axes)
        stages = mesh.shape.get("pipeline", 1)
        if self.NUM_STAGES not in (None, stages):
            raise ValueError(
                f"NUM_STAGES={self.NUM_STAGES}, but the mesh has {stages} pipeline stage(s): give ICI_MESH_SHAPE and "
                f"DCN_MESH_SHAPE four entries, of {', '.join(('pipeline', *parallel.AXES))}, whose first ones multiply "
                f"to {self.NUM_STAGES}"
            )
        return mesh

    def microbatches(self) -> int:
        """Parts of the batch.

        Raises:
          ValueError: MICROBATCH_SIZE does not divide the batch, or is given beside NUM_MICROBATCHES.
        """
        size, mesh = self.MICROBATCH_SIZE, self.mesh()
        if size is None:
            return self.NUM_MICROBATCHES
        if self.NUM_MICROBATCHES != 1:
            raise ValueError(
                f"MICROBATCH_SIZE={size} and NUM_MICROBATCHES={self.NUM_MICROBATCHES} say the same: leave one out"
            )
        if -1 in mesh.ici:
            raise ValueError(
                f"MICROBATCH_SIZE={size} needs the sizes of the mesh, and ICI_MESH_SHAPE={list(mesh.ici)} leaves one "
                "open: set NUM_MICROBATCHES"
            )
        rows = mesh.global_batch_size(self.PERCORE_BATCH_SIZE)
        if size < 1 or rows % size:
            raise ValueError(f"MICROBATCH_SIZE={size} does not divide the batch of {rows} rows")
        return rows // size


class OptimizerKnobs(Knobs):
    """Optimizer and schedule."""

    MAX_STEPS: Annotated[int, "optimizer steps of the whole run"] = 600000
    OPTIMIZER: Annotated[
        Literal["adam", "adafactor", "lion", "muon", "sgd"], "what makes a direction of a gradient"
    ] = "adam"
    LEARNING_RATE: Annotated[float, "peak learning rate"] = 6e-4
    LEARNING_RATE_FACTORS: Annotated[
        dict[str, float],
        "regex of parameter names: factor of their rate, the first that matches counts; 0 freezes",
    ] = {}
    LR_SCHEDULE: Annotated[
        Literal[
            "linear_rampup_cosine_decay",
            "linear_rampup_exponential_decay",
            "linear_rampup_linear_decay",
            "warmup_stable_decay",
            "linear_rampup_constant",
            "constant",
        ],
        "shape of the learning rate; constant has no warm-up",
    ] = "linear_rampup_cosine_decay"
    LR_COS_WARMUP: Annotated[int, "cosine: steps of linear warm-up from 0"] = 636
    LR_COS_DECAY_START: Annotated[int, "cosine: step at which the decay starts"] = 637
    LR_COS_DECAY_END: Annotated[int, "cosine: step at which it ends"] = 500000
    LR_COS_MIN_RATIO: Annotated[float, "cosine: share of the peak that is left at the end"] = 0.1
    LR_COS_MAX: Annotated[float, "cosine: factor of the peak at the top"] = 1.0
    LR_LRED_WARMUP: Annotated[int, "exponential: steps of linear warm-up from 0"] = 4000
    LR_LRED_DECAY_START: Annotated[int, "exponential: step at which the decay starts"] = 4001
    LR_LRED_DECAY_END: Annotated[int, "exponential: step at which it ends"] = 300000
    LR_LRED_MIN_RATIO: Annotated[
        float, "exponential: share of the peak that is left at the end"
    ] = 0.1
    LR_LRED_MAX: Annotated[float, "exponential: factor of the peak at the top"] = 1.0
    LR_LIN_WARMUP: Annotated[int, "linear: steps of linear warm-up from 0"] = 636
    LR_LIN_DECAY_START: Annotated[int, "linear: step at which the decay starts"] = 637
    LR_LIN_DECAY_END: Annotated[int, "linear: step at which it ends"] = 500000
    LR_LIN_MIN_RATIO: Annotated[float, "linear: share of the peak that is left at the end"] = 0.0
    LR_WSD_WARMUP: Annotated[int, "warmup_stable_decay: steps of linear warm-up from 0"] = 636
    LR_WSD_DECAY_START: Annotated[int, "warmup_stable_decay: step at which the decay starts"] = (
        450000
    )
    LR_WSD_DECAY_END: Annotated[int, "warmup_stable_decay: step at which it ends"] = 500000
    LR_WSD_MIN_RATIO: Annotated[
        float, "warmup_stable_decay: share of the peak that is left at the end"
    ] = 0.1
    LR_WSD_SHAPE: Annotated[
        Literal["linear", "cosine", "exponential", "sqrt"],
        "warmup_stable_decay: of the decay; sqrt: 1 - sqrt(its share that is over)",
    ] = "linear"
    LR_CONST_WARMUP: Annotated[int, "linear_rampup_constant: steps of linear warm-up from 0"] = 636
    ADAM_BETA1: Annotated[float, "decay of the first moment"] = 0.9
    ADAM_BETA2: Annotated[float, "decay of the second moment"] = 0.95
    ADAM_EPSILON: Annotated[float, "added to sqrt(v)"] = 1e-8
    ADAM_EPSILON_ROOT: Annotated[float, "added to v under the root"] = 0.0
    ADAM_CLIP_THRESHOLD: Annotated[
        float, "cap of the RMS of each tensor's update, 0 or less: none; of any optimizer"
    ] = -1.0
    FIRST_MOMENT_DTYPE: Annotated[
        Literal["float32", "bfloat16"], "in which momentum (Adam's m) is kept between steps"
    ] = "float32"
    SECOND_MOMENT_DTYPE: Annotated[
        Literal["float32", "bfloat16"], "in which Adam's v is kept between steps"
    ] = "float32"
    ADAFACTOR_DECAY: Annotated[float, "second moment's decay is 1 - step^-this"] = 0.8
    ADAFACTOR_MIN_SIZE: Annotated[int, "smaller matrices are not factored"] = 128
    ADAFACTOR_CLIP_THRESHOLD: Annotated[float, "cap of the RMS of each update, 0: none"] = 1.0
    ADAFACTOR_BY_PARAMETER_SCALE: Annotated[
        bool, "LEARNING_RATE is relative to the RMS of each parameter"
    ] = True
    LION_BETA1: Annotated[float, "share of the momentum in the direction"] = 0.9
    LION_BETA2: Annotated[float, "decay of the momentum"] = 0.99
    MUON_MOMENTUM: Annotated[float, "decay of the momentum"] = 0.95
    MUON_NESTEROV: Annotated[bool, "look one step ahead"] = True
    MUON_NUM_ITERATIONS: Annotated[int, "of Newton and Schulz"] = 5
    MUON_RMS: Annotated[
        float | None, "RMS of updates, as that of Adam's; None: sqrt(max(1, outputs / inputs))"
    ] = 0.2
    MUON_EXCLUDE: Annotated[
        str | None, "regex of matrices that go by Adam, as tables, norms and biases do"
    ] = None
    SGD_MOMENTUM: Annotated[float, "decay of the momentum, 0: none"] = 0.9
    SGD_NESTEROV: Annotated[bool, "look one step ahead"] = False
    WEIGHT_DECAY: Annotated[float, "decoupled, times the learning rate"] = 0.1
    WEIGHT_DECAY_EXCLUDE: Annotated[
        str | None,
        "regex of parameter names without decay; None decays all, norms and biases too, as Pax does",
    ] = None
    CLIP_GRADIENT_NORM_TO_VALUE: Annotated[float, "bound of the global gradient norm, 0: none"] = (
        1.0
    )
    SKIP_STEP_GRADIENT_NORM_VALUE: Annotated[
        float, "skip steps whose gradient norm is above this, 0: none"
    ] = 0.0
    EMA_DECAY: Annotated[float, "decay of averaged parameters that evaluation uses, 0: none"] = 0.0
    Z_LOSS_WEIGHT: Annotated[float, "coefficient of the squared log normaliser"] = 0.0
    LOGITS_CHUNK: Annotated[
        int | None, "positions of a row whose logits exist at a time; None: by size, 0: all"
    ] = None
    SEED: Annotated[int, "of initialisation and dropout"] = 1234


class DataKnobs(Knobs):
    """Data and tokenizer."""

    MAX_SEQ_LEN: Annotated[int, "tokens per row"] = 2048
    VOCAB_PATH: Annotated[
        str | None, "SentencePiece model, or tokenizer.json of Hugging Face, or a folder with one"
    ] = None
    BOS_ID: Annotated[int | None, "id where a row begins; None: the tokenizer's"] = None
    EOS_ID: Annotated[int | None, "id that ends a document; None: the tokenizer's"] = None
    TFDS_DATA_DIR: Annotated[str | None, "folder of prepared TFDS data sets; None: TFDS's own"] = (
        None
    )
    TRAIN_SET: Annotated[
        Literal["text", "boolq", "instruct"],
        "what is trained on: text, BoolQ, or prompts with answers and conversations",
    ] = "text"
    TRAIN_FILES: Annotated[
        str | None, "text or JSON-lines files (globs, comma-separated) in place of TFDS"
    ] = None
    TRAIN_WEIGHTS: Annotated[
        tuple[float, ...], "share of rows of each part of TRAIN_FILES between commas; (): one set"
    ] = ()
    EVAL_FILES: Annotated[str | None, "held-out files, as TRAIN_FILES"] = None
    TEXT_KEY: Annotated[str, "key of the text in JSON lines"] = "text"
    LAMBADA_FILE: Annotated[str | None, "JSON-lines file of LAMBADA in place of TFDS"] = None
    BOOLQ_FILE: Annotated[str | None, "JSON-lines file of BoolQ to evaluate, not TFDS"] = None
    BOOLQ_ANSWERS: Annotated[
        tuple[str, str], "yes and no as they are tokenised: with a space for byte-level tokenizers"
    ] = ("yes", "no")
    CHAT_TEMPLATE: Annotated[
        str,
        "instruct: tokenizer (its own), chatml, llama2, llama3, gemma, alpaca, plain, or a file",
    ] = "tokenizer"
    SCORED_ANSWERS: Annotated[
        Literal["all", "last"], "instruct: answers of a conversation that have weight"
    ] = "all"
    OVERLONG: Annotated[
        Literal["drop", "truncate_prompt", "truncate"], "instruct: examples longer than MAX_SEQ_LEN"
    ] = "drop"
    EVAL_SETS: Annotated[
        tuple[str, ...],
        "held-out sets: HeldOut, PileValidation, LambadaValidation, BoolQ, Instruct",
    ] = ()
    PACKED_INPUT: Annotated[
        bool, "attention stays inside each document (segments and positions)"
    ] = False
    TRAIN_INPUT_RANDOM_SEED: Annotated[int, "of the order of training rows"] = 0
    CACHE_DIR: Annotated[str, "where tokenised data is kept"] = "~/.cache/paxlike"
    TOKENIZE_WORKERS: Annotated[int, "processes that tokenise, 0: this one"] = 0


class RunKnobs(Knobs):
    """Evaluation, checkpoints and logs."""

    EVAL_INTERVAL_STEPS: Annotated[int, "steps between evaluations while training"] = 100
    EVAL_ON_TEST: Annotated[bool, "evaluate EVAL_SETS while training"] = False
    BEST_METRIC: Annotated[
        str | None, "SET/METRIC whose best checkpoint is kept, as BoolQ/boolq_acc"
    ] = None
    BEST_MODE: Annotated[Literal["min", "max"], "what is best"] = "min"
    EARLY_STOPPING_PATIENCE: Annotated[
        int, "stop after so many evaluations without a better BEST_METRIC, 0: never"
    ] = 0
    EVAL_MAX_BATCHES: Annotated[int | None, "bound of one evaluation, in batches"] = None
    CHECKPOINT_EVERY_N_STEPS: Annotated[
        int | None, "steps between checkpoints, None: only the last"
    ] = 5000
    CHECKPOINT_EVERY_MINUTES: Annotated[float | None, "minutes between checkpoints"] = None
    CHECKPOINT_MAX_TO_KEEP: Annotated[int, "newest checkpoints that are kept"] = 10
    CHECKPOINT_KEEP_EVERY_N_STEPS: Annotated[int | None, "keep these for ever"] = None
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
    SPIKE_SIGMAS: Annotated[
        float, "standard deviations above the median that make a loss a spike, 0: only non-finite"
    ] = 8.0
    SPIKE_WINDOW: Annotated[int, "steps that a loss is compared with"] = 100
    SPIKE_MAX: Annotated[int, "spikes of a run that are recorded in spikes/, 0: none"] = 10
    SUMMARY_INTERVAL_STEPS: Annotated[int, "steps between log lines"] = 100
    PROFILER_CAPTURE_STEP: Annotated[int | None, "first step of a profiler trace"] = None
    PROFILER_NUM_STEPS: Annotated[int, "steps in the trace"] = 2
    PEAK_TFLOPS: Annotated[float | None, "peak TFLOP/s of a device for MFU; None: chip table"] = (
        None
    )


class DecodeKnobs(Knobs):
    """Decoding (--mode=decode)."""

    DECODE_MAX_TOKENS: Annotated[int, "tokens of a continuation at most"] = 64
    DECODE_TEMPERATURE: Annotated[float, "0: always the most likely token"] = 1.0
    DECODE_TOP_K: Annotated[int, "choose among the k most likely, 0: all"] = 0
    DECODE_TOP_P: Annotated[float, "choose among the most likely with this total probability"] = 1.0
    DECODE_REPETITION_PENALTY: Annotated[float, "divides the scores of tokens that came before"] = (
        1.0
    )
    DECODE_STOP_STRINGS: Annotated[tuple[str, ...], "a continuation ends before any of these"] = ()
    DECODE_NUM_SAMPLES: Annotated[int, "continuations of each prompt"] = 1
    DECODE_CHAT: Annotated[
        bool, "each prompt is a user's message, written as CHAT_TEMPLATE says"
    ] = False
    DECODE_SEED: Annotated[int, "of the choices"] = 0


class LanguageModelKnobs(
    MeshKnobs, OptimizerKnobs, DataKnobs, RunKnobs, DecodeKnobs, abstract=True
):
    """Vocabulary.

    The base of causal language models on text: a family adds `model()`.
    """

    VOCAB_SIZE: Annotated[int, "rows of the token table"] = 50304

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
            percore_batch_size=self.PERCORE_BATCH_SIZE,
            ramp=self.batch_growth(),
            zero=fdl.Config(parallel.Zero, stage=self.ZERO_STAGE, axes=self.ZERO_AXES),
            offload_optimizer_state=self.OFFLOAD_OPTIMIZER_STATE,
            num_microbatches=self.microbatches(),
            accumulation_dtype=self.GRADIENT_ACCUMULATION_DTYPE,
            seed=self.SEED,
            deterministic=self.DETERMINISTIC,
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
            logging=fdl.Config(
                LogOptions,
                summary_interval_steps=self.SUMMARY_INTERVAL_STEPS,
                profiler_capture_step=self.PROFILER_CAPTURE_STEP,
                profiler_num_steps=self.PROFILER_NUM_STEPS,
                peak_tflops=self.PEAK_TFLOPS,
            ),
        )

    def rules(self) -> fdl.Config[Any] | None:
        """What is spread over which mesh axis; None for the default."""
        if not self.SEQUENCE_PARALLEL:
            return None
        return fdl.Config(parallel.rules_with, residual_length=("context", "tensor"))

    def batch_growth(self) -> fdl.Config[Ramp] | None:
        """Smaller batches at the start, if asked for."""
        if not self.BATCH_RAMP:
            return None
        if len(self.BATCH_RAMP) != 3:
            raise ValueError(
                f"BATCH_RAMP={list(self.BATCH_RAMP)} must be [first batch, increment, rows], all in rows"
            )
        start, increment, rows = self.BATCH_RAMP
        return fdl.Config(Ramp, start=start, increment=increment, rows=rows)

    def optimization(self) -> fdl.Config[Optimizer]:
        """The optimizer with its schedule."""
        self._refuse_without_effect("OPTIMIZER", _OPTIMIZER_PREFIXES)
        return fdl.Config(
            Optimizer,
            schedule=self.schedule(),
            b1=self.ADAM_BETA1,
            b2=self.ADAM_BETA2,
            epsilon=self.ADAM_EPSILON,
            epsilon_root=self.ADAM_EPSILON_ROOT,
            first_dtype=self.FIRST_MOMENT_DTYPE,
            second_dtype=self.SECOND_MOMENT_DTYPE,
            direction=self.direction(),
            weight_decay=self.WEIGHT_DECAY,
            decay_exclude=self.WEIGHT_DECAY_EXCLUDE,
            rate_factors=tuple(self.LEARNING_RATE_FACTORS.items()),
            clip_norm=self.CLIP_GRADIENT_NORM_TO_VALUE,
            clip_update=self.ADAM_CLIP_THRESHOLD,
            skip_norm=self.SKIP_STEP_GRADIENT_NORM_VALUE,
            ema_decay=self.EMA_DECAY,
        )

    def schedule(self) -> fdl.Config[Schedule]:
        """The learning rate."""
        self._refuse_without_effect("LR_SCHEDULE", _SCHEDULE_PREFIXES)
        (prefix,) = _SCHEDULE_PREFIXES[self.LR_SCHEDULE] or ("",)
        fields = {
            "warmup": "WARMUP",
            "decay_start": "DECAY_START",
            "decay_end": "DECAY_END",
            "min_ratio": "MIN_RATIO",
            "max_ratio": "MAX",
            "shape": "SHAPE",
        }
        given = {field: getattr(self, prefix + name, None) for field, name in fields.items()}
        given = {field: value for field, value in given.items() if value is not None}
        return fdl.Config(Schedule, kind=self.LR_SCHEDULE, peak=self.LEARNING_RATE, **given)

    def direction(self) -> fdl.Config[Any] | None:
        """What makes a direction of a gradient; None for Adam."""
        first = {"first_dtype": self.FIRST_MOMENT_DTYPE}
        if self.OPTIMIZER == "adafactor":
            return fdl.Config(
                Adafactor,
                decay=self.ADAFACTOR_DECAY,
                min_size=self.ADAFACTOR_MIN_SIZE,
                clip=self.ADAFACTOR_CLIP_THRESHOLD,
                by_parameter_scale=self.ADAFACTOR_BY_PARAMETER_SCALE,
            )
        if self.OPTIMIZER == "lion":
            return fdl.Config(Lion, b1=self.LION_BETA1, b2=self.LION_BETA2, **first)
        if self.OPTIMIZER == "muon":
            return fdl.Config(
                Muon,
                momentum=self.MUON_MOMENTUM,
                nesterov=self.MUON_NESTEROV,
                num_iterations=self.MUON_NUM_ITERATIONS,
                rms=self.MUON_RMS,
                by_adam=self.MUON_EXCLUDE,
                **first,
            )
        if self.OPTIMIZER == "sgd":
            return fdl.Config(Sgd, momentum=self.SGD_MOMENTUM, nesterov=self.SGD_NESTEROV, **first)
        return None

    def _refuse_without_effect(self, knob: str, prefixes: dict[str, tuple[str, ...]]) -> None:
        """Refuses a knob that was given for another choice of `knob`: one that the config's own does not read."""
        choice = getattr(self, knob)
        for other in knobs(type(self)):
            owners = [c for c, starts in prefixes.items() if other.name.startswith(starts)]
            if not owners or choice in owners or getattr(self, other.name) == other.default:
                continue
            raise ValueError(
                f"{other.name}={getattr(self, other.name)} has no effect with {knob}='{choice}'; "
                f"it is read with {' or '.join(repr(owner) for owner in owners)}"
            )

    def tokenizer(self) -> fdl.Config[Any] | None:
        """The tokenizer, not read before it is used."""
        return fdl.Config(
            open_tokenizer, path=self.VOCAB_PATH or "", bos_id=self.BOS_ID, eos_id=self.EOS_ID
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

    def train_data(self) -> fdl.Config[Loader] | None:
        """Training rows; None for configs that only evaluate."""
        kind, files, weights = self.TRAIN_SET, self.TRAIN_FILES, self.TRAIN_WEIGHTS
        packing = "packed" if self.PACKED_INPUT else "concatenated"
        if kind != "text":
            packing = "packed" if kind == "instruct" and self.PACKED_INPUT else "documents"
        if not weights:
            return self.loader(self.source(kind, "train", files), packing=packing)
        parts = (files or "").split(",")
        if len(parts) != len(weights):
            raise ValueError(
                f"TRAIN_WEIGHTS={list(weights)} has {len(weights)} shares but TRAIN_FILES={files!r} has "
                f"{len(parts)} parts between commas"
            )
        sources = [self.source(kind, "train", part.strip()) for part in parts]
        return self.loader(fdl.Config(Mixture, sources=sources, weights=weights), packing=packing)

    def eval_data(self, name: str) -> fdl.Config[Loader]:
        """One held-out set by name."""
        if name == "LambadaValidation":
            passages = self.records(self.LAMBADA_FILE, "my_lambada", "test")
            return self.loader(fdl.Config(Lambada, passages=passages), packing="documents")
        if name == "BoolQ":
            questions = self.source("boolq", "validation", self.BOOLQ_FILE)
            return self.loader(questions, packing="documents")
        if name == "Instruct":
            return self.loader(
                self.source("instruct", "validation", self.EVAL_FILES), packing="documents"
            )
        if name in ("PileValidation", "HeldOut"):
            return self.loader(self.text("validation", self.EVAL_FILES), packed=self.PACKED_INPUT)
        raise ValueError(
            f"EVAL_SETS: '{name}' is none of HeldOut, PileValidation, LambadaValidation, BoolQ, Instruct"
        )

    def source(self, kind: str, split: str, files: str | None) -> fdl.Config[Any]:
        """Documents, or a source of rows, from files or TFDS."""
        if kind == "boolq":
            yes, no = self.BOOLQ_ANSWERS
            return fdl.Config(
                BoolQ, source=self.records(files, "super_glue/boolq", split), yes=yes, no=no
            )
        if kind == "instruct":
            return fdl.Config(
                Instruct,
                source=fdl.Config(JsonLines, paths=files or ""),
                template=self.CHAT_TEMPLATE,
                answers=self.SCORED_ANSWERS,
                overlong=self.OVERLONG,
                seed=self.TRAIN_INPUT_RANDOM_SEED,
            )
        return self.text(split, files)

    def records(self, files: str | None, name: str, split: str) -> fdl.Config[Any]:
        """JSON lines where files are given, else a TFDS data set."""
        if files:
            return fdl.Config(JsonLines, paths=files, text_key=self.TEXT_KEY)
        return fdl.Config(TfdsSource, name=name, split=split, data_dir=self.TFDS_DATA_DIR)

    def text(self, split: str, files: str | None) -> fdl.Config[Any]:
        """A source of documents: files where they are given, else the Pile in TFDS."""
        if files is None:
            return fdl.Config(
                TfdsSource,
                name="the_pile",
                split=split,
                data_dir=self.TFDS_DATA_DIR,
                text_key=self.TEXT_KEY,
            )
        names = [part.strip().removesuffix(".gz").removesuffix(".zst") for part in files.split(",")]
        if all(name.endswith((".jsonl", ".json", ".jsonlines")) for name in names):
            return fdl.Config(JsonLines, paths=files, text_key=self.TEXT_KEY)
        return fdl.Config(TextFiles, paths=files)

    def loader(
        self, source: fdl.Config[Any], *, packed: bool = False, packing: str | None = None
    ) -> fdl.Config[Loader]:
        """Batches from a source with the tokenizer, length and seed of the knobs."""
        return fdl.Config(
            Loader,
            source=source,
            seq_len=self.MAX_SEQ_LEN,
            tokenizer=self.tokenizer(),
            packing=packing or ("packed" if packed else "concatenated"),
            seed=self.TRAIN_INPUT_RANDOM_SEED,
            cache_dir=self.CACHE_DIR,
            num_workers=self.TOKENIZE_WORKERS,
        )


class SyntheticData(Knobs, abstract=True):
    """Synthetic data."""

    SYNTHETIC_RANDOM: Annotated[
        bool, "random tokens; False: the constant token of Pax, whose loss falls to 0"
    ] = False

    def tokenizer(self) -> fdl.Config[Any] | None:
        """None is needed, but one may be given for decoding."""
        return super().tokenizer() if self.VOCAB_PATH else None

    def train_data(self) -> fdl.Config[Loader]:
        """Rows of the constant id 1, as in Pax, or of random ids."""
        ids = (
            {"vocab_size": self.VOCAB_SIZE, "seed": self.TRAIN_INPUT_RANDOM_SEED}
            if self.SYNTHETIC_RANDOM
            else {}
        )
        return self.loader(fdl.Config(SyntheticTokens, **ids), packed=self.PACKED_INPUT)
