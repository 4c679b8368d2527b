"""Tokens to their experts and back: by one-hot products (the reference), by row numbers, or sorted by expert.

The three give the same numbers. One-hot products cost as much again as the experts, or more, and grow with the square
of the tokens of a group; row numbers move each row once; sorting needs no capacity.

Shape legend: b rows of a batch, l length, g groups, s tokens of a group, d width, e experts, c places, k experts of a
token.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from paxlike import compat, parallel
from paxlike.ops import fp8, platform, routing
from paxlike.ops.attention import is_plain
from paxlike.ops.exchange import Exchange, elsewhere, fitting
from paxlike.ops.grouped import fetch

Combine = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Groups:
    """The tokens (b, l) of a batch in groups that are routed apart.

    Attributes:
      shape: b and l.
      size: tokens of a group.
      parts: into how many a row is cut, for groups that stay on the devices that have the parts of a row.
    """

    shape: tuple[int, int]
    size: int
    parts: int = 1

    @classmethod
    def of(cls, shape: tuple[int, ...], size: int | None) -> Groups:
        """Groups of `size` tokens; one group of all where None, and where there are fewer.

        Raises:
          ValueError: the tokens do not divide into groups of that size.
        """
        b, length = shape
        tokens = b * length
        if size is None or tokens <= size:
            return cls((b, length), tokens)
        if tokens % size:
            raise ValueError(
                f"{b} rows of {length} tokens do not divide into groups of {size} tokens; set MOE_GROUPS so that the "
                f"groups of {tokens} tokens are whole, as {max(1, round(tokens / size))} x {b} rows / rows of a batch"
            )
        parts, count = parallel.num_shards("length"), tokens // size
        if parts > 1 and count % parts == 0 and b % (count // parts) == 0:
            return cls((b, length), size, parts)
        return cls((b, length), size)

    def split(self, x: jax.Array) -> jax.Array:
        """(b, l, ...) -> (g, s, ...)."""
        (b, length), rest = self.shape, x.shape[2:]
        if self.parts > 1:
            rows = b * length // self.size // self.parts
            x = x.reshape(rows, b // rows, self.parts, length // self.parts, *rest).swapaxes(1, 2)
        return x.reshape(-1, self.size, *rest)

    def join(self, x: jax.Array) -> jax.Array:
        """The inverse of `split`."""
        (b, length), rest = self.shape, x.shape[2:]
        if self.parts > 1:
            rows = b * length // self.size // self.parts
            x = x.reshape(rows, self.parts, b // rows, length // self.parts, *rest).swapaxes(1, 2)
        return x.reshape(b, length, *rest)


def by_onehot(
    x: Float[Array, "g s d"], chosen: routing.Routing, places: int
) -> tuple[Float[Array, "g e c d"], Combine]:
    """What each expert is given, and how its outputs become those of the tokens, as GShard writes it."""
    e = chosen.scores.shape[-1]
    position = routing.positions_by_counting(chosen.experts, e)
    kept = (position < places) & (chosen.experts < e)
    of_expert = jax.nn.one_hot(chosen.experts, e, dtype=jnp.float32) * kept[..., None]
    of_place = jax.nn.one_hot(position, places, dtype=jnp.float32)
    sent = jnp.einsum("gske,gskc->gsec", of_expert, of_place)
    gates = jnp.einsum("gske,gskc,gsk->gsec", of_expert, of_place, chosen.gates)
    xs = jnp.einsum("gsec,gsd->gecd", sent.astype(x.dtype), x)
    return xs, lambda ys: jnp.einsum("gsec,gecd->gsd", gates.astype(ys.dtype), ys)


def by_index(
    x: Float[Array, "g s d"], chosen: routing.Routing, places: int
) -> tuple[Float[Array, "g e c d"], Combine]:
    """The same by numbers of rows: both ways, and both ways back, rows are fetched."""
    g, s, d = x.shape
    e, k = chosen.scores.shape[-1], chosen.experts.shape[-1]
    slots = routing.slots(chosen.experts, e, places)
    readers = slots.of_assignment.reshape(g, s, k)
    xs = jax.vmap(fetch)(x, slots.assignment // k, readers)
    xs = parallel.over_groups(xs).reshape(g, e, places, d)

    def combine(ys: jax.Array) -> jax.Array:
        rows = ys.reshape(g, e * places, d)
        back = jax.vmap(fetch)(rows, slots.of_assignment, slots.assignment[..., None])
        back = parallel.over_groups(back).reshape(g, s, k, d)
        return _weighted(back, chosen.gates)

    return xs, combine


def by_experts(
    x: Float[Array, "g s d"], tokens: Int[Array, "g e c"], gates: Float[Array, "g e c"]
) -> tuple[Float[Array, "g e c d"], Combine]:
    """The same where experts chose tokens: a token has any number of experts."""
    g, s, d = x.shape
    index = tokens.reshape(g, -1)
    take = lambda rows, i: jnp.take(rows, i, axis=0, mode="fill", fill_value=0)
    xs = parallel.over_groups(jax.vmap(take)(x, index)).reshape(*tokens.shape, d)

    def combine(ys: jax.Array) -> jax.Array:
        weighted = (ys * gates[..., None].astype(ys.dtype)).reshape(g, -1, d)
        add = lambda rows, i: jnp.zeros((s, d), ys.dtype).at[i].add(rows, mode="drop")
        return parallel.over_groups(jax.vmap(add)(weighted, index))

    return xs, combine


def by_sorting(
    x: Float[Array, "b l d"],
    experts: Int[Array, "b l k"],
    gates: Float[Array, "b l k"],
    matrices: Mapping[str, Any],
    compute: Callable[..., jax.Array],
    *,
    num_experts: int,
    exchange: Exchange | None = None,
) -> tuple[Float[Array, "b l d"], Bool[Array, "b l k"] | None]:
    """Tokens sorted by expert, `compute(rows, sizes, matrices, reference)`, and the sum of what each token gets.

    On a mesh every device sorts its own tokens. Where experts are spread over an axis, the devices along it gather each
    other's tokens, compute what their own experts have to say, and reduce and scatter the sums: nothing is dropped,
    whoever the tokens choose. Or, as `exchange` says, they send each row to the device of its expert and get it back.

    Returns:
      The sums, and which choices had a place in the buffers of the devices (None: all).
    """
    if is_plain():
        return _sorted(x, experts, gates, matrices, compute, num_experts, reference=True), None
    sizes = compat.current_mesh_shape()
    if math.prod(sizes.values()) <= 1:
        return _sorted(x, experts, gates, matrices, compute, num_experts), None
    over, tensor = parallel.expert_axes(), parallel.mesh_axes("mlp")
    rows, length = parallel.mesh_axes("batch"), parallel.mesh_axes("length")
    if x.shape[0] % math.prod(sizes[a] for a in rows):
        rows = ()
    if x.shape[1] % math.prod(sizes[a] for a in length):
        length = ()
    tokens = P(rows or None, length or None, None)
    local: Callable[..., Any]
    keywords = {"compute": compute, "num_experts": num_experts, "over": over, "tensor": tensor}
    # Tokens that are the same on all devices of the experts need not travel.
    if exchange is not None and exchange.kind == "all_to_all" and over and set(over) <= set(rows):
        local = functools.partial(_on_device_exchanging, exchange=exchange, **keywords)
        bounded = exchange.buffer_factor is not None
    else:
        local = functools.partial(_on_device, rows=rows, **keywords)
        bounded = False
    matrices = {name: _on_all(m, sizes) for name, m in matrices.items()}
    specs = {name: _specs(m, name, over, tensor) for name, m in matrices.items()}
    found = jax.shard_map(
        local,
        in_specs=(tokens, tokens, tokens, specs),
        out_specs=(tokens, tokens) if bounded else tokens,
        axis_names=set(sizes),
        check_vma=False,
    )(x, experts, gates, matrices)
    return found if bounded else (found, None)


def _on_all(matrices, sizes: Mapping[str, int]):
    """Matrices on a mesh, whose devices scale them in 8 bits by the largest that any of them sees."""
    peaks = matrices.peaks
    if peaks is not None:
        peaks = fp8.for_each(peaks, math.prod(sizes.values()))
    return dataclasses.replace(matrices, peaks=peaks, axes=tuple(sizes))


def _specs(matrices, name: str, over, tensor):
    """Of the kernel, its adapters and its scales; the hidden dimension is the first of the way back."""
    hidden_first = name == "ffn2"
    parts = {"kernel": (hidden_first, not hidden_first), "a": (hidden_first, False)}
    parts["b"] = (False, not hidden_first)
    spec = lambda p, q: P(over or None, tensor if p else None, tensor if q else None)
    specs = {name: spec(*split) for name, split in parts.items()} | {"peaks": P(matrices.axes)}
    given = {name: None if getattr(matrices, name) is None else specs[name] for name in specs}
    return dataclasses.replace(matrices, **given)


def _on_device(x, experts, gates, matrices, *, compute, num_experts, over, rows, tensor):
    """The part of one device: its tokens (or, along the experts' axes, all), its experts, its hidden features."""
    shared = tuple(axis for axis in over if axis in rows)  # axes along which tokens differ, too
    if shared:
        gather = lambda a: jax.lax.all_gather(a, shared, axis=0, tiled=True)
        x, experts, gates = gather(x), gather(experts), gather(gates)
    mine = num_experts
    if over:
        mine = num_experts // math.prod(jax.lax.axis_size(axis) for axis in over)
        experts = experts - jax.lax.axis_index(over) * mine
        here = (experts >= 0) & (experts < mine)
        experts, gates = jnp.where(here, experts, mine), jnp.where(here, gates, 0.0)
    y = _sorted(x, experts, gates, matrices, compute, mine, share=num_experts // mine)
    wide = y.astype(jnp.float32) if platform.is_cpu() else y
    partial = (*tensor, *(axis for axis in over if axis not in shared))
    if partial:
        wide = jax.lax.psum(wide, partial)
    if shared:
        wide = jax.lax.psum_scatter(wide, shared, scatter_dimension=0, tiled=True)
    return wide.astype(y.dtype)


def _on_device_exchanging(
    x, experts, gates, matrices, *, compute, num_experts, over, tensor, exchange
):
    """The same where each row goes to the device of its expert, and comes back."""
    (b, length, _), k = x.shape, experts.shape[-1]
    num_devices = math.prod(jax.lax.axis_size(axis) for axis in over)
    places, kept = exchange.places(b * length, k, num_experts, num_devices), None
    if exchange.buffer_factor is not None:
        kept = fitting(experts, num_experts=num_experts, axes=over, places=places)
        experts, gates = jnp.where(kept, experts, num_experts), jnp.where(kept, gates, 0.0)
    share = max(1, places // (b * length * k))
    compute = elsewhere(compute, axes=over, places=places)
    y = _sorted(x, experts, gates, matrices, compute, num_experts, share=share)
    if tensor:
        wide = y.astype(jnp.float32) if platform.is_cpu() else y
        y = jax.lax.psum(wide, tensor).astype(y.dtype)
    return y if kept is None else (y, kept)


def _sorted(
    x,
    experts,
    gates,
    matrices,
    compute,
    num_experts: int,
    *,
    reference: bool = False,
    share: int = 1,
):
    """One row in `share` or so is computed with these matrices."""
    (b, length, d), k = x.shape, experts.shape[-1]
    queue = experts.reshape(-1)
    order = jnp.argsort(queue, stable=True)
    place = jnp.argsort(order)
    sizes = jnp.sum(jax.nn.one_hot(queue, num_experts, dtype=jnp.int32), axis=0)
    rows = fetch(x.reshape(-1, d), order // k, place.reshape(-1, k))
    matrices = {name: dataclasses.replace(m, share=share) for name, m in matrices.items()}
    ys = compute(rows, sizes, matrices, reference)
    back = fetch(ys, place, order[:, None]).reshape(b, length, k, d)
    return _weighted(back, gates)


def _weighted(rows: Float[Array, "g s k d"], gates: Float[Array, "g s k"]):
    """The sum over a token's experts, in float32."""
    total = jnp.sum(rows.astype(jnp.float32) * gates[..., None], axis=2)
    return total.astype(rows.dtype)


def mean_share(chosen: routing.Routing) -> Float[Array, "e"]:
    """Share of all choices of all tokens that go to each expert."""
    e = chosen.scores.shape[-1]
    counts = jnp.sum(jax.nn.one_hot(chosen.experts, e, dtype=jnp.float32), axis=(0, 1, 2))
    return counts / jnp.maximum(jnp.sum(counts), 1.0)


def statistics(
    chosen: routing.Routing, kept: Bool[Array, "g s k"] | None
) -> dict[str, Float[Array, ""]]:
    """What tells whether a router works.

    choices: experts of a token. entropy: mean over tokens of the entropy of the scores, as a share of the largest.
    dropped: share of tokens without any expert. over_capacity_j: share of the j-th choices that found no place.
    dispatch_j: share of tokens that j experts work for.
    """
    e, k = chosen.scores.shape[-1], chosen.experts.shape[-1]
    tokens = jnp.maximum(jnp.sum(chosen.valid), 1)
    entropy = -jnp.sum(chosen.scores * jnp.log(chosen.scores + 1e-30), axis=-1)
    found = {"entropy": jnp.sum(entropy * chosen.valid) / tokens / max(math.log(e), 1e-9)}
    found["choices"] = jnp.full((), k, jnp.float32)
    if kept is not None:
        served = jnp.sum(kept & (chosen.experts < e), axis=-1)
        share = lambda some: jnp.sum(some & chosen.valid) / tokens
        found["dropped"] = share(served == 0)
        found |= {f"dispatch_{j}": share(served == j) for j in range(min(k, 2) + 1)}
        found |= {f"over_capacity_{j + 1}": share(~kept[..., j]) for j in range(min(k, 2))}
    return jax.lax.stop_gradient(found)
