"""Every difference between the supported versions of jax, flax and Python, in one place.

Supported: Python 3.11 to 3.13 and jax >= 0.10. Python 3.11 stops at jax 0.10.2.
"""

from __future__ import annotations

import contextlib
import os
import platform
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import compiler as _compiler
from jax._src import xla_bridge
from jax._src.interpreters import partial_eval
from jax.sharding import AxisType, Mesh


def auto_mesh(devices: np.ndarray, axes: tuple[str, ...]) -> Mesh:
    """A mesh whose axes are all `Auto`: the compiler propagates shardings (jax's own default is `Explicit`)."""
    return Mesh(devices, axes, axis_types=(AxisType.Auto,) * len(axes))


def has_started() -> bool:
    """Whether jax has made its devices: XLA_FLAGS that come later have no effect."""
    return xla_bridge.backends_are_initialized()


def set_mesh(mesh: Mesh) -> contextlib.AbstractContextManager:
    """Context in which `mesh` is the one that bare partition specs refer to."""
    return jax.set_mesh(mesh)


def current_mesh_shape() -> dict[str, int]:
    """Axis sizes of the mesh in force, `{}` outside any.

    Inside a `shard_map` the axes that it maps over are left out: what a device sees there is its own part.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return {axis: size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes}


def in_manual_region() -> bool:
    """Whether this is traced inside a `shard_map`."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def without_dead_code(jaxpr: Any) -> Any:
    """A closed jaxpr without what none of its results needs, inside loops and recomputed parts too."""
    kept, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    return kept


def program_cache(folder: str | os.PathLike) -> Path:
    """Where in `folder` compiled programs are kept (for `jax_compilation_cache_dir`), and makes reading them safe.

    Two things that jax's cache does not see to:

    * A program compiled for one kind of CPU dies on another, and homes are shared by nodes that differ: each kind has
      a subfolder of its own.
    * XLA:CPU seems to lose the order of independent collectives when it reads a program back: the devices enter them
      in different orders and wait for each other until it aborts (seen with jax 0.10.2: 4 of 12 starts; 0 of 19 when
      the same program was compiled). CPU programs over several devices are therefore compiled each time.
    """
    place = Path(folder).expanduser() / _cpu_kind()
    place.mkdir(parents=True, exist_ok=True)
    read = _compiler._cache_read
    if getattr(read, "skips_collectives", False):
        return place

    def cache_read(name, key, options, backend, devices, *more):  # jax 0.11 gives one argument more
        if backend.platform == "cpu" and len(devices) > 1:
            return None, None
        return read(name, key, options, backend, devices, *more)

    cache_read.skips_collectives = True  # type: ignore[attr-defined]
    _compiler._cache_read = cache_read
    return place


def _cpu_kind() -> str:
    """A short name of what this CPU can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    known = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return f"{platform.machine()}-{zlib.crc32(repr(known).encode()):08x}"


@contextlib.contextmanager
def without_cudnn(compute_capability: float) -> Iterator[None]:
    """Lets fused attention be traced as for a GPU of this capability where there is neither one nor cuDNN.

    jax asks the library for its version (here 9.10) and the GPU at hand for its capability to refuse what old ones
    lack; the compiler needs neither.
    """
    from jax._src.cudnn import fused_attention_stablehlo as fused

    answers = {
        "check_cudnn_version": lambda: 91000,
        "check_compute_capability": lambda least: compute_capability >= float(least),
        "is_cuda_compute_capability_equal": lambda other: compute_capability == float(other),
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.callback(setattr, fused, name, getattr(fused, name))
            setattr(fused, name, answer)
        yield
