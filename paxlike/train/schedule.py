"""Learning-rate schedules: a linear warm-up, then flat, then a decay of one of four shapes."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# kind -> shape of its decay; None: none, "": as `Schedule.shape` says.
KINDS = {
    "linear_rampup_cosine_decay": "cosine",
    "linear_rampup_exponential_decay": "exponential",
    "linear_rampup_linear_decay": "linear",
    "warmup_stable_decay": "",
    "linear_rampup_constant": None,
    "constant": None,
}
SHAPES = ("linear", "cosine", "exponential", "sqrt")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Learning rate as a function of the step: linear warm-up from 0, then flat, then decay.

    Attributes:
      kind: one of `KINDS`; the first two and `constant` are Pax's. `warmup_stable_decay` is WSD (Hu et al. 2024): a
        long flat part that a run can be prolonged from, and a short decay.
      peak: learning rate at the end of the warm-up.
      warmup, decay_start, decay_end: steps; flat between warmup and decay_start, constant after decay_end.
      min_ratio, max_ratio: factors of `peak` at the end and at the top.
      shape: of WSD's decay: one of `SHAPES`; `sqrt` falls as 1 - sqrt(share of the decay that is over)
        (Haegele et al. 2024).
    """

    kind: str
    peak: float
    warmup: int = 0
    decay_start: int = 0
    decay_end: int = 1
    min_ratio: float = 0.1
    max_ratio: float = 1.0
    shape: str = "linear"

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"LR_SCHEDULE='{self.kind}' is none of {', '.join(KINDS)}")
        if self.shape not in SHAPES:
            raise ValueError(f"LR_WSD_SHAPE='{self.shape}' is none of {', '.join(SHAPES)}")
        if not 0.0 <= self.peak < math.inf:
            raise ValueError(f"LEARNING_RATE={self.peak} must be a finite number of at least 0")
        if self.kind == "constant":
            if self.warmup:
                raise ValueError(
                    f"LR_SCHEDULE='constant' has no warm-up, but warmup={self.warmup}; use linear_rampup_constant"
                )
            return
        if self._shape is None:
            if self.warmup < 0:
                raise ValueError(f"LR_CONST_WARMUP={self.warmup} is negative")
            return
        if not 0 <= self.warmup <= self.decay_start < self.decay_end:
            raise ValueError(
                f"the schedule needs warmup <= decay start < decay end, got "
                f"{self.warmup}, {self.decay_start}, {self.decay_end}"
            )
        if self._shape == "exponential" and not (self.min_ratio > 0 and self.max_ratio > 0):
            raise ValueError(
                f"an exponential decay from {self.max_ratio} x the peak never reaches {self.min_ratio} x the peak; "
                "use a ratio above 0"
            )

    @property
    def _shape(self) -> str | None:
        shape = KINDS[self.kind]
        return self.shape if shape == "" else shape

    def __call__(self, step: jax.typing.ArrayLike) -> Float[Array, ""]:
        """The learning rate of step `step` (counted from 0)."""
        if self.kind == "constant":
            return jnp.asarray(self.peak, jnp.float32)
        step = jnp.asarray(step, jnp.float32)
        rise = (
            jnp.minimum(step / max(self.warmup, 1), 1.0)
            if self.warmup
            else jnp.ones((), jnp.float32)
        )
        return self.peak * rise * self._fall(step)

    def _fall(self, step: Float[Array, ""]) -> jax.typing.ArrayLike:
        """The factor of the peak."""
        if self._shape is None:
            return 1.0
        done = jnp.clip((step - self.decay_start) / (self.decay_end - self.decay_start), 0.0, 1.0)
        if self._shape == "exponential":
            return self.max_ratio * (self.min_ratio / self.max_ratio) ** done
        span = self.max_ratio - self.min_ratio
        if self._shape == "cosine":
            return self.min_ratio + span * 0.5 * (1.0 + jnp.cos(jnp.pi * done))
        return self.min_ratio + span * (1.0 - (done if self._shape == "linear" else jnp.sqrt(done)))
