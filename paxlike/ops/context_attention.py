"""Attention over rows that are spread over devices: ring attention, and keys and values gathered.

Ring attention (Liu et al. 2023, https://arxiv.org/abs/2310.01889): keys and values travel around the devices of the
context axis while each device attends with its own queries to what it holds at the time. The softmax is summed online
(`ops.scores`). The backward pass is a second ring, in which the gradients of keys and values travel with them: it needs
the result and the logarithm of the normaliser of each query and nothing else, so a device keeps memory for its own
tokens only. Scores exist for `QUERY_BLOCK` queries and one chunk of keys at a time.

Tokens are in the zig-zag order (`parallel.Context`): a device holds two chunks, an early one (half 0) and a late one
(half 1). With a causal mask, at each turn of the ring two of the four products of halves are not empty, whichever
device it is: the late queries see the early keys, and either the early queries see the early keys (from a device before
this one) or the late queries the late keys (from one behind it).

Shape legend: b batch, s length, n chunk (half of a device's tokens), h query heads, g key/value heads, r query heads of
a group, k head size, m blocks of queries, q queries of a block, t keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from paxlike import parallel
from paxlike.ops.scores import Keys, Queries, Scores, Sums, fold, fold_back, grouped

QUERY_BLOCK = 512
_BEYOND = 1 << 30  # a position that no query sees


def context_attention(
    q: Float[Array, "b s h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g k"],
    *,
    context: parallel.Context,
    causal: bool,
    segments: Int[Array, "b s"] | None = None,
    scale: float | None = None,
    window: int | None = None,
    logit_cap: float | None = None,
) -> Float[Array, "b s h k"]:
    """`ops.attention` of rows in the order of `context.places`, whose length is spread over `context.axis`.

    Takes `context.kind` ring and all_gather. The arguments are those of `ops.attention`.
    """
    scores = Scores.checked(
        q.shape[-1], causal=causal, scale=scale, window=window, logit_cap=logit_cap
    )
    chunk = q.shape[1] // (2 * context.parts)
    return _attend(q, k, v, segments, _How(context, causal, scores, chunk))


class _How(NamedTuple):
    """Static facts; `chunk` is n."""

    context: parallel.Context
    causal: bool
    scores: Scores
    chunk: int

    @property
    def last(self) -> int:
        """Largest chunk distance at which a query still sees a key."""
        everything = 2 * self.context.parts - 1
        window = self.scores.window
        if window is None:
            return everything
        return min(everything, 0 if window < 2 else (window - 2 + self.chunk) // self.chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, segments, how: _How):
    return _forward(q, k, v, segments, how)[0]


def _forward(q, k, v, segments, how: _How):
    y, lse = _result(q, k, v, segments, how)
    # Kept under the name that the remat policies have for the result of attention: both, or it is computed again.
    y, lse = checkpoint_name(y, "context"), checkpoint_name(lse, "context")
    return y, (q, k, v, segments, y, lse)


def _backward(how: _How, residuals, dy):
    q, k, v, segments, y, lse = residuals
    rows = P(None, how.context.axis)
    run = _over_devices(_backward_here, how, (rows,) * 7, (rows, rows, rows))
    delta = jnp.sum(y.astype(jnp.float32) * dy.astype(jnp.float32), axis=-1)
    dq, dk, dv = run(q, k, v, segments, dy, lse, delta)
    zero = None if segments is None else np.zeros(segments.shape, jax.dtypes.float0)
    return dq, dk, dv, zero


_attend.defvjp(_forward, _backward)


# Sealed, although it is never differentiated itself: a remat policy that keeps products looks into everything else,
# and would keep the scores of all turns.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _result(q, k, v, segments, how: _How):
    rows = P(None, how.context.axis)
    return _over_devices(_forward_here, how, (rows,) * 4, (rows, rows))(q, k, v, segments)


def _no_derivative(*_):
    raise NotImplementedError("attention over a context axis has no second derivative")


_result.defvjp(_no_derivative, _no_derivative)


def _over_devices(function: Callable[..., Any], how: _How, in_specs, out_specs):
    """`function(me, how, *arrays)` on each device of the context axis, the other mesh axes being the compiler's."""
    axis = how.context.axis

    def local(*arrays):
        # Tied to the data: else masks, the same in all layers, are made before the loop over layers and kept whole.
        me, arrays = jax.lax.optimization_barrier((jax.lax.axis_index(axis), arrays))
        return function(me, how, *arrays)

    return jax.shard_map(
        local, in_specs=in_specs, out_specs=out_specs, axis_names={axis}, check_vma=False
    )


