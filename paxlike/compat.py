"""Every difference between the supported versions of jax, flax and Python, in one place.

Supported: Python 3.11 to 3.13 and jax >= 0.10. Python 3.11 stops at jax 0.10.2.
"""

from __future__ import annotations

import contextlib

import jax
import numpy as np
from jax.sharding import AxisType, Mesh


def auto_mesh(devices: np.ndarray, axes: tuple[str, ...]) -> Mesh:
    """A mesh whose axes are all `Auto`: the compiler propagates shardings (jax's own default is `Explicit`)."""
    return Mesh(devices, axes, axis_types=(AxisType.Auto,) * len(axes))


def set_mesh(mesh: Mesh) -> contextlib.AbstractContextManager:
    """Context in which `mesh` is the one that bare partition specs refer to."""
    return jax.set_mesh(mesh)


def current_mesh_shape() -> dict[str, int]:
    """Axis sizes of the mesh in force, `{}` outside any."""
    return dict(jax.sharding.get_abstract_mesh().shape)
