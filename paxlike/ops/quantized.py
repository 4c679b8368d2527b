"""Weights kept in 8 or 4 bits: what is stored, and the product that widens it only while it is used.

`int8`: integers and one scale per output feature. `nf4`: the 16 quantiles of a normal distribution, two to a byte, and
one scale per block of 64 along the last dimension (Dettmers et al. 2023, QLoRA; the scales stay float32: they are not
quantised a second time). Codes and values are those of qwix; how they are kept is decided here. A stored weight is a
dictionary of arrays, `{"int8", "scale"}` or `{"nf4", "absmax"}`, or a plain array.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Stored = Any  # an array, or the dictionary of a quantised one
Names = tuple[str | None, ...]

BLOCK = 64


def quantize(
    weight: Float[Array, "..."], kind: str, *, input_axes: tuple[int, ...]
) -> dict[str, jax.Array]:
    """`weight` as it is stored.

    Args:
      kind: `int8` or `nf4`.
      input_axes: dimensions that a product sums over; an int8 scale serves all of them.

    Raises:
      ValueError: the last dimension is odd, so that 4-bit codes do not fill bytes.
    """
    import qwix

    weight = weight.astype(jnp.float32)
    if kind == "int8":
        outputs = tuple(i for i in range(weight.ndim) if i not in input_axes)
        found = qwix.quantize(weight, jnp.int8, channelwise_axes=outputs)
        return {"int8": found.qvalue, "scale": found.scale}
    block = _block(weight.shape[-1])

    def of_row(row):
        found = qwix.quantize(row, "nf4", tiled_axes={0: block})
        return found.qvalue.astype(jnp.uint8), found.scale

    # Row by row: qwix flattens what it is given, which would gather a weight that is sharded.
    codes, absmax = jnp.vectorize(of_row, signature="(n)->(n),(m)")(weight)
    return {"nf4": codes[..., 0::2] | (codes[..., 1::2] << 4), "absmax": absmax}


def dequantize(stored: Stored, dtype: Any = "float32") -> jax.Array:
    """The weight that `stored` stands for; a plain array is cast."""
    if not isinstance(stored, Mapping):
        return jnp.asarray(stored, dtype)
    import qwix

    if "int8" in stored:
        wide = qwix.dequantize(qwix.QArray(jnp.asarray(stored["int8"]), stored["scale"]))
        return wide.astype(dtype)
    codes = jnp.asarray(stored["nf4"])
    *lead, half = codes.shape
    both = jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(*lead, 2 * half)

    def of_row(row, absmax):
        return qwix.dequantize(qwix.QArray(row.astype(jnp.uint4), absmax, None, "nf4"))

    wide = jnp.vectorize(of_row, signature="(n),(m)->(n)")(both, jnp.asarray(stored["absmax"]))
    return wide.astype(dtype)


def names(kind: str, axes: Names, *, num_inputs: int) -> dict[str, Names]:
    """Logical names of the stored arrays, for a weight whose dimensions are called `axes`."""
    if kind == "int8":
        # Too small to be worth gathering over the width.
        outputs = tuple(None if name == "embed" else name for name in axes[num_inputs:])
        return {"int8": axes, "scale": (None,) * num_inputs + outputs}
    return {"nf4": axes, "absmax": (*axes[:-1], None)}


def is_quantized(stored: Stored) -> bool:
    """Whether `stored` is the dictionary of a quantised weight."""
    return isinstance(stored, Mapping) and set(stored) in ({"int8", "scale"}, {"nf4", "absmax"})


def quantize_like(weight: Float[Array, "..."], stored: Stored) -> dict[str, jax.Array]:
    """`weight` in the form that `stored` (arrays or abstract arrays) has."""
    if "int8" in stored:
        summed = zip(stored["scale"].shape, weight.shape, strict=True)
        axes = tuple(i for i, (one, size) in enumerate(summed) if one == 1 != size)
        return quantize(weight, "int8", input_axes=axes)
    return quantize(weight, "nf4", input_axes=())


def shape_of(stored: Stored) -> tuple[int, ...]:
    """Shape of the weight that `stored` (arrays or abstract arrays) stands for."""
    if not is_quantized(stored):
        return tuple(stored.shape)
    if "int8" in stored:
        return tuple(stored["int8"].shape)
    *lead, half = stored["nf4"].shape
    return (*lead, 2 * half)


def frozen_product(
    x: Float[Array, "*rows p"], stored: Stored, shape: tuple[int, ...]
) -> Float[Array, "..."]:
    """x W for a frozen weight: only its stored form lives until the backward pass, which widens it anew."""

    def product(x, stored):
        weight = dequantize(stored, x.dtype).reshape(shape)
        return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (0,)), ((), ())))

    return jax.checkpoint(product)(x, stored)


def _block(size: int) -> int:
    """Numbers that share a scale: 64, or what of it divides the last dimension."""
    block = math.gcd(BLOCK, size)
    if block == 1:
        raise ValueError(
            f"LORA_BASE='nf4': a weight whose last dimension is {size} cannot be kept in 4 bits; it must be even"
        )
    return block
