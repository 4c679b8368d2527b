"""The knobs of optimizer and schedule, and what they expand to."""

from typing import Annotated, Any, Literal

import fiddle as fdl

from configs.bounds import Above, AtLeast
from configs.knobs import Knobs, knobs
from paxlike.train.optimizer import Adafactor, Lion, Muon, Optimizer, Schedule, Sgd

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


class OptimizerKnobs(Knobs):
    """Optimizer and schedule."""

    MAX_STEPS: Annotated[int, "optimizer steps of the whole run", AtLeast(0)] = 600000
    OPTIMIZER: Annotated[
        Literal["adam", "adafactor", "lion", "muon", "sgd"], "what makes a direction of a gradient"
    ] = "adam"
    LEARNING_RATE: Annotated[float, "peak learning rate", AtLeast(0)] = 6e-4
    LEARNING_RATE_FACTORS: Annotated[
        dict[str, float],
        "regex of parameter names: factor of their rate, the first that matches counts; 0 freezes",
        AtLeast(0),
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
    LR_COS_WARMUP: Annotated[int, "cosine: steps of linear warm-up from 0", AtLeast(0)] = 636
    LR_COS_DECAY_START: Annotated[int, "cosine: step at which the decay starts", AtLeast(0)] = 637
    LR_COS_DECAY_END: Annotated[int, "cosine: step at which it ends", AtLeast(0)] = 500000
    LR_COS_MIN_RATIO: Annotated[
        float, "cosine: share of the peak that is left at the end", AtLeast(0)
    ] = 0.1
    LR_COS_MAX: Annotated[float, "cosine: factor of the peak at the top", AtLeast(0)] = 1.0
    LR_LRED_WARMUP: Annotated[int, "exponential: steps of linear warm-up from 0", AtLeast(0)] = 4000
    LR_LRED_DECAY_START: Annotated[
        int, "exponential: step at which the decay starts", AtLeast(0)
    ] = 4001
    LR_LRED_DECAY_END: Annotated[int, "exponential: step at which it ends", AtLeast(0)] = 300000
    LR_LRED_MIN_RATIO: Annotated[
        float, "exponential: share of the peak that is left at the end", AtLeast(0)
    ] = 0.1
    LR_LRED_MAX: Annotated[float, "exponential: factor of the peak at the top", AtLeast(0)] = 1.0
    LR_LIN_WARMUP: Annotated[int, "linear: steps of linear warm-up from 0", AtLeast(0)] = 636
    LR_LIN_DECAY_START: Annotated[int, "linear: step at which the decay starts", AtLeast(0)] = 637
    LR_LIN_DECAY_END: Annotated[int, "linear: step at which it ends", AtLeast(0)] = 500000
    LR_LIN_MIN_RATIO: Annotated[
        float, "linear: share of the peak that is left at the end", AtLeast(0)
    ] = 0.0
    LR_WSD_WARMUP: Annotated[
        int, "warmup_stable_decay: steps of linear warm-up from 0", AtLeast(0)
    ] = 636
    LR_WSD_DECAY_START: Annotated[
        int, "warmup_stable_decay: step at which the decay starts", AtLeast(0)
    ] = 450000
    LR_WSD_DECAY_END: Annotated[int, "warmup_stable_decay: step at which it ends", AtLeast(0)] = (
        500000
    )
    LR_WSD_MIN_RATIO: Annotated[
        float, "warmup_stable_decay: share of the peak that is left at the end", AtLeast(0)
    ] = 0.1
    LR_WSD_SHAPE: Annotated[
        Literal["linear", "cosine", "exponential", "sqrt"],
        "warmup_stable_decay: of the decay; sqrt: 1 - sqrt(its share that is over)",
    ] = "linear"
    LR_CONST_WARMUP: Annotated[
        int, "linear_rampup_constant: steps of linear warm-up from 0", AtLeast(0)
    ] = 636
    ADAM_BETA1: Annotated[float, "decay of the first moment"] = 0.9
    ADAM_BETA2: Annotated[float, "decay of the second moment"] = 0.95
    ADAM_EPSILON: Annotated[float, "added to sqrt(v)", AtLeast(0)] = 1e-8
    ADAM_EPSILON_ROOT: Annotated[float, "added to v under the root", AtLeast(0)] = 0.0
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
    ADAFACTOR_MIN_SIZE: Annotated[int, "smaller matrices are not factored", AtLeast(0)] = 128
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
        float | None,
        "RMS of updates, as that of Adam's; None: sqrt(max(1, outputs / inputs))",
        Above(0),
    ] = 0.2
    MUON_EXCLUDE: Annotated[
        str | None, "regex of matrices that go by Adam, as tables, norms and biases do"
    ] = None
    SGD_MOMENTUM: Annotated[float, "decay of the momentum, 0: none"] = 0.9
    SGD_NESTEROV: Annotated[bool, "look one step ahead"] = False
    WEIGHT_DECAY: Annotated[float, "decoupled, times the learning rate", AtLeast(0)] = 0.1
    WEIGHT_DECAY_EXCLUDE: Annotated[
        str | None,
        "regex of parameter names without decay; None decays all, norms and biases too, as Pax does",
    ] = None
    CLIP_GRADIENT_NORM_TO_VALUE: Annotated[
        float, "bound of the global gradient norm, 0: none", AtLeast(0)
    ] = 1.0
    SKIP_STEP_GRADIENT_NORM_VALUE: Annotated[
        float, "skip steps whose gradient norm is above this, 0: none", AtLeast(0)
    ] = 0.0
    MAX_SKIPPED_STEPS: Annotated[
        int | None, "so many skipped steps in a row end the run; None: never", AtLeast(1)
    ] = 100
    EMA_DECAY: Annotated[float, "decay of averaged parameters that evaluation uses, 0: none"] = 0.0
    Z_LOSS_WEIGHT: Annotated[float, "coefficient of the squared log normaliser", AtLeast(0)] = 0.0
    LOGITS_CHUNK: Annotated[
        int | None, "positions of a row whose logits exist at a time; None: by size, 0: all"
    ] = None
    SEED: Annotated[int, "of initialisation and dropout"] = 1234

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
