"""Rows in groups, each group times a matrix of its own: the product of experts without padding and without drops.

`jax.lax.ragged_dot` says it in one operation. What a compiler makes of it differs: on a CPU and on a GPU XLA multiplies
every row with every matrix (seen in the program that it makes for an H100 with jax 0.11.2), on a TPU it does not. So it
is a loop over blocks of rows on the first two, and for the gradient of the matrices everywhere: neither time nor memory
grows with the number of matrices. In 8 bits (`ops.fp8`) it is that loop, too, whose products an H100 has as calls of
cuBLASLt.

Shape legend: n rows, p inputs, q outputs, e matrices.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from paxlike.ops import fp8, platform

_LARGEST_BLOCK = 256  # rows, on a CPU
_LARGEST_BLOCK_ELSEWHERE = 1024  # a GPU copies the matrix of each block: it should be worth it
_SMALLEST_BLOCK = 8


def grouped_matmul_reference(
    x: Float[Array, "n p"], w: Float[Array, "e p q"], sizes: Int[Array, "e"]
) -> Float[Array, "n q"]:
    """`grouped_matmul` as one operation of jax."""
    return jax.lax.ragged_dot(x, w, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(
    x: Float[Array, "n p"], w: Float[Array, "e p q"], sizes: Int[Array, "e"], share: int = 1
) -> Float[Array, "n q"]:
    """The first sizes[0] rows of x times w[0], the next sizes[1] times w[1], ...; 0 for rows beyond all groups.

    About one row in `share` is in a group at all; how many there are is known when it runs.
    """
    return _product(x, w, sizes, share)


def _forward(x, w, sizes, share):
    return _product(x, w, sizes, share), (x, w, sizes)


def _backward(share, residuals, dy):
    x, w, sizes = residuals
    dy = dy.astype(x.dtype)
    dx = _product(dy, w, sizes, share, transposed=True).astype(x.dtype)
    return dx, _of_matrices(x, dy, sizes, share).astype(w.dtype), None


grouped_matmul.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def grouped_matmul_fp8(
    x: Float[Array, "n p"],
    w: Float[Array, "e p q"],
    sizes: Int[Array, "e"],
    peaks: Float[Array, "3"] | None,
    margin: int = 0,
    axes: tuple[str, ...] = (),
    share: int = 1,
) -> Float[Array, "n q"]:
    """`grouped_matmul` with both in 8 bits, as `ops.fp8.product`: all matrices share a scale, and so do all rows.

    p and q are multiples of 16, and so are the blocks. Rows beyond all groups are not looked at. `peaks`, and their
    "gradient", are those of `ops.fp8.product`; where they are None, and in a `shard_map`, the tensors are those of all
    devices along `axes`.
    """
    return _forward_fp8(x, w, sizes, peaks, margin, axes, share)[0]


def _forward_fp8(x, w, sizes, peaks, margin, axes, share):
    x = _of_groups(x, sizes)
    seen = fp8.amax(x), fp8.amax(w)
    used = _of_all(seen, axes) if peaks is None else (peaks[0], peaks[1])
    x_scale, w_scale = (fp8.scale(amax, fp8.FORWARD, margin) for amax in used)
    narrow = fp8.quantize(x, x_scale, fp8.FORWARD)
    with jax.named_scope(f"{fp8.SCOPE}forward"):
        # An H100 multiplies 8-bit rows with 8-bit rows: matrices are turned once, not one in every turn.
        turned = fp8.quantize(w.swapaxes(1, 2), w_scale, fp8.FORWARD)
        y = _product_in_blocks(narrow, turned, sizes, share, True, x.dtype, fp8.MULTIPLE)
    # Kept for the backward pass as in `ops.fp8`.
    kept = jax.lax.bitcast_convert_type(narrow, jnp.uint8)
    return fp8.times(y, x_scale * w_scale), (kept, w, sizes, peaks, x_scale, w_scale, seen)


def _backward_fp8(margin, axes, share, residuals, dy):
    kept, w, sizes, peaks, x_scale, w_scale, seen = residuals
    narrow = jax.lax.bitcast_convert_type(kept, fp8.FORWARD)
    dy = _of_groups(dy, sizes)
    seen_dy = fp8.amax(dy)
    dy_scale = fp8.scale(
        _of_all(seen_dy, axes) if peaks is None else peaks[2], fp8.BACKWARD, margin
    )
    narrow_dy = fp8.quantize(dy, dy_scale, fp8.BACKWARD)
    with jax.named_scope(f"{fp8.SCOPE}input_grad"):
        matrices = fp8.quantize(w, w_scale, fp8.FORWARD)
        dx = _product_in_blocks(narrow_dy, matrices, sizes, share, True, dy.dtype, fp8.MULTIPLE)
    with jax.named_scope(f"{fp8.SCOPE}weight_grad"):
        dw = _of_matrices(narrow, narrow_dy, sizes, share, fp8.MULTIPLE)
    dx = fp8.times(dx, dy_scale * w_scale)
    dw = fp8.times(dw, x_scale * dy_scale).astype(w.dtype)
    return dx, dw, None, None if peaks is None else jnp.stack([*seen, seen_dy])


grouped_matmul_fp8.defvjp(_forward_fp8, _backward_fp8)


def _of_groups(x, sizes):
    """Rows, with zeros for those beyond all groups."""
    return jnp.where((jnp.arange(x.shape[0]) < jnp.sum(sizes))[:, None], x, _zero(sizes, x.dtype))


def _zero(known: Int[Array, "..."], dtype: Any) -> jax.Array:
    """0, which jax does not know of.

    What does not depend on a layer's input is computed before the loop over the layers, and an array of zeros then
    lives through it. The compiler knows.
    """
    return (known[0] * 0).astype(dtype)


def _of_all(amax, axes: tuple[str, ...]):
    """The largest along mesh axes."""
    return jax.lax.pmax(amax, axes) if axes else amax


def _product(x, w, sizes, share: int, *, transposed: bool = False):
    """Each group times its matrix, or times the transposed one."""
    if platform.is_cpu() and 2 * x.shape[0] <= w.shape[0]:
        return _product_of_few(x, w, sizes, transposed)
    if platform.name() != "tpu":
        return _product_in_blocks(x, w, sizes, share, transposed)
    y = jax.lax.ragged_dot(x, w.swapaxes(1, 2) if transposed else w, sizes)
    # What stands behind the last group is not the same in every implementation.
    return jnp.where((jnp.arange(x.shape[0]) < jnp.sum(sizes))[:, None], y, 0)


def _product_of_few(x, w, sizes, transposed):
    """A matrix for each row, where most matrices have none (a token that is generated).

    A loop wants all matrices in an array of their own, which is a copy where they are part of a stack of layers; rows
    of such an array are fetched from where they lie.
    """
    ends, n = jnp.cumsum(sizes), jnp.arange(x.shape[0])
    group = jnp.sum(n[:, None] >= ends[None], axis=1)
    matrices = jnp.take(w, jnp.minimum(group, w.shape[0] - 1), axis=0, mode="clip")
    contraction = (((1,), (2 if transposed else 1,)), ((0,), (0,)))
    y = jax.lax.dot_general(x, matrices, contraction)
    return jnp.where((n < ends[-1])[:, None], y, 0)


class _Blocks(NamedTuple):
    """Blocks of rows, none of which has rows of two groups that count.

    Attributes:
      rows: of a block.
      limit: how many blocks there can be.
      used: how many there are.
      group: of each block.
      start: its first row; n, behind all rows, for a block that is not used.
      left: rows of its group from there on; more than a block has, or fewer.
    """

    rows: int
    limit: int
    used: Int[Array, ""]
    group: Int[Array, "limit"]
    start: Int[Array, "limit"]
    left: Int[Array, "limit"]


def _blocks(n: int, sizes: Int[Array, "e"], share: int, smallest: int) -> _Blocks:
    e = sizes.shape[0]
    rows = smallest
    largest = _LARGEST_BLOCK if platform.is_cpu() else _LARGEST_BLOCK_ELSEWHERE
    while rows < largest and rows * e * share < n:
        rows *= 2
    limit = n // rows + e
    counts = -(-sizes // rows)
    ends = jnp.cumsum(counts)
    number = jnp.arange(limit)
    group = jnp.minimum(jnp.sum(number[:, None] >= ends[None], axis=1), e - 1)
    inside = number - (ends - counts)[group]
    start = (jnp.cumsum(sizes) - sizes)[group] + inside * rows
    left = jnp.where(number < ends[-1], sizes[group] - inside * rows, 0)
    return _Blocks(rows, limit, ends[-1], group, jnp.where(left > 0, start, n), left)


def _product_in_blocks(
    x, w, sizes, share, transposed, dtype: Any = None, smallest: int = _SMALLEST_BLOCK
):
    """In a loop; in another dtype than that of the rows where one is given."""
    n, blocks = x.shape[0], _blocks(x.shape[0], sizes, share, smallest)
    q = w.shape[1] if transposed else w.shape[2]
    contraction = (((1,), (1 if transposed else 0,)), ((), ()))
    padded = jnp.pad(x, ((0, blocks.rows), (0, 0)))

    def body(i, y):
        rows = jax.lax.dynamic_slice_in_dim(padded, blocks.start[i], blocks.rows)
        matrix = jax.lax.dynamic_index_in_dim(w, blocks.group[i], keepdims=False)
        part = jax.lax.dot_general(rows, matrix, contraction, preferred_element_type=dtype)
        # What runs over into the next group is overwritten by that group's own blocks, which come later.
        return jax.lax.dynamic_update_slice_in_dim(y, part, blocks.start[i], 0)

    dtype = dtype or x.dtype
    y = jnp.full((n + blocks.rows, q), _zero(sizes, dtype))
    return _of_groups(_over(blocks, n, share, body, y)[:n], sizes)


def _of_matrices(x, dy, sizes, share: int, smallest: int = _SMALLEST_BLOCK) -> jax.Array:
    """The gradient of the matrices, x^T dy of each group, in float32."""
    n, blocks = x.shape[0], _blocks(x.shape[0], sizes, share, smallest)
    x, dy = (jnp.pad(a, ((0, blocks.rows), (0, 0))) for a in (x, dy))
    contraction = (((0,), (0,)), ((), ()))

    def body(i, dw):
        start, group = blocks.start[i], blocks.group[i]
        mine = (jnp.arange(blocks.rows) < blocks.left[i])[:, None]
        rows = jax.lax.dynamic_slice_in_dim(x, start, blocks.rows)
        rows = jnp.where(mine, rows, _zero(blocks.start, rows.dtype))
        other = jax.lax.dynamic_slice_in_dim(dy, start, blocks.rows)
        part = jax.lax.dot_general(rows, other, contraction, preferred_element_type=jnp.float32)
        before = jax.lax.dynamic_index_in_dim(dw, group, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(dw, before + part, group, 0)

    shape = (sizes.shape[0], x.shape[1], dy.shape[1])
    zeros = jnp.full(shape, _zero(sizes, jnp.float32))
    return _over(blocks, n, share, body, zeros)


def _over(blocks: _Blocks, n: int, share: int, body, start):
    """`body` for each block that is used.

    A GPU waits for the host to learn of a count that it computed. Where most blocks are used it does not ask, and
    multiplies nothing in the others; where few are, asking costs less than that.
    """
    if share == 1 and not platform.is_cpu():
        return jax.lax.fori_loop(0, blocks.limit, body, start)
    matrices = blocks.limit - n // blocks.rows  # half a block is left over of each, about
    turns = n // (share * blocks.rows) + -(-matrices // 2)
    with jax.named_scope(f"about_{turns}_turns"):  # `log.flops.turns` reads it
        return jax.lax.fori_loop(0, blocks.used, body, start)


@jax.custom_vjp
def fetch(
    x: Float[Array, "n p"], source: Int[Array, "m"], readers: Int[Array, "n r"]
) -> Float[Array, "m p"]:
    """Row source[i] of x for each i, 0 where source[i] is n.

    `readers` are the results that each row of x becomes, m for none: with them the gradient is a sum of rows that are
    fetched, not a scatter.
    """
    return _rows(x, source)


def _fetch_backward(residuals, dy):
    readers = residuals
    n, r = readers.shape
    back = _rows(dy, readers.reshape(-1)).reshape(n, r, -1)
    dx = jnp.sum(back.astype(jnp.float32), axis=1) if r > 1 else back[:, 0]
    return dx.astype(dy.dtype), None, None


fetch.defvjp(
    lambda x, source, readers: (_rows(x, source), readers),
    _fetch_backward,
)


def _rows(x, index):
    n = x.shape[0]
    there = (index < n)[:, None]
    rows = jnp.take(x, jnp.minimum(index, n - 1), axis=0, mode="clip")
    return jnp.where(there, rows, _zero(index, x.dtype))
