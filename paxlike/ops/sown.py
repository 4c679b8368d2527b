"""What layers say beside their output: the names of the collections, and how what comes of them is read.

Layers sow (`nn.Module.sow`) only where the caller asks for these collections, and never while parameters are made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

LOSSES = "losses"  # scalars, weighted, that are added to the mean loss
SUMMARIES = "summaries"  # statistics for the log
UPDATES = "updates"  # what is added to parameters that have no gradient, by their own names
SOWN = (LOSSES, SUMMARIES, UPDATES)


def total(losses: Any) -> Float[Array, ""]:
    """The sum of everything sown as a loss, over all layers."""
    if isinstance(losses, Mapping):
        return sum((total(value) for value in losses.values()), jnp.zeros(()))
    return jnp.sum(losses)
