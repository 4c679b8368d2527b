"""Dropout (Srivastava et al. 2014), whose mask is a function of the key, the layer, the row and the token alone.

So it is the same on every mesh: where a pipeline cuts a batch into microbatches, and where the tokens of a row are
dealt out to devices in another order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from paxlike.scoped import Scoped


@dataclasses.dataclass(frozen=True)
class Noise:
    """What the masks of a model, or of one of its layers, are made from.

    Attributes:
      key: of this layer; None where nothing is dropped.
      depth: length of the module path down to what `key` belongs to.
      rows: number of each row in the batch of the step; None counts from 0.
      places: place of each token in the rows; None counts from 0.
      shape: number of rows, and of tokens in each.
    """

    key: jax.Array | None
    shape: tuple[int, ...]
    depth: int = 0
    rows: Int[Array, "b"] | None = None
    places: Int[Array, "s"] | None = None


_noise: Scoped[Noise | None] = Scoped("noise", None)


def noise(new: Noise) -> contextlib.AbstractContextManager[None]:
    """Inside it masks are made from `new`."""
    return _noise.set(new)


def current_noise() -> Noise | None:
    """The noise in force, None outside a model."""
    return _noise.get()


def noisy() -> bool:
    """Whether masks are drawn here, from the noise in force."""
    there = current_noise()
    return there is not None and there.key is not None


class Dropout(nn.Module):
    """Zeroes entries with probability `rate` and scales the rest by 1 / (1 - rate); active while training.

    The mask comes from the noise in force, or, outside a model, from the key `dropout`. The leading dimensions of what
    is dropped are rows and tokens, or both in one.
    """

    rate: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "..."], *, train: bool) -> Float[Array, "..."]:
        if not 0.0 <= self.rate < 1.0:
            raise ValueError(f"a dropout rate is in [0, 1), got {self.rate}")
        if not train or self.rate == 0.0:
            return x
        there = current_noise()
        if there is None or there.key is None:
            keep = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - self.rate, x.shape)
        else:
            keep = _drawn(
                self, there, x.shape, lambda k, n: jax.random.bernoulli(k, 1.0 - self.rate, n)
            )
        return jnp.where(keep, x / (1.0 - self.rate), jnp.zeros_like(x))


class Jitter(nn.Module):
    """Multiplies each entry with a number between 1 - size and 1 + size; active while training.

    What a router reads (Switch Transformer, Fedus et al. 2021, appendix C).
    """

    size: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], *, train: bool) -> Float[Array, "b s d"]:
        if not train or self.size == 0.0:
            return x
        there = current_noise()
        if there is None or there.key is None:
            if not self.has_rng("dropout"):
                return x
            factor = self._factor(self.make_rng("dropout"), x.shape)
        else:
            factor = _drawn(self, there, x.shape, self._factor)
        return x * factor.astype(x.dtype)

    def _factor(self, key, shape):
        return jax.random.uniform(key, shape, jnp.float32, 1.0 - self.size, 1.0 + self.size)


def _drawn(
    module: nn.Module,
    there: Noise,
    shape: tuple[int, ...],
    draw: Callable[[jax.Array, tuple[int, ...]], jax.Array],
) -> jax.Array:
    """`draw(key, shape of one token)` for each token, by the key, the module, the row and the token."""
    assert there.key is not None  # the callers have looked
    path = "/".join(module.path[there.depth :])
    key = jax.random.fold_in(there.key, zlib.crc32(path.encode()))
    key = _mask_key(there, key, shape)
    size = shape[key.ndim :]
    of_token = lambda k: draw(k, size)
    for _ in range(key.ndim):
        of_token = jax.vmap(of_token)
    return of_token(key)


def _mask_key(there: Noise, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A key for each token: (b, s), or (b * s,) where the entries have their rows and tokens in one dimension."""
    b, s = there.shape
    rows = jnp.arange(b) if there.rows is None else there.rows
    places = jnp.arange(s) if there.places is None else there.places
    of_row = lambda row: jax.vmap(lambda place: jax.random.fold_in(row, place))(places)
    keys = jax.vmap(lambda row: of_row(jax.random.fold_in(key, row)))(rows)
    if shape[:2] == (b, s):
        return keys
    if shape[0] != b * s:
        raise ValueError(f"dropout of an array of shape {shape} among {b} rows of {s} tokens")
    return keys.reshape(b * s)
