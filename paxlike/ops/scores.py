"""What becomes of the scores q k^T, and the softmax summed online over tiles of them.

The sum (Milakov and Gimelshein 2018; Dao et al. 2022, algorithm 1) keeps for each query a running maximum, a running
sum and a running result, in float32. The backward pass computes the weights of a tile anew from the logarithm of the
normaliser.

Shape legend: b batch, q queries of a tile, t keys of a tile, g key/value heads, r query heads of a group, k head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

NOTHING = -1e30  # the maximum of no scores: finite, because the difference of two of them is taken


class Scores(NamedTuple):
    """What becomes of q k^T; a static argument."""

    scale: float
    window: int | None
    logit_cap: float | None

    @classmethod
    def checked(
        cls,
        head_dim: int,
        *,
        causal: bool,
        scale: float | None,
        window: int | None,
        logit_cap: float | None,
    ) -> Scores:
        """From the arguments of `attention`; ValueError where they make no sense."""
        if window is not None and (window < 1 or not causal):
            raise ValueError(f"a window of {window} needs causal attention and at least 1 key")
        if logit_cap is not None and logit_cap <= 0:
            raise ValueError(f"a logit cap of {logit_cap} must be above 0 (None for none)")
        return cls(head_dim**-0.5 if scale is None else scale, window, logit_cap)


class Queries(NamedTuple):
    """A tile of queries (b, q, g, r, k), their places in the row (q,) and documents (b, q)."""

    q: jax.Array
    places: jax.Array
    documents: jax.Array | None


class Keys(NamedTuple):
    """A tile of keys and values (b, t, g, k), their places in the row (t,) and documents (b, t)."""

    k: jax.Array
    v: jax.Array
    places: jax.Array
    documents: jax.Array | None


class Sums(NamedTuple):
    """Running maximum and sum (b, g, r, q), and result (b, g, r, q, k) before it is divided by the sum."""

    top: jax.Array
    total: jax.Array
    y: jax.Array

    @classmethod
    def empty(cls, *stats: int, head_dim: int) -> Sums:
        """Of no keys; `stats` is the shape of the maximum."""
        top, total = jnp.full(stats, NOTHING, jnp.float32), jnp.zeros(stats, jnp.float32)
        return cls(top, total, jnp.zeros((*stats, head_dim), jnp.float32))


def fold(sums: Sums, queries: Queries, keys: Keys, *, scores: Scores, causal: bool) -> Sums:
    """The sums with one more tile of keys."""
    tile, visible, _ = _tile(queries, keys, scores, causal)
    top = jnp.maximum(sums.top, jnp.max(tile, axis=-1))
    weights = jnp.where(visible, jnp.exp(tile - top[..., None]), 0.0)
    old = jnp.exp(sums.top - top)
    more = wide("bgrqt,btgk->bgrqk", weights.astype(keys.v.dtype), keys.v)
    total = sums.total * old + jnp.sum(weights, axis=-1)
    return Sums(top, total, sums.y * old[..., None] + more)


def fold_back(
    queries: Queries, keys: Keys, dy, lse, delta, *, scores: Scores, causal: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What one tile adds to the gradients of its queries, keys and values, in float32.

    Args:
      dy: cotangent of the result, (b, q, g, r, k).
      lse: logarithm of the normaliser, (b, g, r, q).
      delta: sum of result times cotangent, (b, g, r, q).
    """
    tile, visible, slope = _tile(queries, keys, scores, causal)
    weights = jnp.where(visible, jnp.exp(tile - lse[..., None]), 0.0)
    dv = wide("bgrqt,bqgrk->btgk", weights.astype(dy.dtype), dy)
    dweights = wide("bqgrk,btgk->bgrqt", dy, keys.v)
    dtile = weights * (dweights - delta[..., None]) * (scores.scale * slope)
    dtile = dtile.astype(queries.q.dtype)
    dq = wide("bgrqt,btgk->bqgrk", dtile, keys.k)
    return dq, wide("bgrqt,bqgrk->btgk", dtile, queries.q), dv


def grouped(q, groups: int):
    """(b, s, h, k) -> (b, s, g, r, k)."""
    b, s, h, size = q.shape
    return q.reshape(b, s, groups, h // groups, size)


def wide(form: str, a, b):
    """The contraction `form` with its result in float32."""
    return jnp.einsum(form, a, b, preferred_element_type=jnp.float32)


def _tile(queries: Queries, keys: Keys, scores: Scores, causal: bool):
    """Scores (b, g, r, q, t) in float32, masked, with the mask and the slope of the cap."""
    tile = scores.scale * wide("bqgrk,btgk->bgrqt", queries.q, keys.k)
    slope: Any = 1.0
    if scores.logit_cap is not None:
        bent = jnp.tanh(tile / scores.logit_cap)
        tile, slope = scores.logit_cap * bent, 1.0 - jnp.square(bent)
    visible = jnp.ones((1, 1, 1, 1, 1), bool)
    if causal:
        behind = queries.places[:, None] - keys.places[None, :]
        seen = behind >= 0
        if scores.window is not None:
            seen &= behind < scores.window
        visible = seen[None, None, None]
    if queries.documents is not None and keys.documents is not None:
        same = queries.documents[:, :, None] == keys.documents[:, None, :]
        visible = visible & same[:, None, None]
    return jnp.where(visible, tile, NOTHING), visible, slope
