"""A picture of who holds what: the parts of parameters, optimizer state and activations on the devices of a mesh.

Drawn from the shardings of the step that is planned, so it is never out of date.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from paxlike import parallel

MAX_DEVICES = 32
COLUMNS = 4


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of the picture; `names` of its dimensions may be empty."""

    title: str
    shape: tuple[int, ...]
    sharding: NamedSharding
    itemsize: int


@dataclasses.dataclass(frozen=True)
class Part:
    """A block of an array, in shares of its two shown dimensions, and the devices that hold it."""

    left: float
    bottom: float
    width: float
    height: float
    devices: tuple[int, ...]


def arrays_of(abstract: Any, spec: Any, mesh: jax.sharding.Mesh, dtype: str) -> list[Array]:
    """Tables and kernels of the first block, a moment, and activations of a step; rules and mesh must be in force."""
    found: list[Array] = []
    leaves = jax.tree_util.tree_leaves_with_path(abstract.params)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    chosen = [n for n in named if n.endswith("table")]
    chosen += [n for n in named if n.endswith("kernel") and "/period_0/" in n]
    for name in chosen:
        leaf = named[name]
        found.append(Array(_short(name), leaf.shape, leaf.sharding, leaf.dtype.itemsize))
    last = named[chosen[-1]]
    for leaf in jax.tree.leaves(abstract.opt_state):
        if leaf.shape == last.shape:
            title = f"optimizer state of {_short(chosen[-1])}"
            found.append(Array(title, leaf.shape, leaf.sharding, leaf.dtype.itemsize))
            break
    tokens = spec["tokens"]
    found.append(Array("token ids", tokens.shape, tokens.sharding, tokens.dtype.itemsize))
    width = named[chosen[0]].shape[-1]
    size = np.dtype(jax.numpy.dtype(dtype)).itemsize
    for title, axes in (
        ("residual stream", ("batch", "residual_length", "act_embed")),
        ("inside heads and feed-forward", ("batch", "length", "act_mlp")),
    ):
        place = parallel.named_sharding(mesh, axes)
        found.append(Array(title, (*tokens.shape, width), place, size))
    return found


def parts_of(array: Array) -> tuple[list[Part], tuple[int, int], dict[int, int]]:
    """The blocks of an array, which two dimensions they are shown in, and into how many parts others are cut."""
    order = {device: number for number, device in enumerate(array.sharding.mesh.devices.flat)}
    held: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
    for device, index in array.sharding.devices_indices_map(array.shape).items():
        block = (s.indices(n)[:2] for s, n in zip(index, array.shape, strict=True))
        held[tuple(block)].append(order[device])
    cut = [len({bounds[dim] for bounds in held}) for dim in range(len(array.shape))]
    by_cut = sorted(range(len(cut)), key=lambda dim: (-min(cut[dim], 2), -array.shape[dim]))
    rows, columns = sorted(by_cut[:2])
    parts = []
    for bounds, devices in held.items():
        (top, down), (left, right) = (
            (a / array.shape[dim], b / array.shape[dim])
            for dim, (a, b) in ((rows, bounds[rows]), (columns, bounds[columns]))
        )
        parts.append(Part(left, 1 - down, right - left, down - top, tuple(sorted(devices))))
    hidden = {dim: n for dim, n in enumerate(cut) if n > 1 and dim not in (rows, columns)}
    return _joined(parts), (rows, columns), hidden


def draw(arrays: Sequence[Array], mesh: jax.sharding.Mesh, heading: str, path: Path) -> None:
    """Writes the picture; ValueError where there are too many devices to tell apart."""
    if mesh.size > MAX_DEVICES:
        raise ValueError(
            f"--plan_picture shows at most {MAX_DEVICES} devices and the mesh has {mesh.size}: draw a smaller mesh of "
            "the same axes"
        )
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = pyplot.get_cmap("tab20" if mesh.size > 10 else "tab10")
    rows = math.ceil(len(arrays) / COLUMNS)
    figure, grid = pyplot.subplots(
        rows, COLUMNS, figsize=(3.2 * COLUMNS, 3.0 * rows), layout="constrained", squeeze=False
    )
    for axes, array in zip(grid.flat, arrays, strict=False):
        parts, shown, hidden = parts_of(array)
        for part in parts:
            colour = colours(part.devices[0] % colours.N)
            shape = (part.left, part.bottom), part.width, part.height
            axes.add_patch(
                pyplot.Rectangle(*shape, facecolor=colour, edgecolor="white", alpha=0.75)
            )
            text = _devices(part.devices, mesh.size)
            axes.text(
                part.left + part.width / 2,
                part.bottom + part.height / 2,
                text,
                ha="center",
                va="center",
                fontsize=8 if part.width * 20 > len(text) else 6,
                rotation=90 if part.width < part.height / 3 else 0,
            )
        share = array.itemsize * math.prod(array.sharding.shard_shape(array.shape))
        title = f"{array.title}\n{list(array.shape)}, {_bytes(share)} a device"
        for dim, count in hidden.items():
            title += f"\nnot shown: dimension {dim} in {count} parts"
        axes.set_title(title, fontsize=9)
        axes.set_ylabel(f"dimension {shown[0]}: {array.shape[shown[0]]:,}", fontsize=8)
        axes.set_xlabel(f"dimension {shown[1]}: {array.shape[shown[1]]:,}", fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
    for axes in list(grid.flat)[len(arrays) :]:
        axes.set_visible(False)
    figure.suptitle(heading, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Blocks that lie at one place, of dimensions that are not shown, as one with the devices of all."""
    there: dict[tuple[float, float, float, float], list[int]] = defaultdict(list)
    for part in parts:
        there[part.left, part.bottom, part.width, part.height] += part.devices
    return [
        Part(left, bottom, width, height, tuple(sorted(devices)))
        for (left, bottom, width, height), devices in there.items()
    ]


def _devices(devices: tuple[int, ...], count: int) -> str:
    """`0-3`, `0 4`, `all`."""
    if len(devices) == count:
        return "all"
    runs: list[list[int]] = []
    for device in devices:
        if runs and device == runs[-1][-1] + 1:
            runs[-1].append(device)
        else:
            runs.append([device])
    return " ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.3g} {unit}"


def _short(name: str) -> str:
    parts = name.removeprefix("params/").split("/")
    return "/".join(part for part in parts if part not in ("stack", "period_0"))
