"""The weights of many experts as one: a matrix for each, multiplied with the rows that the expert was given.

As `Linear` is for all other weights, this is the one place where the weights of experts are multiplied: in 8 bits
(`ops.fp8`) where that is asked for, and adapters (`layers.lora`) stand beside.

Shape legend: e experts, n rows, p inputs, q outputs, r rank.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from paxlike import parallel
from paxlike.layers import lora
from paxlike.layers.linear import Initializer
from paxlike.ops import fp8
from paxlike.ops.fp8 import Fp8
from paxlike.ops.grouped import grouped_matmul, grouped_matmul_fp8, grouped_matmul_reference


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Matrices:
    """The weights of all experts, or of those of a device, in the compute dtype (or where they lie: specs).

    Attributes:
      kernel: one matrix each, (e, p, q).
      a, b: their adapters (e, p, r) and (e, r, q), with the scale in b; None for none.
      peaks: amax of input, weight and gradient that the scales of 8 bits are made of (3,), or (1, 3) where each device
        has its own copy; None: those of the tensors themselves.
      fp8: how the kernel is multiplied in 8 bits; None: in its own dtype.
      axes: of the mesh, over which the rows and matrices of a device's experts are spread.
      share: one row in so many is for these experts, about; the others are for those of other devices.
    """

    kernel: Any
    a: Any = None
    b: Any = None
    peaks: Any = None
    fp8: Fp8 | None = dataclasses.field(default=None, metadata={"static": True})
    axes: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})
    share: int = dataclasses.field(default=1, metadata={"static": True})

    def grouped(
        self, x: Float[Array, "n p"], sizes: Int[Array, "e"], *, reference: bool = False
    ) -> Float[Array, "n q"]:
        """The first sizes[0] rows of x times the first matrix, and so on."""
        plain = functools.partial(grouped_matmul, share=self.share)
        product = grouped_matmul_reference if reference else plain
        if self.fp8 is None or reference:
            y = product(x, self.kernel, sizes)
        else:
            peaks = None if self.peaks is None else self.peaks.reshape(3)
            margin, axes = self.fp8.margin, self.axes
            y = grouped_matmul_fp8(x, self.kernel, sizes, peaks, margin, axes, self.share)
        if self.a is not None and self.b is not None:
            y = y + product(product(x, self.a, sizes), self.b, sizes)
        return y


class ExpertLinear(nn.Module):
    """y = x W with another W for each expert; W is (experts, inputs, features).

    Attributes:
      axes: logical names of inputs and outputs.
      kernel_init: initialiser, given the whole shape.
      dtype: compute dtype; parameters are float32.
      dot_general_cls: makes what stands in for `jax.lax.dot_general`; an `Fp8` where rows are sorted by expert.
      adapter: low-rank weights beside each matrix, which is then frozen.
    """

    num_experts: int
    inputs: int
    features: int
    axes: tuple[str, str]
    kernel_init: Initializer = nn.initializers.normal(0.02)
    dtype: str = "float32"
    dot_general_cls: Any = None
    adapter: lora.Lora | None = None

    def setup(self):
        if self.adapter is not None:
            _check(self.adapter)
        base = None if self.adapter is None else self.adapter.base
        names = (parallel.EXPERT, *self.axes)
        init = parallel.kernel_init(self.kernel_init, names, num_inputs=1, num_stacked=1)
        shape = (self.num_experts, self.inputs, self.features)
        self.kernel = self.param("kernel", init, shape, jnp.dtype(base or "float32"))
        if self.adapter is not None:
            self.lora = _Adapter(self.adapter, shape, names, self.kernel_init)
        if self.dot_general_cls is not None:
            self.fp8 = self.dot_general_cls()

    def __call__(self, x: Float[Array, "e n p"]) -> Float[Array, "e n q"]:
        """As many rows for each expert."""
        weights = self.matrices(wide=True)
        dot_general = jax.lax.dot_general if self.dot_general_cls is None else self.fp8
        contraction = (((2,), (1,)), ((0,), (0,)))
        y = dot_general(x.astype(self.dtype), weights.kernel, contraction, precision=None)
        if weights.a is not None and weights.b is not None:
            thin = jax.lax.dot_general(x.astype(self.dtype), weights.a, contraction)
            y = y + jax.lax.dot_general(thin, weights.b, contraction)
        return y

    def create(self) -> None:
        """Makes the parameters, and the state of what multiplies; for initialisation."""
        self(jnp.zeros((self.num_experts, 1, self.inputs), self.dtype))

    def matrices(self, *, wide: bool = False) -> Matrices:
        """The weights in the compute dtype, whole along the width; `wide` ones are not multiplied in 8 bits."""
        kernel = self.kernel.astype(self.dtype)
        if parallel.num_shards("expert_embed") > 1:
            names = (None if name == "expert_embed" else name for name in self.axes)
            kernel = parallel.shard(kernel, parallel.EXPERT, *names)
        found = Matrices(kernel)
        if self.dot_general_cls is not None and not wide:
            fp8.check_sizes("/".join(self.path), kernel.shape[1:])
            fp8.check_hardware()
            found = Matrices(kernel, peaks=self.fp8.peaks(), fp8=self.dot_general_cls)
        if self.adapter is None:
            return found
        a, b = self.lora()
        scaled = (self.adapter.scale * b).astype(self.dtype)
        return dataclasses.replace(found, a=a.astype(self.dtype), b=scaled)


class _Adapter(nn.Module):
    """A and B of every expert."""

    lora: lora.Lora
    shape: tuple[int, int, int]
    axes: tuple[str, str, str]
    kernel_init: Callable[..., jax.Array]

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        (e, p, q), (expert, inputs, outputs) = self.shape, self.axes
        # Too small along the width to be worth gathering.
        names = {"expert_embed": "norm"}
        inputs, outputs = names.get(inputs, inputs), names.get(outputs, outputs)
        boxed = nn.with_logical_partitioning
        bound = 1.0 / math.sqrt(p)
        uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
        init_a = self.kernel_init if self.lora.init == "base" else uniform
        r = self.lora.rank
        a = self.param("a", boxed(init_a, (expert, inputs, None)), (e, p, r), jnp.float32)
        zeros = nn.initializers.zeros
        b = self.param("b", boxed(zeros, (expert, None, outputs)), (e, r, q), jnp.float32)
        return a, b


def _check(adapter: lora.Lora) -> None:
    """Refuses what experts do not have."""
    if adapter.kind == "dora":
        raise ValueError("LORA_KIND='dora' has no form for experts: use lora or rslora there")
    if adapter.base not in (None, "bfloat16"):
        raise ValueError(
            f"LORA_BASE='{adapter.base}' has no form for experts: use bfloat16 or None there"
        )
    if adapter.dropout:
        raise ValueError(
            f"LORA_DROPOUT={adapter.dropout} has no form for experts: set it to 0, or adapt attention only"
        )
