"""Low-rank adapters of a frozen `Linear`: LoRA, rsLoRA, DoRA, and QLoRA's base in 8 or 4 bits.

y = x W + scale (x A) B, as two thin products: neither the sum of the weights nor its gradient is ever made. W is frozen
by the optimizer (`Optimizer.trainable`), which trains the parameters below `lora/` alone.

* LoRA (Hu et al. 2021): scale = alpha / rank, B starts at zero.
* rsLoRA (Kalajdzievski 2023): scale = alpha / sqrt(rank).
* DoRA (Liu et al. 2024): the sum is divided by the norm of its column, a constant to the gradient, and multiplied by a
  trained magnitude, which is kept as its distance from the column's norm in W: zero at the start, whatever W is read.
* QLoRA (Dettmers et al. 2023): W is stored as `ops.quantized` says.

Shape legend: p inputs, c parts of a combined projection (q, k and v: 3; else 1), r rank, q outputs of a part.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from paxlike.layers.dropout import Dropout, noisy
from paxlike.ops import quantized
from paxlike.ops.matmul import matmul

PyTree = Any
KINDS = ("lora", "rslora", "dora")
BASES = (None, "int8", "nf4", "bfloat16")
NAME = "lora"  # of the adapter in the tree of parameters: `.../query/lora/a`
TRAINABLE = r"(^|/)lora/"  # what the optimizer trains


@dataclasses.dataclass(frozen=True)
class Lora:
    """What stands beside the weight of a `Linear`.

    Attributes:
      rank: columns of A.
      alpha: numerator of the scale; None is the rank, so that LoRA's scale is 1, as in Pax.
      kind: `lora`, `rslora` or `dora`.
      dropout: rate on what A reads; active where the model is given a `dropout` key, as in training.
      init: of A; `kaiming` is uniform within 1 / sqrt(p), as in PEFT, `base` is that of the weight, as in Pax.
      base: how the frozen weight is stored: None (float32), `bfloat16`, `int8` or `nf4`.
    """

    rank: int = 8
    alpha: float | None = None
    kind: str = "lora"
    dropout: float = 0.0
    init: str = "kaiming"
    base: str | None = None

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(
                f"LORA_RANK={self.rank} must be at least 1; USE_LORA=False trains without adapters"
            )
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"LORA_ALPHA={self.alpha} must be above 0, or None for the rank")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"LORA_DROPOUT={self.dropout} is not in [0, 1)")
        for name, value, known in (
            ("LORA_KIND", self.kind, KINDS),
            ("LORA_INIT", self.init, ("kaiming", "base")),
            ("LORA_BASE", self.base, BASES),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is none of {', '.join(map(str, known))}")

    @property
    def scale(self) -> float:
        """Factor of the adapter's output."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.kind == "rslora" else self.rank)