def _forward_here(me, how: _How, q, k, v, segments):
    """(b, 2n, h, k) of this device, and the log normaliser (b, 2n, h)."""
    groups = k.shape[2]
    queries = Queries(
        _blocks(grouped(q, groups)),
        _blocks(_places(me, how)[None])[:, :, 0],
        None if segments is None else _blocks(segments),
    )
    shape = queries.q.shape
    stats = (*shape[:3], groups, shape[5], shape[3])  # 2 m b g r q
    state = Sums.empty(*stats, head_dim=q.shape[-1])

    def add(state, half, keys: Keys):
        one = lambda a: jax.lax.dynamic_index_in_dim(a, half, keepdims=False)

        def block(_, mine):
            queries, sums = mine
            return None, fold(sums, queries, keys, scores=how.scores, causal=how.causal)

        _, new = jax.lax.scan(block, None, jax.tree.map(one, (queries, state)))
        return jax.tree.map(
            lambda a, x: jax.lax.dynamic_update_index_in_dim(a, x, half, 0), state, new
        )

    top, total, y = _walk(me, how, k, v, segments, state, add)
    lse = jnp.moveaxis(top + jnp.log(total), 5, 3)  # 2 m b q g r
    y = jnp.moveaxis(y / total[..., None], 5, 3)
    return _unblocks(y).reshape(q.shape).astype(q.dtype), _unblocks(lse).reshape(q.shape[:3])


def _backward_here(me, how: _How, q, k, v, segments, dy, lse, delta):
    """Gradients of q, k, v on this device."""
    groups = k.shape[2]
    queries = Queries(
        _blocks(grouped(q, groups)),
        _blocks(_places(me, how)[None])[:, :, 0],
        None if segments is None else _blocks(segments),
    )
    outer = _blocks(grouped(dy, groups))
    of_heads = lambda a: jnp.moveaxis(_blocks(a.reshape(*a.shape[:2], groups, -1)), 3, 5)
    lse, delta = of_heads(lse), of_heads(delta)  # 2 m b g r q
    state = jnp.zeros(queries.q.shape, jnp.float32)

    def add(dq, half, keys: Keys):
        one = lambda a: jax.lax.dynamic_index_in_dim(a, half, keepdims=False)

        def block(gradients, mine):
            queries, dy, lse, delta, dq = mine
            dk, dv = gradients
            more, more_k, more_v = fold_back(
                queries, keys, dy, lse, delta, scores=how.scores, causal=how.causal
            )
            return (dk + more_k, dv + more_v), dq + more

        mine = jax.tree.map(one, (queries, outer, lse, delta, dq))
        gradients, new = jax.lax.scan(block, _zeros(keys.k, keys.v), mine)
        return jax.lax.dynamic_update_index_in_dim(dq, new, half, 0), gradients

    dq, dk, dv = _walk(me, how, k, v, segments, state, add, gradients=True)
    dq = _unblocks(dq).reshape(q.shape).astype(q.dtype)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)


def _walk(me, how: _How, k, v, segments, state, add, *, gradients: bool = False):
    """Calls `add(state, half, keys)` for each chunk of keys that the queries of a half may see.

    Returns the state; with `gradients`, where `add` gives those of its keys beside the state, also the sums of these
    that belong to this device's own keys.
    """
    walk = _walk_ring if how.context.kind == "ring" else _walk_gathered
    return walk(me, how, _halves(k), _halves(v), _halves(segments), state, add, gradients)


def _walk_ring(me, how: _How, k, v, documents, state, add, gradients: bool):
    axis, parts = how.context.axis, how.context.parts

    def hop(tree, turns: int):
        if turns % parts == 0:
            return tree
        pairs = [(i, (i + turns) % parts) for i in range(parts)]
        return jax.tree.map(lambda a: jax.lax.ppermute(a, axis, pairs), tree)

    def meet(held, sums, state, turn, pairs):
        owner = (me - turn) % parts
        either = (owner > me).astype(jnp.int32)
        halves = [[either if half == _EITHER else half for half in pair] for pair in pairs]

        def one_pair(carry, pair):
            mine, theirs = pair
            places = _chunk_places(_chunk_of(owner, theirs, how), how)
            return _add_chunk(add, *carry, mine, held, theirs, places), None

        pairs = jnp.asarray(halves, jnp.int32)
        return jax.lax.scan(one_pair, (state, sums), (pairs[:, 0], pairs[:, 1]))[0]

    held, at = (k, v, documents), 0
    sums = _zeros(k, v) if gradients else None
    for first, last, pairs in _turns(how):
        held, sums = hop((held, sums), first - at)

        def turn(carry, number, pairs=pairs):
            held, sums, state = carry
            ahead = hop(held, 1)  # waits for nothing that follows
            state, sums = meet(held, sums, state, number, pairs)
            return (ahead, hop(sums, 1), state), None

        if last > first:
            (held, sums, state), _ = jax.lax.scan(
                turn, (held, sums, state), jnp.arange(first, last)
            )
        state, sums = meet(held, sums, state, last, pairs)
        at = last
    if not gradients:
        return state
    dk, dv = hop(sums, parts - at)
    return state, _whole(dk), _whole(dv)


_EITHER = -1  # early queries and keys, or late queries and keys: whichever is not empty


