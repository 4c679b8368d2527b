"""Dropout (Srivastava et al. 2014)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from paxlike.layers.sequence import Sequence
from paxlike.ops.random import bernoulli_at


class Dropout(nn.Module):
    """Zeroes entries with probability `rate` and scales the rest by 1 / (1 - rate); active while training.

    The mask of a token depends on the key, its row and its place in the row: `sequence` says where these are not as
    the array has them.
    """

    rate: float = 0.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "..."], *, train: bool, sequence: Sequence | None = None
    ) -> Float[Array, "..."]:
        if not train or self.rate == 0.0:
            return x
        if not 0.0 < self.rate < 1.0:
            raise ValueError(f"a dropout rate is in [0, 1), got {self.rate}")
        keep = self._keep(x.shape, 1.0 - self.rate, sequence)
        return jnp.where(keep, x / (1.0 - self.rate), jnp.zeros_like(x))

    def _keep(self, shape, probability: float, sequence: Sequence | None):
        key = self.make_rng("dropout")
        if sequence is None or (sequence.rows is None and sequence.places is None):
            return jax.random.bernoulli(key, probability, shape)
        b, s, width = shape
        rows = jnp.arange(b) if sequence.rows is None else sequence.rows
        places = jnp.arange(s) if sequence.places is None else sequence.places
        return bernoulli_at(key, probability, rows, places, length=s, width=width)
