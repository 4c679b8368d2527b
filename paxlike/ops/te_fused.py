"""A norm and the products behind it, as one operation of Transformer Engine.

With the delayed recipe and MXFP8 its norm writes what the product reads, in 8 bits, and so does the activation inside
its feed-forward layer: neither is written wide. `layers.fused` says where that is done; parameters and state are those
of the layers one by one.

Shape legend: p inputs, n parts of a gated feed-forward layer (2, else 1), f hidden.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from paxlike import parallel
from paxlike.ops import te

# Ours -> theirs, which has no form of the exact gelu.
ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "silu": "silu"}
# Over these axes alone its gradients of a gain and a bias are summed; see `mesh_obstacle`.
_SUMMED = ("data", "fsdp")
_WHOLE, _HIDDEN = ("batch", "length", "act_embed"), ("batch", "length", "act_mlp")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["gain", "bias"],
    meta_fields=["kind", "zero_centered", "epsilon"],
)
@dataclasses.dataclass(frozen=True)
class Norm:
    """The parameters of a norm over the width.

    Attributes:
      gain, bias: any shape of p elements; no bias: zeros.
      kind: `layernorm` or `rmsnorm`.
      zero_centered: the gain is its distance from 1.
      epsilon: added to the variance, or to the mean square.
    """

    gain: jax.Array
    bias: jax.Array | None
    kind: str
    zero_centered: bool
    epsilon: float

    def vectors(self, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
        """Gain and bias as it wants them: in the dtype of what is normed, for which alone it has kernels."""
        gain = self.gain.reshape(-1)
        if self.kind == "rmsnorm":
            return (gain + 1.0 if self.zero_centered else gain).astype(dtype), None
        bias = jnp.zeros_like(gain) if self.bias is None else self.bias.reshape(-1)
        return gain.astype(dtype), bias.astype(dtype)

    @property
    def options(self) -> dict[str, Any]:
        """How it is told."""
        centered = self.zero_centered and self.kind == "layernorm"
        return {
            "norm_type": self.kind,
            "zero_centered_gamma": centered,
            "epsilon": self.epsilon,
        }


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["kernel", "bias", "peaks"], meta_fields=["te"]
)
@dataclasses.dataclass(frozen=True)
class Weight:
    """What belongs to one product.

    Attributes:
      kernel: (p, *features), in the compute dtype.
      bias: (*features), in the compute dtype.
      peaks: (3,) with the delayed recipe, as in `ops.fp8.product`.
      te: how it is multiplied.
    """

    kernel: jax.Array
    bias: jax.Array | None
    peaks: jax.Array | None
    te: te.TransformerEngine

    def reshape(self, *features: int) -> Weight:
        """The same with other features."""
        kernel = self.kernel.reshape(self.kernel.shape[0], *features)
        bias = None if self.bias is None else self.bias.reshape(features)
        return dataclasses.replace(self, kernel=kernel, bias=bias)


def join(weights: list[Weight], axis: int) -> Weight:
    """Weights that read the same input as one, their features joined along `axis`; they share their three scales.

    The compiler joins them where it rounds them to the compute dtype; in float32 it is a copy of them in each step.
    """
    first = weights[0]
    if len(weights) == 1:
        return first
    bias = peaks = None
    if biases := _all_or_none([weight.bias for weight in weights]):
        bias = jnp.concatenate(biases, axis)
    if each := _all_or_none([weight.peaks for weight in weights]):
        peaks = _largest(jnp.stack(each))
    kernel = jnp.concatenate([weight.kernel for weight in weights], axis + 1)
    return Weight(kernel, bias, peaks, first.te)


def _all_or_none(arrays: list[jax.Array | None]) -> list[jax.Array]:
    """The arrays, which weights of one operation have or lack together."""
    there = [array for array in arrays if array is not None]
    assert len(there) in (0, len(arrays))
    return there


@jax.custom_vjp
def _largest(peaks: Float[Array, "n 3"]) -> Float[Array, "3"]:
    """The peaks of weights that are multiplied as one; what was seen counts for each of them."""
    return jnp.max(peaks, axis=0)


_largest.defvjp(
    lambda peaks: (_largest(peaks), peaks),
    lambda peaks, seen: (jnp.broadcast_to(seen, peaks.shape),),
)


def product(x: Float[Array, "b s p"], norm: Norm, weight: Weight) -> Float[Array, "b s ..."]:
    """norm(x) W + b."""
    arrays = (x, *norm.vectors(x.dtype), weight.kernel)
    call = _Dense(tuple(norm.options.items()))
    peaks = None if weight.peaks is None else weight.peaks[None]
    y = te.run(te.Operation(call), arrays, peaks, weight.te.recipe, weight.te.margin)
    return y if weight.bias is None else y + weight.bias.reshape(1, 1, *weight.bias.shape)


def feed_forward(
    x: Float[Array, "b s p"], norm: Norm, first: Weight, second: Weight, activation: str
) -> Float[Array, "b s p"]:
    """The feed-forward layer behind `norm`: `first` (p, n, f), of two parts the first goes through the activation."""
    parts = first.kernel.shape[1]
    arrays = (
        (x, *norm.vectors(x.dtype)),
        [first.kernel, second.kernel],
        [first.bias, second.bias],
    )
    call = _FeedForward(
        tuple(norm.options.items()), (ACTIVATIONS[activation], *("linear",) * (parts - 1))
    )
    each = _all_or_none([first.peaks, second.peaks])
    peaks = jnp.stack(each) if each else None
    # It rounds the gradient of the second product's output by the first set, and the other way round (2.20.2).
    operation = te.Operation(call, gradients=(1, 0))
    return te.run(operation, arrays, peaks, first.te.recipe, first.te.margin)


@dataclasses.dataclass(frozen=True)
class _Dense:
    norm: tuple[tuple[str, Any], ...]

    def __call__(self, arrays, sets):
        x, gain, bias, kernel = arrays
        options = {} if sets is None else {"quantizer_set": sets[0]}
        return te.engine().jax.layernorm_dense.layernorm_dense(
            x,
            kernel,
            gain,
            bias,
            layernorm_input_axes=_WHOLE,
            dot_input_axes=_WHOLE,
            **dict(self.norm),
            **options,
        )


@dataclasses.dataclass(frozen=True)
class _FeedForward:
    norm: tuple[tuple[str, Any], ...]
    activation: tuple[str, ...]

    def __call__(self, arrays, sets):
        (x, gain, bias), kernels, biases = arrays
        options = {} if sets is None else {"quantizer_sets": sets}
        return te.engine().jax.layernorm_mlp.layernorm_mlp(
            x,
            gain,
            bias,
            kernels,
            biases,
            norm_input_axes=_WHOLE,
            dot_1_input_axes=_WHOLE,
            dot_2_input_axes=_HIDDEN,
            ffn1_ckpt_name="ffn1",
            ffn2_ckpt_name="te_ffn2",  # the block names it itself
            activation_type=self.activation,
            **dict(self.norm),
            **options,
        )


def mesh_obstacle() -> str | None:
    """Why the mesh in force does not allow it, as the end of a sentence.

    Its kernels of a norm sum the gradients of gain and bias over data and fsdp: tokens that are spread over other axes
    would be missing in them.
    """
    names = ("batch", "length", "residual_length")
    over = dict.fromkeys(axis for name in names for axis in parallel.mesh_axes(name))
    others = [axis for axis in over if axis not in _SUMMED]
    if not others:
        return None
    return f"tokens are spread over {' and '.join(others)}, over which it does not sum the gradients of a norm"
