"""Where an op has two forms with the same result, and which is faster depends on the hardware, it asks here."""

from __future__ import annotations

import jax


def is_cpu() -> bool:
    """Whether programs run on a CPU. Every form that is chosen by this leaves the accelerators' program as it was."""
    return jax.default_backend() == "cpu"


def is_gpu() -> bool:
    """Whether programs run on a GPU."""
    return jax.default_backend() == "gpu"
