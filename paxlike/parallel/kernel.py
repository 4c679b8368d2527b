"""Boxes of weights that are matrices: logical names, and which dimensions are inputs and which outputs.

The box of Flax names the dimensions of an array; an optimizer that works on matrices (Muon, Adafactor) has to know
also where the inputs end and the outputs begin in a kernel such as (layers, width, 3, heads, head size).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from flax import struct


class Kernel(nn.LogicallyPartitioned):
    """An array (stack..., inputs..., outputs...); what stands in front, such as `layers`, counts matrices.

    Attributes:
      num_inputs, num_outputs: how many of the last dimensions are inputs and outputs.
    """

    num_inputs: int = struct.field(default=1, pytree_node=False)
    num_outputs: int = struct.field(default=1, pytree_node=False)


def kernel_init(
    init: Callable[..., jax.Array],
    names: tuple[str | None, ...],
    *,
    num_inputs: int,
    num_stacked: int = 0,
) -> Callable[..., Any]:
    """`init` whose array comes in a `Kernel` with these logical names.

    The first `num_stacked` of them count matrices (experts), the next `num_inputs` are inputs.
    """

    def boxed(*args, **kwargs):
        return Kernel(
            init(*args, **kwargs),
            tuple(names),
            num_inputs=num_inputs,
            num_outputs=len(names) - num_stacked - num_inputs,
        )

    return boxed
