"""The device mesh: which devices hold which part of the batch and of the parameters.

A mesh is the elementwise product of two shapes: `ici` inside a node (fast links) and `dcn` across nodes (slow
links). `ici=[1, 8, 1], dcn=[1, 32, 1]` over the axes `[data, fsdp, tensor]` is fsdp over 256 devices in 32 nodes.
"""

from __future__ import annotations

import dataclasses
import fractions
import itertools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

from paxlike import compat

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("pipeline", "data", "fsdp", "expert")  # over which the rows of a batch are spread


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Shape of a device mesh, before any device is known.

    Attributes:
      ici: size of each axis inside a node; one of them may be -1, for all devices that the others leave.
      dcn: size of each axis across nodes; `()` means 1 everywhere.
      axes: names of the axes, outermost (slowest) first.
    """

    ici: tuple[int, ...] = (1, 1, 1)
    dcn: tuple[int, ...] = ()
    axes: tuple[str, ...] = AXES

    def __post_init__(self):
        dcn = tuple(self.dcn) or (1,) * len(self.ici)
        object.__setattr__(self, "ici", tuple(self.ici))
        object.__setattr__(self, "dcn", dcn)
        object.__setattr__(self, "axes", tuple(self.axes))
        if len(set(self.axes)) < len(self.axes):
            raise ValueError(
                f"MESH_AXES={list(self.axes)} names an axis twice: each has a name of its own, as in {list(AXES)}"
            )
        if not len(self.ici) == len(dcn) == len(self.axes):
            raise ValueError(
                f"ICI_MESH_SHAPE={list(self.ici)} and DCN_MESH_SHAPE={list(dcn)} need one entry for each of the "
                f"axes {list(self.axes)}"
            )
        if (
            any(n < 1 for n in dcn)
            or any(n < 1 and n != -1 for n in self.ici)
            or self.ici.count(-1) > 1
        ):
            raise ValueError(
                f"mesh sizes must be at least 1 (one of ICI_MESH_SHAPE may be -1: what is left), got "
                f"ICI_MESH_SHAPE={list(self.ici)}, DCN_MESH_SHAPE={list(dcn)}"
            )

    @property
    def shape(self) -> dict[str, int]:
        """Size of each axis over all nodes."""
        return {axis: i * d for axis, i, d in zip(self.axes, self.ici, self.dcn, strict=True)}

    @property
    def num_devices(self) -> int:
        """Devices that the mesh takes."""
        return math.prod(self.shape.values())

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """Axes of this mesh over which the rows of a batch are spread."""
        return tuple(axis for axis in BATCH_AXES if axis in self.axes)

    @property
    def num_batch_shards(self) -> int:
        """Parts into which the rows of a batch are split."""
        return math.prod(self.shape.get(axis, 1) for axis in BATCH_AXES)

    def resolve(self, num_devices: int) -> Mesh:
        """This mesh with -1 replaced by what `num_devices` leave for it."""
        if -1 not in self.ici:
            return self
        others = -math.prod(self.ici) * math.prod(self.dcn)
        if num_devices % others:
            raise ValueError(
                f"{num_devices} devices do not divide by {others}, the sizes that ICI_MESH_SHAPE={list(self.ici)} and "
                f"DCN_MESH_SHAPE={list(self.dcn)} fix"
            )
        ici = tuple(num_devices // others if n == -1 else n for n in self.ici)
        return dataclasses.replace(self, ici=ici)

    def global_batch_size(self, percore_batch_size: float) -> int:
        """Rows of one step: `percore_batch_size` (may be a fraction) x devices; ValueError where it is not whole."""
        if not math.isfinite(percore_batch_size):
            raise ValueError(f"PERCORE_BATCH_SIZE={percore_batch_size} is not a number of rows")
        exact = fractions.Fraction(percore_batch_size).limit_denominator(1 << 20) * self.num_devices
        shards = self.num_batch_shards
        if exact.denominator != 1 or exact < 1 or exact.numerator % shards:
            nearest = max(1, round(exact / shards)) * shards
            raise ValueError(
                f"PERCORE_BATCH_SIZE={percore_batch_size} x {self.num_devices} devices = {float(exact):g} rows do not "
                f"divide over {' x '.join(self.batch_axes)} = {shards}; the nearest that fits is "
                f"PERCORE_BATCH_SIZE={_shortest(nearest, self.num_devices)} ({nearest} rows)"
            )
        return exact.numerator

    def check_devices(self, num_devices: int) -> None:
        """Raises ValueError, naming the nearest mesh that fits, unless the mesh takes exactly `num_devices`."""
        if self.num_devices != num_devices:
            raise ValueError(
                f"the mesh {_describe(self.shape)} needs {self.num_devices} devices (ICI_MESH_SHAPE={list(self.ici)} x "
                f"DCN_MESH_SHAPE={list(self.dcn)}) but there are {num_devices}; the nearest that fits is "
                f"ICI_MESH_SHAPE={list(_nearest(tuple(self.shape.values()), num_devices))}, "
                f"DCN_MESH_SHAPE={[1] * len(self.axes)}".replace(" ,", ",")
            )

    def build(self, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
        """The jax mesh over `devices` (default: all), dcn axes laid across nodes.

        Raises:
          ValueError: wrong number of devices, or nodes that the dcn shape does not match.
        """
        devices = list(jax.devices() if devices is None else devices)
        self.check_devices(len(devices))
        nodes = _nodes(devices)
        if math.prod(self.dcn) == 1 or len(nodes) == 1:
            array = _device_array(tuple(self.shape.values()), devices)
            return compat.auto_mesh(array, self.axes)
        if len(nodes) != math.prod(self.dcn):
            raise ValueError(
                f"DCN_MESH_SHAPE={list(self.dcn)} spans {math.prod(self.dcn)} nodes but the devices are in "
                f"{len(nodes)} nodes of {len(nodes[0])}"
            )
        inside = np.stack([_device_array(self.ici, node) for node in nodes])
        grid = inside.reshape(self.dcn + self.ici)
        rank = len(self.axes)
        order = list(itertools.chain.from_iterable((i, rank + i) for i in range(rank)))
        return compat.auto_mesh(
            grid.transpose(order).reshape(tuple(self.shape.values())), self.axes
        )


def _nodes(devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """Devices grouped by the node that holds them: the accelerator's slice where it tells, else the process."""

    def key(device):
        slice_index = getattr(device, "slice_index", None)
        return device.process_index if slice_index is None else slice_index

    ordered = sorted(devices, key=lambda device: (key(device), device.process_index, device.id))
    return [list(group) for _, group in itertools.groupby(ordered, key)]


def _device_array(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    if devices[0].platform == "tpu":
        return mesh_utils.create_device_mesh(shape, devices)
    return np.array(devices, dtype=object).reshape(shape)


def _nearest(shape: tuple[int, ...], num_devices: int) -> tuple[int, ...]:
    """The factorisation of `num_devices` whose axes are closest, in ratio, to `shape`."""

    def factorisations(n: int, parts: int):
        if parts == 1:
            yield (n,)
            return
        for first in (d for d in range(1, n + 1) if n % d == 0):
            for rest in factorisations(n // first, parts - 1):
                yield (first, *rest)

    def distance(candidate):
        # A size of 1 that grows changes the kind of parallelism, so it costs double.
        return sum(
            abs(math.log(c / s)) * (2 if s == 1 < c else 1)
            for c, s in zip(candidate, shape, strict=True)
        )

    return min(factorisations(num_devices, len(shape)), key=distance)


def _shortest(rows: int, devices: int) -> str:
    value = rows / devices
    return str(int(value)) if value == int(value) else repr(value)


def _describe(shape: dict[str, int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in shape.items())
