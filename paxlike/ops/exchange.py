"""Rows of tokens to the devices that have their experts, and back: a ragged all-to-all.

A device has rows sorted by expert, and the experts lie on the devices of some mesh axes in order: so what goes to one
device is one slice, and every device is told the sizes of all (a table of devices x experts). What a device is given
stands by sender, and is sorted by expert once more. One slice for each device, not one for each expert: XLA:GPU sends
slices one by one.

The size of the buffer that rows are received in is fixed when the program is made. Rows that do not fit are left out
where they are sent (`fitting`).

Shape legend: b rows of a batch, l length, n devices, m experts of a device, e = n m experts, r rows that a device has,
d width, k experts of a token.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from paxlike.ops import platform, routing
from paxlike.ops.grouped import fetch

EXCHANGES = ("gather", "all_to_all")


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How rows of experts without capacity get to the devices that have the experts.

    Attributes:
      kind: `gather`, all rows to all devices; `all_to_all`, each to those that want it.
      buffer_factor: with `all_to_all` a device has places for this x the rows that it would be given if all were given
        as many; None: for all that could come, so that nothing is dropped whoever the tokens choose.
    """

    kind: str = "gather"
    buffer_factor: float | None = None

    def check(self) -> None:
        """Raises one line for what cannot be."""
        if self.kind not in EXCHANGES:
            raise ValueError(f"MOE_EXCHANGE='{self.kind}' is none of {', '.join(EXCHANGES)}")
        if self.buffer_factor is None:
            return
        if self.kind != "all_to_all":
            raise ValueError(
                f"EXPERT_BUFFER_FACTOR={self.buffer_factor} has no effect with MOE_EXCHANGE={self.kind}: set "
                "MOE_EXCHANGE=all_to_all"
            )
        if self.buffer_factor < 1:
            raise ValueError(
                f"EXPERT_BUFFER_FACTOR={self.buffer_factor} must be at least 1: less than the mean would be dropped "
                "from tokens that are spread evenly, too"
            )

    def places(self, tokens: int, k: int, num_experts: int, num_devices: int) -> int:
        """Rows of the buffer of a device, where each has so many tokens."""
        worst = num_devices * tokens * min(k, num_experts // num_devices)
        if self.buffer_factor is None:
            return worst
        return min(worst, -(-math.ceil(self.buffer_factor * tokens * k) // 8) * 8)


def fitting(
    experts: Int[Array, "b l k"], *, num_experts: int, axes: tuple[str, ...], places: int
) -> Bool[Array, "b l k"]:
    """Which choices fit into buffers of so many places, inside a `shard_map`.

    Every (device that sends, expert) has the same number of places, the largest with which all fit; first choices come
    before second ones, earlier tokens before later ones.
    """
    b, length, k = experts.shape
    n = _size(axes)
    m = num_experts // n
    sizes = jnp.sum(jax.nn.one_hot(experts.reshape(-1), num_experts, dtype=jnp.int32), axis=0)
    table = jax.lax.all_gather(sizes, axes).reshape(n, n, m)
    limits = jax.vmap(functools.partial(_limit, places=places))(
        table.swapaxes(0, 1).reshape(n, n * m)
    )
    position = routing.positions(experts.reshape(1, b * length, k), num_experts)
    of_device = jnp.append(limits, jnp.iinfo(jnp.int32).max)[experts // m]
    return position.reshape(b, length, k) < of_device


def _limit(sizes: Int[Array, "s"], *, places: int) -> Int[Array, ""]:
    """The largest number for which the sum of min(size, number) is at most `places`."""
    ascending, count = jnp.sort(sizes), sizes.shape[0]
    below = jnp.cumsum(ascending) - ascending
    left = count - jnp.arange(count)
    whole = jnp.sum(below + left * ascending <= places)  # so many sizes are taken as they are
    at = jnp.minimum(whole, count - 1)
    return jnp.where(whole == count, ascending[-1], (places - below[at]) // left[at])


def elsewhere(
    compute: Callable[..., jax.Array], *, axes: tuple[str, ...], places: int
) -> Callable[..., jax.Array]:
    """`compute(rows, sizes, matrices, reference)` for the experts of all devices along `axes`, inside a `shard_map`.

    `rows` are this device's, sorted by expert, `sizes` those of all experts; `matrices` are of this device's experts.
    """

    def compute_elsewhere(
        rows: Float[Array, "r d"], sizes: Int[Array, "e"], matrices: Any, reference: bool
    ) -> Float[Array, "r d"]:
        n, me = _size(axes), jax.lax.axis_index(axes)
        table = jax.lax.all_gather(sizes, axes).reshape(n, n, -1)
        there, back = _ways(jnp.sum(table, axis=2), me)
        mine = table[:, me]  # (n, m): by device that sends, and expert
        by_sender, by_expert = _starts(mine.reshape(-1)), _starts(mine.T.reshape(-1))
        sort = _runs(mine.T.reshape(-1), by_sender.reshape(mine.shape).T.reshape(-1), places)
        unsort = _runs(mine.reshape(-1), by_expert.reshape(mine.T.shape).T.reshape(-1), places)
        given = _moved(rows, there, back, axes, places)
        given = fetch(given, sort, unsort[:, None])
        result = compute(given, jnp.sum(mine, axis=0), matrices, reference)
        result = fetch(result, unsort, sort[:, None])
        return _moved(result, back, there, axes, rows.shape[0])

    return compute_elsewhere


class _Way(NamedTuple):
    """What `jax.lax.ragged_all_to_all` wants to know on one device, each (n,)."""

    input_offsets: jax.Array
    send_sizes: jax.Array
    output_offsets: jax.Array
    recv_sizes: jax.Array


def _ways(sent: Int[Array, "n n"], me: Int[Array, ""]) -> tuple[_Way, _Way]:
    """There and back, where device i sends sent[i, j] rows to j."""
    in_rows = jnp.cumsum(sent, axis=1) - sent  # where they begin on the device that has them
    in_places = jnp.cumsum(sent, axis=0) - sent  # and on the device that is given them
    there = _Way(in_rows[me], sent[me], in_places[me], sent[:, me])
    return there, _Way(in_places[:, me], sent[:, me], in_rows[:, me], sent[me])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _moved(rows, there: _Way, back: _Way, axes: tuple[str, ...], places: int):
    """What this device is given, 0 behind it; the gradient goes back the other way."""
    empty = jnp.zeros((places, *rows.shape[1:]), rows.dtype)
    return ragged_all_to_all(rows, empty, *there, axes=axes)


def _moved_forward(rows, there, back, axes, places):
    return _moved(rows, there, back, axes, places), (there, back, rows.shape[0])


def _moved_backward(axes, places, residuals, gradient):
    there, back, num_rows = residuals
    return _moved(gradient, back, there, axes, num_rows), None, None


_moved.defvjp(_moved_forward, _moved_backward)


def ragged_all_to_all(
    operand: Float[Array, "r d"],
    output: Float[Array, "p d"],
    input_offsets: Int[Array, "n"],
    send_sizes: Int[Array, "n"],
    output_offsets: Int[Array, "n"],
    recv_sizes: Int[Array, "n"],
    *,
    axes: tuple[str, ...],
) -> Float[Array, "p d"]:
    """`jax.lax.ragged_all_to_all`, one slice for each device; on a CPU, where XLA has none, all is gathered."""
    ways = (input_offsets, send_sizes, output_offsets, recv_sizes)
    if not platform.is_cpu():
        return jax.lax.ragged_all_to_all(operand, output, *ways, axis_name=axes)
    me = jax.lax.axis_index(axes)
    gather = lambda a: jax.lax.all_gather(a, axes)
    rows = gather(operand)
    begin, size, into = (gather(a)[:, me] for a in ways[:3])
    size = jnp.where(size == recv_sizes, size, 0)  # they are the same, or a GPU would wait for ever
    place = jnp.arange(output.shape[0])[:, None]
    inside = (place >= into[None]) & (
        place < (into + size)[None]
    )  # by place, and device that sends
    sender = jnp.argmax(inside, axis=1)
    row = jnp.clip(place[:, 0] - into[sender] + begin[sender], 0, operand.shape[0] - 1)
    return jnp.where(jnp.any(inside, axis=1)[:, None], rows[sender, row], output)


def _size(axes: tuple[str, ...]) -> int:
    return math.prod(jax.lax.axis_size(axis) for axis in axes)


def _starts(sizes: Int[Array, "s"]) -> Int[Array, "s"]:
    return jnp.cumsum(sizes) - sizes


def _runs(sizes: Int[Array, "s"], starts: Int[Array, "s"], length: int) -> Int[Array, "length"]:
    """starts[0], starts[0] + 1, ... sizes[0] of them, then those of the next run, ...; `length` behind the last run."""
    number = jnp.arange(length)
    shift = jnp.repeat(starts - _starts(sizes), sizes, total_repeat_length=length)
    return jnp.where(number < jnp.sum(sizes), number + shift, length)