class Adapter(nn.Module):
    """Adds the adapter's part to what the frozen weight gives; made by `Linear`, under the name `lora`.

    Attributes:
      lora: rank, scale and kind.
      inputs, features: shape of the weight, `inputs + features`.
      axes: logical names of its dimensions. A leading feature without one counts parts with an A and a B each.
      kernel_init: initialiser of the weight, for `init="base"`.
      dtype: compute dtype; parameters are float32.
    """

    lora: Lora
    inputs: tuple[int, ...]
    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    kernel_init: Callable[..., jax.Array]
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "*rows p"], y: Float[Array, "..."], weight: quantized.Stored
    ) -> Float[Array, "..."]:
        lora, features = self.lora, self.features
        in_axes, out_axes = self.axes[: len(self.inputs)], self.axes[len(self.inputs) :]
        parts = features[:1] if len(features) > 1 and out_axes[0] is None else ()
        part_axes = (None,) * len(parts)
        a = self._parameter(
            "a",
            self._init_a,
            (*part_axes, *in_axes, None),
            (*parts, *self.inputs, lora.rank),
        )
        b = self._parameter(
            "b",
            nn.initializers.zeros,
            (*part_axes, None, *out_axes[len(parts) :]),
            (*parts, lora.rank, *features[len(parts) :]),
        )
        p, c = math.prod(self.inputs), math.prod(parts)
        a, b = a.reshape(c, p, lora.rank), b.reshape(c, lora.rank, -1)
        if lora.dropout and (noisy() or self.has_rng("dropout")):
            x = Dropout(lora.dropout, name="dropout")(x, train=True)
        y = y + (lora.scale * _thin(x, a.astype(self.dtype), b.astype(self.dtype))).reshape(y.shape)
        if lora.kind == "dora":
            distance = self._parameter("magnitude", nn.initializers.zeros, out_axes, features)
            wide = quantized.dequantize(weight).reshape(p, c, -1)
            before, after = _norms(jax.lax.stop_gradient((wide, a, b)), lora.scale)
            factor = (distance.reshape(before.shape) + before) / jnp.maximum(after, 1e-30)
            y = y * factor.reshape((1,) * (x.ndim - 1) + features).astype(y.dtype)
        return y

    def _parameter(self, name, init, axes, shape):
        # Over the width it is too small to be worth gathering, except A, which is as long as the weight.
        if name == "magnitude":
            axes = tuple("norm" if axis == "embed" else axis for axis in axes)
        return self.param(name, nn.with_logical_partitioning(init, tuple(axes)), shape, jnp.float32)

    def _init_a(self, key, shape, dtype):
        if self.lora.init == "base":
            return self.kernel_init(key, shape, dtype)
        bound = 1.0 / math.sqrt(math.prod(self.inputs))
        return jax.random.uniform(key, shape, dtype, -bound, bound)


def merge_lora(params: PyTree, lora: Lora) -> PyTree:
    """Parameters of the model without adapters that computes the same: each weight with its adapter added, in float32.

    `params` may have weights without adapters, and stacked or unstacked ones; a quantised weight is widened.

    Raises:
      ValueError: an adapter of another rank than `lora.rank`, or one without the magnitude that DoRA has.
    """
    if not isinstance(params, Mapping):
        return params
    if NAME not in params:
        if quantized.is_quantized(params):
            return quantized.dequantize(params)
        return {name: merge_lora(value, lora) for name, value in params.items()}
    rest = {name: value for name, value in params.items() if name not in (NAME, "kernel")}
    return {"kernel": _merged(params["kernel"], params[NAME], lora), **rest}


def base_of(params: PyTree) -> PyTree:
    """The tree of the base model, abstract: no adapters, and float32 in the place of quantised weights.

    `params` are arrays or abstract arrays; shardings are kept.
    """
    if quantized.is_quantized(params):
        stored = params["int8"] if "int8" in params else params["nf4"]
        return jax.ShapeDtypeStruct(
            quantized.shape_of(params), jnp.float32, sharding=getattr(stored, "sharding", None)
        )
    if isinstance(params, Mapping):
        return {name: base_of(value) for name, value in params.items() if name != NAME}
    sharding = getattr(params, "sharding", None)
    return jax.ShapeDtypeStruct(params.shape, params.dtype, sharding=sharding)


def adapters_of(params: PyTree) -> PyTree:
    """The adapters alone, in nested dictionaries; empty where there are none."""
    if not isinstance(params, Mapping) or quantized.is_quantized(params):
        return {}
    parts = {name: value if name == NAME else adapters_of(value) for name, value in params.items()}
    return {name: part for name, part in parts.items() if part}


def with_adapters(params: PyTree, adapters: PyTree) -> PyTree:
    """`params` with those `adapters` (as `adapters_of` gives them) in their places."""
    if not isinstance(params, Mapping) or quantized.is_quantized(params):
        return params
    return {
        name: adapters[name] if name == NAME else with_adapters(value, adapters.get(name, {}))
        for name, value in params.items()
    }


def adopt(base: PyTree, params: PyTree) -> PyTree:
    """`params` with the weights of `base`, the parameters of the model without adapters; adapters stay as they are.

    Each weight takes the dtype, the sharding and the 8 or 4 bits that it has in `params`.
    """
    if quantized.is_quantized(params):
        return jax.tree.map(_place, quantized.quantize_like(base, params), dict(params))
    if isinstance(params, Mapping):
        return {
            name: value if name == NAME else adopt(base[name], value)
            for name, value in params.items()
        }
    return _place(base, params)


