"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864, equation 34) and its scaling rules.

Shape legend: b batch, s length, h heads, k head size.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How frequencies are stretched for rows longer than those of pretraining.

    Attributes:
      kind: `linear` divides all positions by `factor`; `llama3` (Llama 3.1, section 3.4.2 of its report) leaves short
        wavelengths alone, divides long ones by `factor` and blends in between.
      factor: of the stretch.
      low_frequency_factor, high_frequency_factor: wavelengths above original_length / low are long, those below
        original_length / high are short (`llama3` only).
      original_length: tokens of a row in pretraining (`llama3` only).
    """

    kind: str
    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self):
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"ROPE_SCALING='{self.kind}' is none of linear, llama3")
        if self.factor <= 0:
            raise ValueError(f"ROPE_SCALING_FACTOR={self.factor} must be above 0")
        if self.kind == "llama3" and self.low_frequency_factor >= self.high_frequency_factor:
            raise ValueError(
                f"ROPE_LOW_FREQ_FACTOR={self.low_frequency_factor} must be below "
                f"ROPE_HIGH_FREQ_FACTOR={self.high_frequency_factor}"
            )


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

    def frequencies(self, head_dim: int) -> Float[np.ndarray, "pairs"]:
        """Radians per position of each pair, float32 (k / 2,)."""
        if head_dim % 2:
            raise ValueError(
                f"DIMS_PER_HEAD={head_dim} must be even: rotary positions turn pairs of features"
            )
        plain = self.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        return _scaled(plain, self.scaling).astype(np.float32)

    def __call__(
        self, x: Float[Array, "b s h k"], positions: Int[Array, "b s"] | None
    ) -> Float[Array, "b s h k"]:
        """`x` turned by its positions (0, 1, ... where None), in float32."""
        if positions is None:
            positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        frequencies = self.frequencies(x.shape[-1])[None, None, None]
        angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        wide = x.astype(jnp.float32)
        if self.layout == "half":
            a, b = jnp.split(wide, 2, axis=-1)
            turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        else:
            a, b = wide[..., 0::2], wide[..., 1::2]
            turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
        return turned.astype(x.dtype)


def _scaled(frequencies: np.ndarray, scaling: RopeScaling | None) -> np.ndarray:
    if scaling is None:
        return frequencies
    stretched = frequencies / scaling.factor
    if scaling.kind == "linear":
        return stretched
    turns = scaling.original_length * frequencies / (2 * math.pi)  # in a row of pretraining
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return share * frequencies + (1.0 - share) * stretched
