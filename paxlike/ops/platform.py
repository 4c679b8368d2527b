"""Where an op has two forms with the same result, and which is faster depends on the hardware, it asks here."""

from __future__ import annotations

import jax


def is_cpu() -> bool:
    """Whether programs run on a CPU. Every form that is chosen by this leaves the accelerators' program as it was."""
    return jax.default_backend() == "cpu"


def is_nvidia() -> bool:
    """Whether programs run on a GPU of NVIDIA (a ROCm GPU calls itself gpu, too)."""
    return (
        jax.default_backend() == "gpu"
        and "cuda" in jax.devices()[0].client.platform_version.lower()
    )


def compute_capability() -> float:
    """Of the first NVIDIA GPU: 8.0 is A100, 9.0 is H100."""
    return float(jax.devices()[0].compute_capability)
