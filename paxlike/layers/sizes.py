"""Numbers that a layer cannot have, refused in one line wherever the layer comes from."""

from __future__ import annotations

from flax import linen as nn


def check_at_least(limit: int, layer: nn.Module, *fields: str) -> None:
    """Raises ValueError if one of these fields of the layer is smaller; None may stand for a number.

    >>> check_at_least(1, nn.Dense(0), "features")
    Traceback (most recent call last):
    ValueError: Dense.features=0 must be at least 1
    """
    for field in fields:
        value = getattr(layer, field)
        if value is not None and not value >= limit:
            raise ValueError(f"{type(layer).__name__}.{field}={value} must be at least {limit}")
