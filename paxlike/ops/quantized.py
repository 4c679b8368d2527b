"""Weights kept in 8 or 4 bits: what is stored, and the product that widens it only while it is used.

`int8`: integers and one scale per output feature. `nf4`: the 16 quantiles of a normal distribution, two to a byte, and
one scale per block of 64 along the last dimension (Dettmers et al. 2023, QLoRA; the scales stay float32: they are not
quantised a second time). A stored weight is a dictionary of arrays, `{"int8", "scale"}` or `{"nf4", "absmax"}`, or a
plain array.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Stored = Any  # an array, or the dictionary of a quantised one
Names = tuple[str | None, ...]

BLOCK = 64
# The values in [-1, 1] that divide a normal distribution evenly, 0 among them (QLoRA, appendix E).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


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
    weight = weight.astype(jnp.float32)
    if kind == "int8":
        scale = jnp.max(jnp.abs(weight), axis=input_axes, keepdims=True) / 127.0
        codes = jnp.round(weight / jnp.where(scale == 0, 1.0, scale))
        return {"int8": codes.astype(jnp.int8), "scale": scale}
    *lead, size = weight.shape
    block = _block(size)
    blocks = weight.reshape(*lead, size // block, block)
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    normed = (blocks / jnp.where(absmax == 0, 1.0, absmax)[..., None]).reshape(weight.shape)
    codes = jnp.zeros(weight.shape, jnp.uint8)
    for low, high in itertools.pairwise(NF4):
        codes += normed > (low + high) / 2
    return {"nf4": codes[..., 0::2] | (codes[..., 1::2] << 4), "absmax": absmax}


def dequantize(stored: Stored, dtype: Any = "float32") -> jax.Array:
    """The weight that `stored` stands for; a plain array is cast."""
    if not isinstance(stored, Mapping):
        return jnp.asarray(stored, dtype)
    if "int8" in stored:
        return (jnp.asarray(stored["int8"], jnp.float32) * stored["scale"]).astype(dtype)
    codes, absmax = jnp.asarray(stored["nf4"]), stored["absmax"]
    *lead, half = codes.shape
    both = jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(*lead, 2 * half)
    values = jnp.asarray(NF4, jnp.float32)[both.astype(jnp.int32)]
    blocks = values.reshape(*absmax.shape, 2 * half // absmax.shape[-1])
    return (blocks * absmax[..., None]).reshape(*lead, 2 * half).astype(dtype)


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
