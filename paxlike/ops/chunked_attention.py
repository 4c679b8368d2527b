"""Attention in tiles: its memory grows with the length of a row, where that of all scores grows with its square.

FlashAttention's algorithm (Dao et al. 2022, https://arxiv.org/abs/2205.14135) as a loop that XLA compiles for any
device: one tile of `BLOCK` x `BLOCK` scores at a time, tiles that a mask empties left out, and a backward pass of its
own that computes the tiles again from the result and the logarithm of the normaliser. It knows everything that the
plain reference knows, except a cache.

Shape legend: b batch, s query length, t key length, h query heads, g key/value heads, r query heads of a group,
k head size, m blocks of queries, n blocks of keys, q queries of a block.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from paxlike.ops.scores import Keys, Queries, Scores, Sums, fold, fold_back, grouped

BLOCK = 512
_NO_DOCUMENT = -1  # of the keys behind the end of a row
_NO_QUERY = -2


def chunked_attention(
    q: Float[Array, "b s h k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t g k"],
    segments: Int[Array, "b s"] | None,
    *,
    scores: Scores,
    causal: bool,
) -> Float[Array, "b s h k"]:
    """`ops.attention` without a cache."""
    return _attend(q, k, v, segments, _How(scores, causal))


class _How(NamedTuple):
    """Static facts."""

    scores: Scores
    causal: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, segments, how: _How):
    return _forward(q, k, v, segments, how)[0]


def _forward(q, k, v, segments, how: _How):
    y, lse = _result(q, k, v, segments, how)
    # Kept under the name that the remat policies have for the result of attention: both, or it is computed again.
    y, lse = checkpoint_name(y, "context"), checkpoint_name(lse, "context")
    return y, (q, k, v, segments, y, lse)


# Sealed, although it is never differentiated itself: a remat policy that keeps products would keep those of all tiles.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _result(q, k, v, segments, how: _How):
    """Attention (b, s, h, k) and the logarithm of the normaliser (m, b, g, r, q)."""
    queries, keys = _tiles(q, k, v, segments)
    m, b, block, g, r, size = queries.q.shape
    sums = Sums.empty(m, b, g, r, block, head_dim=size)

    def visit(sums, pair):
        i, j = pair
        new = fold(
            _at(sums, i), _at(queries, i), _at(keys, j), scores=how.scores, causal=how.causal
        )
        return _set(sums, new, i), None

    sums, _ = jax.lax.scan(visit, sums, _pairs(queries, keys, how))
    total = jnp.where(sums.total == 0.0, 1.0, sums.total)  # of rows behind the end
    y = jnp.moveaxis(sums.y / total[..., None], 4, 2)  # m b q g r k
    return _row(y, q.shape[1]).reshape(q.shape).astype(q.dtype), sums.top + jnp.log(total)


def _no_derivative(*_):
    raise NotImplementedError("attention in tiles has no second derivative")


_result.defvjp(_no_derivative, _no_derivative)


def _backward(how: _How, residuals, dy):
    q, k, v, segments, y, lse = residuals
    queries, keys = _tiles(q, k, v, segments)
    groups = k.shape[2]
    delta = jnp.sum(y.astype(jnp.float32) * dy.astype(jnp.float32), axis=-1)
    delta = delta.reshape(*delta.shape[:2], groups, -1)
    delta = jnp.moveaxis(_cut(delta, queries.q.shape[2]), 2, 4)  # m b g r q
    outer = _cut(grouped(dy, groups), queries.q.shape[2])
    zeros = lambda a: jnp.zeros(a.shape, jnp.float32)

    def visit(gradients, pair):
        i, j = pair
        options = {"scores": how.scores, "causal": how.causal}
        more = fold_back(
            _at(queries, i), _at(keys, j), _at(outer, i), _at(lse, i), _at(delta, i), **options
        )
        there = (i, j, j)
        return tuple(
            _set(a, _at(a, n) + x, n) for a, x, n in zip(gradients, more, there, strict=True)
        ), None

    start = (zeros(queries.q), zeros(keys.k), zeros(keys.v))
    (dq, dk, dv), _ = jax.lax.scan(visit, start, _pairs(queries, keys, how))
    dq = _row(dq, q.shape[1]).reshape(q.shape).astype(q.dtype)
    dk, dv = (_row(a, k.shape[1]).astype(k.dtype) for a in (dk, dv))
    zero = None if segments is None else np.zeros(segments.shape, jax.dtypes.float0)
    return dq, dk, dv, zero


_attend.defvjp(_forward, _backward)


def _tiles(q, k, v, segments) -> tuple[Queries, Keys]:
    """Rows cut into blocks, which come first; behind the end of a row nothing sees and nothing is seen."""
    s, t, groups = q.shape[1], k.shape[1], k.shape[2]
    of_queries, of_keys = _block(s), _block(t)
    documents = seen = segments
    if segments is None and t % of_keys:
        documents, seen = jnp.zeros((1, s), jnp.int32), jnp.zeros((1, t), jnp.int32)
    if documents is not None:
        documents = _cut(documents, of_queries, fill=_NO_QUERY)
        seen = _cut(seen, of_keys, fill=_NO_DOCUMENT)
    places = lambda length, block: jnp.arange(_padded(length, block)).reshape(-1, block)
    return (
        Queries(_cut(grouped(q, groups), of_queries), places(s, of_queries), documents),
        Keys(_cut(k, of_keys), _cut(v, of_keys), places(t, of_keys), seen),
    )


def _pairs(queries: Queries, keys: Keys, how: _How) -> tuple[jax.Array, jax.Array]:
    """(blocks of queries, blocks of keys) that see each other, as the mask alone says."""
    (m, rows), (n, columns) = queries.places.shape, keys.places.shape
    window = math.inf if how.scores.window is None else how.scores.window
    pairs = [
        (i, j)
        for i in range(m)
        for j in range(n)
        if not how.causal
        or (j * columns < (i + 1) * rows and i * rows - ((j + 1) * columns - 1) < window)
    ]
    i, j = np.array(pairs, np.int32).T
    return jnp.asarray(i), jnp.asarray(j)


def _block(length: int) -> int:
    return min(BLOCK, length)


def _padded(length: int, block: int) -> int:
    return -(-length // block) * block


def _cut(a, block: int, *, fill: int = 0):
    """(b, s, ...) -> (m, b, block, ...), the last block filled up."""
    b, s, *rest = a.shape
    if s % block:
        more = [(0, 0), (0, _padded(s, block) - s), *((0, 0) for _ in rest)]
        a = jnp.pad(a, more, constant_values=fill)
    return jnp.moveaxis(a.reshape(b, -1, block, *rest), 1, 0)


def _row(a, length: int):
    """The inverse of `_cut`."""
    m, b, block, *rest = a.shape
    return jnp.moveaxis(a, 0, 1).reshape(b, m * block, *rest)[:, :length]


def _at(tree, i):
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), tree)


def _set(tree, new, i):
    put = lambda a, x: jax.lax.dynamic_update_index_in_dim(a, x, i, 0)
    return jax.tree.map(put, tree, new)
