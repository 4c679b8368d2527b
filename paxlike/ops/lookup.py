"""Rows of a table by their numbers, with a gradient that is summed in float32.

A token that comes 4,096 times in a batch gets 4,096 contributions; summed in bfloat16 they stop growing at 256.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from paxlike import parallel


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def lookup(
    table: Float[Array, "n d"], indices: Int[Array, "b s"], axis: str, dtype: str
) -> Float[Array, "b s d"]:
    """`table[indices]` in `dtype`; indices beyond the table take its last row.

    `axis` is the logical name of the table's rows. Whatever `dtype` is, its gradient is float32.
    """
    # Whole along the width: a lookup in a table that is sharded both ways makes the compiler replicate it.
    whole = parallel.shard(table.astype(dtype), axis, None)
    return jnp.take(whole, indices, axis=0, mode="clip")


def _forward(table, indices, axis, dtype):
    # An empty slice carries shape and dtype of the table to the backward pass.
    return lookup(table, indices, axis, dtype), (table[:, :0], indices)


def _backward(axis, dtype, residuals, dy):
    del dtype
    like, indices = residuals
    zero = jnp.zeros(indices.shape, jax.dtypes.float0)
    zeros = jnp.zeros((like.shape[0], dy.shape[-1]), jnp.float32)
    rows = dy.astype(jnp.float32)
    if parallel.num_shards("length") == 1:  # where merging rows and their tokens moves nothing
        rows, indices = rows.reshape(-1, dy.shape[-1]), indices.reshape(-1)
    gradient = zeros.at[indices].add(rows, mode="clip")
    # Each device sums its own rows over the whole width, and one reduction follows; asked for the sharded gradient at
    # once, the compiler would rather move the activations.
    gradient = parallel.shard(gradient, axis, None)
    gradient = parallel.shard(gradient, axis, "embed").astype(like.dtype)
    return gradient, zero


lookup.defvjp(_forward, _backward)
