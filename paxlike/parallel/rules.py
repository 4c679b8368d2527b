"""Logical axis names, and the rules that map them to mesh axes.

Layers name the dimensions of their parameters and of their activations (`embed`, `heads`, `batch`, ...); these rules,
and nothing else, say over which mesh axis a name is spread. Weights and activations have different names for the same
dimension: under fsdp the width of a weight is sharded and that of an activation is not.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from paxlike import compat
from paxlike.nearest import did_you_mean
from paxlike.scoped import Scoped

MeshAxes = str | tuple[str, ...] | None
Rules = Mapping[str, MeshAxes]

DEFAULT_RULES: Rules = {
    # parameters
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "norm": None,
    "position": None,
    "layers": "pipeline",
    "whole_layers": None,  # of a stack in front of a pipeline
    "expert": "expert",
    "expert_embed": "fsdp",  # the width of expert weights; nothing where experts are over fsdp
    # activations
    "batch": ("pipeline", "data", "fsdp", "expert"),
    "length": "context",
    "residual_length": "context",  # SEQUENCE_PARALLEL: over tensor too
    "act_embed": None,
    "act_heads": "tensor",
    "act_mlp": "tensor",
    "act_vocab": "tensor",
    "whole_heads": ("tensor", "context"),  # where rows are whole and heads spread instead
    # of tokens, for the loss and for groups of tokens that are routed apart
    "batch_shards": ("context", "pipeline", "data", "fsdp", "expert"),
}


STACKED = ("layers", "whole_layers")  # names of the dimension that counts the layers of a stack


def rules_with(**changes: MeshAxes) -> Rules:
    """The default rules with some names spread otherwise."""
    unknown = changes.keys() - DEFAULT_RULES.keys()
    if unknown:
        raise ValueError(
            f"no rule for {sorted(unknown)} to change; the rules name {sorted(DEFAULT_RULES)}"
        )
    return {**DEFAULT_RULES, **changes}


_rules: Scoped[Rules] = Scoped("rules", DEFAULT_RULES)


@contextlib.contextmanager
def activate(mesh: jax.sharding.Mesh, rules: Rules | None = None) -> Iterator[None]:
    """Makes `mesh` and `rules` those that `shard` and every compilation inside refer to."""
    with _rules.set(DEFAULT_RULES if rules is None else rules), compat.set_mesh(mesh):
        yield


def current() -> Rules:
    """The rules in force."""
    return _rules.get()


def whole_rows(rules: Rules | None = None) -> Rules:
    """`rules` (the default ones where None) with every row whole: for decoding, which works token by token."""
    return {
        **(DEFAULT_RULES if rules is None else rules),
        "length": None,
        "residual_length": None,
    }


def spec(*names: str | None) -> P:
    """Partition spec of an array whose dimensions have these logical names, on the mesh in force.

    Mesh axes of size 1, or absent from the mesh, are left out. ValueError for an unknown name and for two dimensions
    on one mesh axis.
    """
    return P(*_mesh_axes(names, compat.current_mesh_shape()))


def shard(x: jax.Array, *names: str | None) -> jax.Array:
    """`x`, constrained to the sharding that its logical names ask for; unchanged outside a mesh."""
    if x.ndim != len(names):
        raise ValueError(
            f"an array of shape {x.shape} cannot have the {len(names)} axis names {names}"
        )
    sizes = compat.current_mesh_shape()
    if math.prod(sizes.values()) <= 1:
        return x
    return jax.lax.with_sharding_constraint(x, P(*_mesh_axes(names, sizes)))


def towards(place: NamedSharding, shape: tuple[int, ...], dim: int) -> list[NamedSharding]:
    """Shardings from `place` to one whose dimension `dim` carries all mesh axes that divide it, for work on its parts.

    One axis moves from each to the next, which the compiler can do by an exchange without gathering the array; an axis
    that does not divide the dimension stays where it is.
    """
    sizes = dict(place.mesh.shape)
    spec = [_as_tuple(axes) for axes in (*place.spec, *(None,) * (len(shape) - len(place.spec)))]

    def fits(axis: str) -> bool:
        return shape[dim] % math.prod(sizes[a] for a in (*spec[dim], axis)) == 0

    def here() -> NamedSharding:
        return NamedSharding(place.mesh, P(*(axes or None for axes in spec)))

    path = [place]
    for d in range(len(shape)):
        for axis in reversed(spec[d] if d != dim else ()):
            if fits(axis):
                spec[d] = tuple(a for a in spec[d] if a != axis)
                spec[dim] = (*spec[dim], axis)
                path.append(here())
    before = spec[dim]
    for axis in sizes:
        if sizes[axis] > 1 and not any(axis in axes for axes in spec) and fits(axis):
            spec[dim] = (*spec[dim], axis)
    return path if spec[dim] == before else [*path, here()]


def named_sharding(
    mesh: jax.sharding.Mesh, names: tuple[str | None, ...], rules: Rules | None = None
) -> NamedSharding:
    """The sharding of an array with these logical names on `mesh`, by `rules` or those in force."""
    return NamedSharding(mesh, P(*_mesh_axes(names, dict(mesh.shape), rules)))


def num_shards(name: str) -> int:
    """Number of parts into which the dimension called `name` is split on the mesh in force."""
    return size_of(mesh_axes(name), compat.current_mesh_shape())


def mesh_axes(name: str) -> tuple[str, ...]:
    """Mesh axes, larger than 1, over which the dimension called `name` is spread on the mesh in force."""
    return axes_of(name, compat.current_mesh_shape(), _rules.get())


def axes_of(name: str, sizes: Mapping[str, int], rules: Rules | None = None) -> tuple[str, ...]:
    """As `mesh_axes`, for a mesh of these `sizes` under `rules` (the default ones where None)."""
    axes = _as_tuple((DEFAULT_RULES if rules is None else rules).get(name))
    return tuple(axis for axis in axes if sizes.get(axis, 1) > 1)


def size_of(axes: tuple[str, ...], sizes: Mapping[str, int]) -> int:
    """Devices along all of `axes`."""
    return math.prod(sizes[axis] for axis in axes)


def check_axes(axes: Iterable[str], rules: Rules | None = None) -> None:
    """Raises ValueError for a mesh axis over which nothing is spread: its devices would all do the same work."""
    known = {
        axis
        for spread in (DEFAULT_RULES if rules is None else rules).values()
        for axis in _as_tuple(spread)
    }
    for axis in axes:
        if axis not in known:
            near = did_you_mean({"replica": "data", "mdl": "tensor"}.get(axis, axis), known)
            raise ValueError(
                f"MESH_AXES: nothing is spread over the axis '{axis}'; the axes are {', '.join(sorted(known))}{near}"
            )


def check_divisible(
    names: tuple[str | None, ...],
    shape: tuple[int, ...],
    sizes: Mapping[str, int],
    what: str,
    rules: Rules | None = None,
) -> None:
    """Raises one line that names the numbers where a dimension of `shape` does not divide over its mesh axes."""
    rules = _rules.get() if rules is None else rules
    for name, size in zip(names, shape, strict=True):
        axes = _as_tuple(rules.get(name) if name else None)
        parts = math.prod(sizes.get(axis, 1) for axis in axes)
        if size % parts:
            fits = [n for n in range(1, parts + 1) if size % n == 0 and parts % n == 0]
            raise ValueError(
                f"{what}: its dimension '{name}' = {size} does not divide over the mesh axis {'x'.join(axes)} = "
                f"{parts}; use {'x'.join(axes)} = {max(fits)}, or a '{name}' that is a multiple of {parts}"
            )


def _mesh_axes(
    names: tuple[str | None, ...], sizes: Mapping[str, int], rules: Rules | None = None
) -> list[MeshAxes]:
    rules = _rules.get() if rules is None else rules
    result: list[MeshAxes] = []
    taken: dict[str, str | None] = {}
    for name in names:
        if name is not None and name not in rules:
            raise ValueError(
                f"no rule for the logical axis '{name}'; the rules name {sorted(rules)}"
            )
        axes = tuple(a for a in _as_tuple(rules.get(name) if name else None) if sizes.get(a, 1) > 1)
        for axis in axes:
            if axis in taken:
                raise ValueError(
                    f"'{taken[axis]}' and '{name}' of one array are both on the mesh axis '{axis}'"
                )
            taken[axis] = name
        result.append(axes[0] if len(axes) == 1 else axes or None)
    return result


def _as_tuple(axes: MeshAxes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