def _turns(how: _How):
    """(first turn, last turn, pairs of halves) of each part of the ring.

    After n turns a device holds the keys of the n-th device before it. A window leaves out the turns that no device
    needs.
    """
    parts, furthest = how.context.parts, how.last
    if not how.causal:
        return [(0, parts - 1, [(mine, theirs) for mine in (0, 1) for theirs in (0, 1)])]
    turns: list[tuple[int, int, list[tuple[int, int]]]] = []
    for number in range(parts):
        # The smallest distance in chunks, over all devices, of the two kinds of pairs.
        same = min(number, parts - number)
        pairs = [(0, 0), (1, 1)] if number == 0 else [(_EITHER, _EITHER)]
        if same + 1 <= furthest:
            pairs.append((1, 0))
        if same > furthest:
            continue
        if turns and turns[-1][1:] == (number - 1, pairs):
            turns[-1] = (turns[-1][0], number, pairs)
        else:
            turns.append((number, number, pairs))
    return turns


def _zeros(*arrays):
    return tuple(jnp.zeros(a.shape, jnp.float32) for a in arrays)


def _walk_gathered(me, how: _How, k, v, documents, state, add, gradients: bool):
    """Chunk by chunk over the gathered keys, early queries first, then late ones: 2c+1 chunks on every device."""
    axis, parts = how.context.axis, how.context.parts
    chunks = 2 * parts

    def gather(a):  # (2, b, n, ...) -> (chunks, b, n, ...), in the order of the row
        if a is None:
            return None
        a = jax.lax.all_gather(a, axis)
        return jnp.concatenate([a[:, 0], a[::-1, 1]])

    def scatter(a):  # the transpose of `gather`
        early, late = a[:parts], a[parts:][::-1]
        return jax.lax.psum_scatter(jnp.stack([early, late], axis=1), axis)

    k, v, documents = gather(k), gather(v), gather(documents)
    window = how.last + 1  # chunks that a query may see
    if not how.causal:
        steps = 2 * chunks
    else:
        steps = min(chunks + 1, 2 * window)

    def visit(carry, step):
        if not how.causal:
            half, chunk = step // chunks, step % chunks
        elif steps == chunks + 1:
            half = (step > me).astype(jnp.int32)
            chunk = jnp.where(half == 0, step, step - me - 1)
        else:
            half = step // window
            chunk = _chunk_of(me, half, how) - step % window
        at = jnp.maximum(chunk, 0)
        places = jnp.where(chunk < 0, _BEYOND, _chunk_places(chunk, how))
        return _add_chunk(add, *carry, half, (k, v, documents), at, places), None

    sums = _zeros(k, v) if gradients else None
    (state, sums), _ = jax.lax.scan(visit, (state, sums), jnp.arange(steps))
    if sums is None:
        return state
    return state, _whole(scatter(sums[0])), _whole(scatter(sums[1]))


def _add_chunk(add, state, sums, half, held, at, places):
    """`add` for the chunk `at` of the keys held; its gradients go into `sums`, which is None where none are wanted."""
    one = lambda a: jax.lax.dynamic_index_in_dim(a, at, keepdims=False)
    k, v, documents = held
    keys = Keys(one(k), one(v), places, None if documents is None else one(documents))
    if sums is None:
        return add(state, half, keys), None
    state, more = add(state, half, keys)
    return state, jax.tree.map(lambda a, x: a.at[at].add(x), sums, more)


def _chunk_of(device, half, how: _How):
    """Number of the chunk that is this half of what the device holds."""
    late = 2 * how.context.parts - 1 - device
    return jnp.where(jnp.asarray(half) == 0, device, late)


def _chunk_places(chunk, how: _How) -> jax.Array:
    return chunk * how.chunk + jnp.arange(how.chunk)


def _places(me, how: _How) -> jax.Array:
    """Places in the row of this device's tokens, (2n,)."""
    return jnp.concatenate([_chunk_places(_chunk_of(me, half, how), how) for half in (0, 1)])


def _halves(a):
    """(b, 2n, ...) -> (2, b, n, ...)."""
    if a is None:
        return None
    b, s, *rest = a.shape
    return jnp.moveaxis(a.reshape(b, 2, s // 2, *rest), 1, 0)


def _whole(a):
    """The inverse of `_halves`."""
    _, b, n, *rest = a.shape
    return jnp.moveaxis(a, 0, 1).reshape(b, 2 * n, *rest)


def _blocks(a):
    """(b, 2n, ...) -> (2, m, b, q, ...): halves, cut into blocks of at most `QUERY_BLOCK` where that divides."""
    b, s, *rest = a.shape
    n = s // 2
    number = next(m for m in range(max(1, n // QUERY_BLOCK), n + 1) if n % m == 0)
    return jnp.moveaxis(a.reshape(b, 2, number, n // number, *rest), 0, 2)


def _unblocks(a):
    """The inverse of `_blocks`."""
    _, m, b, q, *rest = a.shape
    return jnp.moveaxis(a, 2, 0).reshape(b, 2 * m * q, *rest)
