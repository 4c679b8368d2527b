"""Tokens and experts on a mesh: groups of tokens lie over the batch axes, experts over some of the same axes.

To get to their experts, tokens change hands along the axes of the experts, and back: two all-to-alls, which the
compiler makes of two constraints (GShard, Lepikhin et al. 2020, section 3.3).

Shape legend: g groups of tokens, e experts, c places of an expert for a group, d width.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from paxlike import compat
from paxlike.parallel import rules as _rules

AXIS = "expert"  # of the mesh, and the logical name of the dimension that counts experts


def expert_axes() -> tuple[str, ...]:
    """Mesh axes over which experts are spread."""
    return _rules.mesh_axes(AXIS)


def check_experts(
    num_experts: int, sizes: Mapping[str, int], rules: _rules.Rules | None = None
) -> None:
    """Raises one line where experts do not divide over a mesh of `sizes`."""
    over = _rules.axes_of(AXIS, sizes, rules)
    parts = _rules.size_of(over, sizes)
    if num_experts % parts:
        fits = max(n for n in range(1, parts + 1) if num_experts % n == 0)
        raise ValueError(
            f"NUM_EXPERTS={num_experts} does not divide over {' x '.join(over)} = {parts}; use {fits} devices there, "
            f"or a multiple of {parts} experts"
        )


def over_groups(x: jax.Array) -> jax.Array:
    """(g, ...), its groups over the batch axes."""
    return _held(x, _group_axes(x.shape[0]))


def to_experts(x: Float[Array, "g e c d"]) -> Float[Array, "e gc d"]:
    """What each expert is given by all groups."""
    g, e, c, d = x.shape
    width = _width_axes(d)
    x = _held(x, _group_axes(g), (), (), width)
    x = _held(x, _rest(g), expert_axes(), (), width)
    # Whole along the width only now: devices that share the rest do not all send the same.
    x = _held(x, _rest(g), expert_axes())
    return x.swapaxes(0, 1).reshape(e, g * c, d)


def from_experts(y: Float[Array, "e gc d"], num_groups: int) -> Float[Array, "g e c d"]:
    """The inverse of `to_experts`."""
    e, gc, d = y.shape
    width = _width_axes(d)
    y = y.reshape(e, num_groups, gc // num_groups, d).swapaxes(0, 1)
    y = _held(y, _rest(num_groups), expert_axes(), (), width)
    y = _held(y, _group_axes(num_groups), (), (), width)
    return over_groups(y)


def on_experts(h: Float[Array, "e gc f"], num_groups: int, name: str) -> Float[Array, "e gc f"]:
    """What experts compute with, its last dimension called `name`."""
    return _held(h, expert_axes(), _rest(num_groups), _rules.mesh_axes(name))


def _held(x: jax.Array, *axes: tuple[str, ...]) -> jax.Array:
    if not compat.current_mesh_shape() or not any(
        size > 1 for size in compat.current_mesh_shape().values()
    ):
        return x
    spec = [a or None for a in axes] + [None] * (x.ndim - len(axes))
    return jax.lax.with_sharding_constraint(x, P(*spec))


def _group_axes(num_groups: int) -> tuple[str, ...]:
    """Batch axes over which so many groups divide."""
    sizes = compat.current_mesh_shape()
    axes: list[str] = []
    for axis in _rules.mesh_axes("batch_shards"):
        if num_groups % _rules.size_of((*axes, axis), sizes) == 0:
            axes.append(axis)
    return tuple(axes)


def _width_axes(width: int) -> tuple[str, ...]:
    """Axes over which the hidden features of experts are spread, where they divide the width, too."""
    axes = _rules.mesh_axes("mlp")
    return axes if width % _rules.size_of(axes, compat.current_mesh_shape()) == 0 else ()


def _rest(num_groups: int) -> tuple[str, ...]:
    return tuple(axis for axis in _group_axes(num_groups) if axis not in expert_axes())
