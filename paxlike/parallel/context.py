"""Rows that are spread over devices: context parallelism (long rows) and sequence parallelism (the residual stream).

Context parallelism spreads the tokens of a row over the mesh axis of `length`. A causal token attends to what is before
it, so the device with the end of a row would have most of the work; in the zig-zag order device i of c holds the chunks
i and 2c-1-i of 2c, and all have the same. The order is made once a step, of token ids and the like: what a layer
computes for each token does not depend on it, and attention knows it.

Sequence parallelism (Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, section 4.2.2) spreads the length of
the residual stream over the tensor axis too, where norms and dropout would otherwise do the same work on every device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from paxlike import compat
from paxlike.parallel import rules as _rules

KINDS = ("ring", "all_gather", "all_to_all")


@dataclasses.dataclass(frozen=True)
class Context:
    """How rows are spread over a mesh axis.

    Attributes:
      kind: how a query meets the keys of other devices. `ring`: keys and values travel from device to device;
        `all_gather`: each device gathers them all; `all_to_all`: each device gets whole rows of some of the heads
        (DeepSpeed-Ulysses, Jacobs et al. 2023).
      axis: name of the mesh axis.
      parts: its size.
    """

    kind: str
    axis: str
    parts: int

    @property
    def is_zigzag(self) -> bool:
        """Whether the tokens of a row are in the zig-zag order."""
        return self.kind != "all_to_all"

    def places(self, length: int) -> np.ndarray:
        """Place in its row of each token, (s,) int32, in the order in which the tokens stand.

        >>> Context("ring", "context", 2).places(8).tolist()
        [0, 1, 6, 7, 2, 3, 4, 5]
        """
        return np.arange(length, dtype=np.int32).reshape(self._num_chunks, -1)[self._order].ravel()

    def arrange(self, x: jax.Array) -> jax.Array:
        """`x` (b, s, ...), from the order of the row to that of `places`."""
        return self._take(x, self._order)

    def restore(self, x: jax.Array) -> jax.Array:
        """The inverse of `arrange`."""
        return self._take(x, np.argsort(self._order))

    @property
    def _num_chunks(self) -> int:
        return 2 * self.parts if self.is_zigzag else self.parts

    @property
    def _order(self) -> np.ndarray:
        """Chunks in the order of the devices that hold them."""
        if not self.is_zigzag:
            return np.arange(self.parts)
        first = np.arange(self.parts)
        return np.stack([first, 2 * self.parts - 1 - first], axis=1).ravel()

    def _take(self, x, order):
        if not self.is_zigzag:
            return x
        b, s, *rest = x.shape
        chunks = x.reshape(b, len(order), s // len(order), *rest)
        return jnp.take(chunks, order, axis=1).reshape(x.shape)


def current_context(kind: str) -> Context | None:
    """How rows are spread on the mesh in force; None where they are whole.

    Raises:
      ValueError: an unknown `kind`, or a rule that spreads `length` over several axes.
    """
    if kind not in KINDS:
        raise ValueError(f"CONTEXT_PARALLEL='{kind}' is none of {', '.join(KINDS)}")
    axes = _rules.mesh_axes("length")
    if not axes:
        return None
    if len(axes) > 1:
        raise ValueError(f"a row can be spread over one mesh axis, not over {', '.join(axes)}")
    return Context(kind, axes[0], _rules.num_shards("length"))


def check_length(
    length: int, kind: str, sizes: Mapping[str, int], rules: _rules.Rules | None = None
) -> None:
    """Raises one line where rows of `length` tokens do not divide over a mesh of `sizes`."""
    over = _rules.axes_of("length", sizes, rules)
    parts = _rules.size_of(over, sizes)
    if parts > 1:
        needed = parts if kind == "all_to_all" else 2 * parts
        what = f"{over[0]} = {parts}" if needed == parts else f"2 x {over[0]} = {needed}"
        _check_multiple(length, needed, what, f"CONTEXT_PARALLEL={kind}")
    over = _rules.axes_of("residual_length", sizes, rules)
    if (needed := _rules.size_of(over, sizes)) > parts:
        _check_multiple(length, needed, f"{' x '.join(over)} = {needed}", "SEQUENCE_PARALLEL")


def check_current_length(length: int, kind: str) -> None:
    """`check_length` on the mesh in force."""
    check_length(length, kind, compat.current_mesh_shape(), _rules.current())


def _check_multiple(length: int, parts: int, what: str, why: str) -> None:
    if length % parts:
        nearest = max(1, round(length / parts)) * parts
        raise ValueError(
            f"MAX_SEQ_LEN={length} does not divide into {what} parts ({why}); the nearest that does is {nearest}"
        )


def gather_length(x: jax.Array) -> jax.Array:
    """The residual stream (b, s, d) for a layer that reads whole rows (of its context shard) on every tensor shard.

    Forward gathers, backward reduces and scatters. Without sequence parallelism nothing happens.
    """
    return _gather(x) if _is_spread() else x


def scatter_length(y: jax.Array) -> jax.Array:
    """What a layer adds to the residual stream (b, s, d): each device keeps its part of the sum over tensor shards.

    Forward reduces and scatters, backward gathers. Without sequence parallelism it only constrains.
    """
    return _scatter(y) if _is_spread() else _rules.shard(y, *_WHOLE)


_WHOLE = ("batch", "length", "act_embed")
_PART = ("batch", "residual_length", "act_embed")


def _is_spread() -> bool:
    return _rules.num_shards("residual_length") != _rules.num_shards("length")


# With rules for both directions: the transpose of a constraint asks for the same sharding, so a sum over the tensor
# axis would be made on every device before each keeps its part of it.
@jax.custom_vjp
def _gather(x):
    return _rules.shard(_rules.shard(x, *_PART), *_WHOLE)


@jax.custom_vjp
def _scatter(y):
    return _rules.shard(y, *_PART)


_gather.defvjp(lambda x: (_gather(x), None), lambda _, dy: (_rules.shard(dy, *_PART),))
_scatter.defvjp(lambda y: (_scatter(y), None), lambda _, dy: (_gather(dy),))
