"""Which matrices an array of parameters is made of: what Muon and Adafactor have to know beside its shape.

A kernel of a stack, (layers, width, 3, heads, head size), is 3 x layers matrices of (width, heads x head size).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from paxlike import parallel

PyTree = Any

TABLE_NAMES = ("vocab", "position")  # a kernel with one of these is a table of vectors


@dataclasses.dataclass(frozen=True)
class Split:
    """The dimensions of an array that count its parts, and those of each part that are inputs and outputs.

    Attributes:
      stack: dimensions that count the parts.
      inputs, outputs: dimensions of one matrix; both () where a part is no matrix (a bias, the gain of a norm).
      is_table: one vector for each input, to be looked up: no linear map.
      place: where the array lies while it is updated; None where the compiler is left to choose.
    """

    stack: tuple[int, ...] = ()
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    is_table: bool = False
    place: NamedSharding | None = None

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Inputs and outputs of one matrix of an array of this shape; (1, 1) where it is none."""
        return math.prod(shape[i] for i in self.inputs), math.prod(shape[i] for i in self.outputs)

    def flat(self, x: Array) -> Float[Array, "n i o"]:
        """The matrices one after another."""
        order = (*self.stack, *self.inputs, *self.outputs)
        return x.transpose(order).reshape(-1, *self.sizes(x.shape))

    def unflat(self, x: Float[Array, "n i o"], shape: tuple[int, ...]) -> Array:
        """What `flat` was made of, with its old shape."""
        order = (*self.stack, *self.inputs, *self.outputs)
        back = tuple(order.index(i) for i in range(len(order)))
        return x.reshape(tuple(shape[i] for i in order)).transpose(back)


def split(leaf: Any) -> Split:
    """The matrices of a boxed array; of an array without a box: itself where it has two dimensions.

    An output dimension without a name, in front of others, counts parts: queries, keys and values of a combined
    projection are matrices of their own, as they are when they are not combined.
    """
    if isinstance(leaf, parallel.Kernel):
        rank = len(leaf.names)
        outputs = tuple(range(rank - leaf.num_outputs, rank))
        inputs = tuple(range(outputs[0] - leaf.num_inputs, outputs[0]))
        parts = outputs[:1] if len(outputs) > 1 and leaf.names[outputs[0]] is None else ()
        is_table = any(name in TABLE_NAMES for name in leaf.names)
        stack = (*range(inputs[0]), *parts)
        return Split(stack, inputs, outputs[len(parts) :], is_table)
    if is_box(leaf):
        names = getattr(leaf, "names", ())
        return Split(stack=tuple(i for i, name in enumerate(names) if name in parallel.STACKED))
    return Split((), (0,), (1,)) if leaf.ndim == 2 else Split()


def splits(params: PyTree) -> dict[str, Split]:
    """Path -> split of every parameter of a tree of boxes, or of bare arrays."""
    return {name: split(leaf) for name, leaf in named(params).items()}


def named(params: PyTree) -> dict[str, Any]:
    """Path, as `stack/period_0/mixer/qkv/kernel`, -> leaf; boxes are not looked into."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_box)
    return {path_name(path): leaf for path, leaf in leaves}


def path_name(path: tuple[Any, ...]) -> str:
    """The path of a leaf as it is shown to people and matched by regular expressions."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def map_named(function, tree: PyTree, *rest: PyTree) -> PyTree:
    """`function(path, leaf, ...)` over the leaves of `tree`; boxes are not looked into."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_name(path), *leaves), tree, *rest, is_leaf=is_box
    )


def is_box(leaf: Any) -> bool:
    """Whether `leaf` is an array in a box with its logical names."""
    return isinstance(leaf, nn.meta.AxisMetadata)


def unboxed(leaf: Any) -> Any:
    """The array; not by `unbox()`, which constrains it to a mesh axis of the logical name."""
    return leaf.value if is_box(leaf) else leaf


def without(leaf: Any, dims: tuple[int, ...], value: Any) -> Any:
    """`value`, which is what `leaf` is reduced to over `dims`, in the box that is left of its own."""
    if not is_box(leaf):
        return value
    names = tuple(name for i, name in enumerate(leaf.names) if i not in dims)
    return nn.LogicallyPartitioned(value, names)


Splits = Mapping[str, Split]