def layout(a: tuple[int, ...], b: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, int, int]:
    """Numbers of stacked, of input and of part dimensions, from the shapes of A, of B and of the weight.

    Raises:
      ValueError: the three do not belong together.
    """
    lead = len(a) + len(b) - len(kernel) - 2
    num_inputs = len(a) - 1 - lead
    if lead >= 0 and num_inputs > 0 and a[:lead] == b[:lead] and a[-1] == b[lead]:
        inputs, outputs = a[lead:-1], b[lead + 1 :]
        if kernel == (*a[:lead], *inputs, *outputs):
            return lead, num_inputs, 0
        if lead and kernel == (*a[: lead - 1], *inputs, a[lead - 1], *outputs):
            return lead - 1, num_inputs, 1
    raise ValueError(f"an adapter of shapes {a} and {b} does not fit a weight of shape {kernel}")


def column_norms(kernel: quantized.Stored, a, b) -> Float[Array, "..."]:
    """Norms of the columns of the weight, stacked layers apart: what the magnitude of DoRA is counted from."""
    kernel = quantized.dequantize(kernel)
    stack, num_inputs, _ = layout(a.shape, b.shape, kernel.shape)
    return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=tuple(range(stack, stack + num_inputs))))


def _thin(x, a, b):
    """(x A) B: rows of x, (*rows, p), to (*rows, c, q)."""
    # A product for each part: one product with a batch of parts takes several times as long on a CPU.
    product = (
        matmul
        if x.ndim == 2
        else lambda x, w: jax.lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))
    )
    return jnp.stack([product(product(x, a[i]), b[i]) for i in range(a.shape[0])], axis=-2)


def _norms(weights, scale: float):
    """Norms (c, q) of the columns of W and of W + scale A B, without making the product.

    |w + s A b|^2 = |w|^2 + 2 s b . (A^T w) + s^2 b . (A^T A) b.
    """
    weight, a, b = weights
    square = jnp.sum(jnp.square(weight), axis=0)
    across = jax.lax.dot_general(a, weight, (((1,), (0,)), ((0,), (1,))))  # (c, r, q)
    gram = jax.lax.dot_general(a, a, (((1,), (1,)), ((0,), (0,))))
    inside = jax.lax.dot_general(gram, b, (((2,), (1,)), ((0,), (0,))))
    added = 2.0 * scale * jnp.sum(b * across, axis=1) + scale**2 * jnp.sum(b * inside, axis=1)
    return jnp.sqrt(square), jnp.sqrt(jnp.maximum(square + added, 0.0))


def _merged(kernel: quantized.Stored, adapter: Mapping[str, Any], lora: Lora) -> jax.Array:
    kernel = quantized.dequantize(kernel)
    a, b = (jnp.asarray(adapter[name], jnp.float32) for name in ("a", "b"))
    stack, num_inputs, parts = layout(a.shape, b.shape, kernel.shape)
    if a.shape[-1] != lora.rank:
        raise ValueError(f"LORA_RANK={lora.rank}, but the adapter has rank {a.shape[-1]}")
    if (lora.kind == "dora") != ("magnitude" in adapter):
        has = "a" if "magnitude" in adapter else "no"
        raise ValueError(f"LORA_KIND='{lora.kind}', but the adapter has {has} magnitude (DoRA)")
    lead = stack + parts
    batch = tuple(range(lead))
    delta = jax.lax.dot_general(a, b, (((a.ndim - 1,), (lead,)), (batch, batch)))
    if parts:  # from in front of the inputs to behind them
        delta = jnp.moveaxis(delta, stack, stack + num_inputs)
    merged = kernel + lora.scale * delta
    if lora.kind == "dora":
        summed = tuple(range(stack, stack + num_inputs))
        norm = jnp.sqrt(jnp.sum(jnp.square(merged), axis=summed))
        factor = (adapter["magnitude"] + column_norms(kernel, a, b)) / jnp.maximum(norm, 1e-30)
        merged = merged * jnp.expand_dims(factor, summed)
    return merged


def _place(value: jax.Array, like: Any) -> jax.Array:
    value = value.astype(like.dtype)
    sharding = getattr(like, "sharding", None)
    return value if sharding is None else jax.device_put(value, sharding)
