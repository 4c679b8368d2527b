"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864, equation 34) and its scaling rules.

Shape legend: b batch, s length, h heads, k head size.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

KINDS = ("linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How frequencies are stretched for rows longer than those of pretraining.

    Attributes:
      kind: `linear` divides all positions by `factor`; `llama3` (Llama 3.1, section 3.4.2 of its report) leaves short
        wavelengths alone, divides long ones by `factor` and blends in between; `yarn` (Peng et al. 2023) blends along
        the pairs of features, and multiplies what is turned by `amplitude`.
      factor: of the stretch.
      low_frequency_factor, high_frequency_factor: wavelengths above original_length / low are long, those below
        original_length / high are short (`llama3` only).
      original_length: tokens of a row in pretraining (`llama3`, `yarn`).
      beta_fast, beta_slow: pairs that turn more often than beta_fast in a row of pretraining are left alone, those that
        turn less often than beta_slow are divided (`yarn` only).
      mscale, mscale_all_dim: weights of ln(factor) in the amplitude, and in what it is divided by; the latter also
        in `score_factor` (`yarn` only; DeepSeek sets both).
    """

    kind: str
    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"ROPE_SCALING='{self.kind}' is none of {', '.join(KINDS)}")
        if self.factor <= 0:
            raise ValueError(f"ROPE_SCALING_FACTOR={self.factor} must be above 0")
        if self.kind == "llama3" and self.low_frequency_factor >= self.high_frequency_factor:
            raise ValueError(
                f"ROPE_LOW_FREQ_FACTOR={self.low_frequency_factor} must be below "
                f"ROPE_HIGH_FREQ_FACTOR={self.high_frequency_factor}"
            )
        if self.kind == "yarn" and not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(
                f"ROPE_BETA_SLOW={self.beta_slow} must be above 0 and below ROPE_BETA_FAST={self.beta_fast}"
            )
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ValueError(
                f"ROPE_MSCALE={self.mscale} and ROPE_MSCALE_ALL_DIM={self.mscale_all_dim}: set both or neither"
            )

    @property
    def amplitude(self) -> float:
        """What queries and keys are multiplied by as they are turned."""
        if self.kind != "yarn":
            return 1.0
        if self.mscale is None or self.mscale_all_dim is None:
            return _attention_factor(self.factor, 1.0)
        return _attention_factor(self.factor, self.mscale) / self._of_all_dims()

    @property
    def score_factor(self) -> float:
        """What latent attention's scores are multiplied by (DeepSeek), for the features that are not turned."""
        return self._of_all_dims() ** 2 if self.kind == "yarn" else 1.0

    def _of_all_dims(self) -> float:
        return _attention_factor(self.factor, self.mscale_all_dim or 0.0)


def _attention_factor(factor: float, weight: float) -> float:
    """Longer rows make attention flatter, and this undoes it (Peng et al. 2023, equation 22)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0


@dataclasses.dataclass(frozen=True)
class Rope:
    """A rotary embedding over whole heads.

    Attributes:
      theta: base of the wavelengths.
      layout: which two features make a pair: `half` is (i, i + k/2), as Hugging Face stores weights; `interleaved` is
        (2i, 2i + 1), as in the paper and in Meta's weights.
      scaling: None leaves the frequencies as they are.
    """

    theta: float = 10000.0
    layout: str = "half"
    scaling: RopeScaling | None = None

    def __post_init__(self):
        if self.layout not in ("half", "interleaved"):
            raise ValueError(f"ROPE_LAYOUT='{self.layout}' is none of half, interleaved")
        if self.theta <= 0:
            raise ValueError(f"ROPE_THETA={self.theta} must be above 0")
        if self.scaling is not None and self.scaling.kind == "yarn" and self.theta <= 1:
            raise ValueError(f"ROPE_THETA={self.theta} must be above 1 with ROPE_SCALING='yarn'")

    def frequencies(self, head_dim: int) -> Float[np.ndarray, "pairs"]:
        """Radians per position of each pair, float32 (k / 2,)."""
        if head_dim % 2:
            raise ValueError(
                f"DIMS_PER_HEAD={head_dim} must be even: rotary positions turn pairs of features"
            )
        plain = self.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        return _scaled(plain, self.scaling, self.theta).astype(np.float32)

    def __call__(
        self, x: Float[Array, "b s h k"], positions: Int[Array, "b s"] | None
    ) -> Float[Array, "b s h k"]:
        """`x` turned by its positions (0, 1, ... where None), in float32."""
        if positions is None:
            positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        frequencies = self.frequencies(x.shape[-1])[None, None, None]
        angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        if self.scaling is not None and self.scaling.amplitude != 1.0:
            cos, sin = self.scaling.amplitude * cos, self.scaling.amplitude * sin
        wide = x.astype(jnp.float32)
        if self.layout == "half":
            a, b = jnp.split(wide, 2, axis=-1)
            turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        else:
            a, b = wide[..., 0::2], wide[..., 1::2]
            turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
        return turned.astype(x.dtype)


def _scaled(frequencies: np.ndarray, scaling: RopeScaling | None, theta: float) -> np.ndarray:
    if scaling is None:
        return frequencies
    stretched = frequencies / scaling.factor
    if scaling.kind == "linear":
        return stretched
    if scaling.kind == "yarn":
        share = _left_alone(frequencies.size, scaling, theta)
        return share * frequencies + (1.0 - share) * stretched
    turns = scaling.original_length * frequencies / (2 * math.pi)  # in a row of pretraining
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return share * frequencies + (1.0 - share) * stretched


def _left_alone(pairs: int, scaling: RopeScaling, theta: float) -> np.ndarray:
    """How much of each pair's frequency `yarn` keeps: a line between two pairs, as the published code counts them."""
    in_a_row = scaling.original_length / (2 * math.pi)
    pair = lambda turns: pairs * math.log(in_a_row / turns) / math.log(theta)  # that turns so often
    low = max(math.floor(pair(scaling.beta_fast)), 0)
    high = min(math.ceil(pair(scaling.beta_slow)), 2 * pairs - 1)
    return 1.0 - np.clip((np.arange(pairs) - low) / (high - low or 0.001), 0.0, 1.0)
