"""Normalisation over the width: LayerNorm (Ba et al. 2016) and RMSNorm (Zhang and Sennrich 2019).

Statistics in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from paxlike.layers.sizes import check_at_least
from paxlike.ops import platform
from paxlike.ops.te_fused import Norm


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + epsilon) * (1 + scale) + bias.

    The gain is stored as its distance from 1 and starts at 0, so that weight decay pulls it towards 1, as in Pax.
    """

    epsilon: float = 1e-5
    use_bias: bool = True
    dtype: str = "float32"

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        norm = self.parts(x)

        def layer_norm(x, gain, bias):
            wide = x.astype(jnp.float32)
            mean = jnp.mean(wide, axis=-1, keepdims=True)
            variance = jnp.mean(jnp.square(wide - mean), axis=-1, keepdims=True)
            y = (wide - mean) * jax.lax.rsqrt(variance + self.epsilon) * (1.0 + gain)
            return (y if bias is None else y + bias).astype(self.dtype)

        return _keeping_input(layer_norm)(x, norm.gain, norm.bias)

    @nn.compact
    def parts(self, x: Float[Array, "... d"]) -> Norm:
        """The parameters, of as many dimensions as `x`."""
        check_at_least(0, self, "epsilon")
        gain = _vector(self, "scale", nn.initializers.zeros, x)
        bias = _vector(self, "bias", nn.initializers.zeros, x) if self.use_bias else None
        return Norm(gain, bias, "layernorm", True, self.epsilon)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale.

    Attributes:
      zero_centered: the gain is stored as its distance from 1 and starts at 0 (Gemma), not as it is.
    """

    epsilon: float = 1e-6
    zero_centered: bool = False
    dtype: str = "float32"

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        def rms_norm(x, gain):
            scale = gain + (1.0 if self.zero_centered else 0.0)
            wide = x.astype(jnp.float32)
            mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
            return (wide * jax.lax.rsqrt(mean_square + self.epsilon) * scale).astype(self.dtype)

        return _keeping_input(rms_norm)(x, self.parts(x).gain)

    @nn.compact
    def parts(self, x: Float[Array, "... d"]) -> Norm:
        """The parameters, of as many dimensions as `x`."""
        check_at_least(0, self, "epsilon")
        init = nn.initializers.zeros if self.zero_centered else nn.initializers.ones
        gain = _vector(self, "scale", init, x)
        return Norm(gain, None, "rmsnorm", self.zero_centered, self.epsilon)


def _keeping_input(norm):
    """`norm`, whose backward pass is left the input alone, not what is made of it in float32 on the way.

    A policy of rematerialisation that keeps everything would keep that, several times the input. (On a CPU the time to
    make it again is dearer than the memory.)
    """
    if platform.is_cpu():
        return norm
    kept = jax.custom_vjp(norm)
    kept.defvjp(lambda *args: (norm(*args), args), lambda args, dy: jax.vjp(norm, *args)[1](dy))
    return kept


def _vector(module: nn.Module, name: str, init, x) -> jax.Array:
    value = module.param(
        name, nn.with_logical_partitioning(init, ("norm",)), x.shape[-1:], jnp.float32
    )
    return value.reshape((1,) * (x.ndim - 1) + value.shape)
