"""Where an op has two forms with the same result, and which is faster depends on the hardware, it asks here."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import jax

from paxlike import compat
from paxlike.scoped import Scoped

# Of weights that a CPU holds a second time, in another form, while it generates.
CPU_COPY_BYTES = 4 << 30


@dataclasses.dataclass(frozen=True)
class Hardware:
    """What a program is traced for, where that is not what it is traced on.

    Attributes:
      platform: `cpu`, `cuda` or `tpu`.
      compute_capability: of an NVIDIA GPU, as `compute_capability()`.
    """

    platform: str
    compute_capability: float = 0.0


_hardware: Scoped[Hardware | None] = Scoped("hardware", None)


def traced_for(hardware: Hardware) -> contextlib.AbstractContextManager[None]:
    """Inside it every op takes the form that it has on `hardware`, whatever devices there are."""
    return _hardware.set(hardware)


def is_here() -> bool:
    """Whether programs are traced for the devices that there are."""
    return _hardware.get() is None


def name() -> str:
    """What programs run on: `cpu`, `gpu`, `tpu`."""
    hardware = _hardware.get()
    if hardware is not None:
        return {"cuda": "gpu"}.get(hardware.platform, hardware.platform)
    return jax.default_backend()


def is_cpu() -> bool:
    """Whether programs run on a CPU. Every form that is chosen by this leaves the accelerators' program as it was."""
    return name() == "cpu"


def may_copy(weights: Any) -> bool:
    """Whether `weights`, a tree of arrays, are held in another form too, because one CPU reads that faster.

    Not on a mesh: CPUs that stand for accelerators run the accelerators' program.
    """
    if not is_cpu() or math.prod(compat.current_mesh_shape().values()) > 1:
        return False
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(weights)) <= CPU_COPY_BYTES


def is_nvidia() -> bool:
    """Whether programs run on a GPU of NVIDIA (a ROCm GPU calls itself gpu, too)."""
    hardware = _hardware.get()
    if hardware is not None:
        return hardware.platform == "cuda"
    return (
        jax.default_backend() == "gpu"
        and "cuda" in jax.devices()[0].client.platform_version.lower()
    )


def compute_capability() -> float:
    """Of the first NVIDIA GPU: 8.0 is A100, 9.0 is H100."""
    hardware = _hardware.get()
    if hardware is not None:
        return hardware.compute_capability
    return float(jax.devices()[0].compute_capability)
