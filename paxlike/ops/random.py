"""Random bits of chosen tokens: what a token gets depends on its place in the batch, not on where it happens to stand.

JAX draws an array by hashing the number of each entry with the key (Threefry, Salmon et al. 2011). The bits of any
entry can therefore be had without the others: of rows that are one microbatch of many, of tokens in another order.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p
from jaxtyping import Array, Bool, Int


def bernoulli_at(
    key: jax.Array,
    p: float,
    rows: Int[Array, "b"],
    places: Int[Array, "s"],
    *,
    length: int,
    width: int,
) -> Bool[Array, "b s d"]:
    """`jax.random.bernoulli(key, p, (n, length, width))[rows][:, places]`, of which only this part is made.

    Raises:
      ValueError: a key that is not of Threefry, or a `width` of 2^16 and more.
    """
    if str(jax.random.key_impl(key)) != "threefry2x32" or width >= 1 << 16:
        raise ValueError(
            f"dropout of rearranged tokens needs keys of threefry2x32 and less than {1 << 16} features; these are "
            f"{jax.random.key_impl(key)} and {width}"
        )
    token = rows.astype(jnp.uint32)[:, None] * length + places.astype(jnp.uint32)[None, :]
    high, low = _number(token, width)
    first, second = jax.random.key_data(key)
    ones = jnp.ones_like(low)
    bits = jnp.bitwise_xor(*threefry2x32_p.bind(first * ones, second * ones, high, low))
    # As `jax.random.uniform`: 23 bits become a number in [1, 2), less 1.
    mantissa = (bits >> 9) | jnp.full_like(bits, 0x3F800000)
    return jax.lax.bitcast_convert_type(mantissa, jnp.float32) - 1.0 < p


def _number(token: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """token * width + 0, 1, ..., width - 1 in 64 bits, as two of 32."""
    upper, lower = (token >> 16) * width, (token & 0xFFFF) * width
    low = (upper << 16) + lower
    high = (upper >> 16) + (low < lower)
    feature = jnp.arange(width, dtype=jnp.uint32)[None, None]
    entry = low[..., None] + feature
    return high[..., None] + (entry < feature).astype(jnp.uint32), entry
