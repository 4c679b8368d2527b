"""What attention and feed-forward layers have in common: projections that share their options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from paxlike.layers.linear import Initializer, Linear, Parameters, gathered
from paxlike.ops import te_fused
from paxlike.ops.te import TransformerEngine


class Projecting(nn.Module, kw_only=True):  # type: ignore[call-arg]
    """A module made of `Linear`s.

    Attributes:
      use_bias: biases in all of them.
      kernel_init: initialiser of all kernels.
      kernel_inits: name of a projection -> its own initialiser, where it has one.
      dtype: compute dtype.
      dot_general_cls: see `Linear`; a mapping from names of projections gives only those one.
      adapters: name of a projection -> what is added to it (see `layers.lora`).
    """

    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.normal(0.02)
    kernel_inits: Mapping[str, Any] | None = None
    dtype: str = "float32"
    dot_general_cls: Any = None
    adapters: Mapping[str, Any] | None = None

    def projection(
        self,
        name: str,
        features: int | tuple[int, ...],
        axes: tuple[str | None, ...],
        *,
        use_bias: bool | None = None,
    ) -> Linear:
        """The projection called `name`."""
        return self._made(Linear, name, features, axes, use_bias)

    def behind_norm(self) -> tuple[str, ...]:
        """The projections of the input that can be one operation with the norm in front; none where there is none."""
        return ()

    def fused(self, *names: str) -> bool:
        """Whether these projections are all multiplied by Transformer Engine in one way, and may be more than that."""
        first, *others = (self._dot_general_cls(name) for name in names)
        if not isinstance(first, TransformerEngine) or first.fused is False:
            return False
        adapted = any(self._adapter(name) for name in names)
        return not adapted and all(other == first for other in others)

    def weight(
        self,
        name: str,
        inputs: int,
        features: int | tuple[int, ...],
        axes: tuple[str | None, ...],
    ) -> te_fused.Weight:
        """What the projection called `name` would multiply by."""
        return self._made(Parameters, name, features, axes, None)((inputs,))

    def _made(self, cls: type[Linear], name: str, features, axes, use_bias) -> Any:
        return cls(
            features=features,
            axes=axes,
            use_bias=self.use_bias if use_bias is None else use_bias,
            kernel_init=(self.kernel_inits or {}).get(name, self.kernel_init),
            dtype=self.dtype,
            dot_general_cls=self._dot_general_cls(name),
            name=name,
            **self._adapter(name),
        )

    def _dot_general_cls(self, name: str) -> Any:
        made = self.dot_general_cls
        return made.get(name) if isinstance(made, Mapping) else made

    def _adapter(self, name: str) -> dict[str, Any]:
        adapter = (self.adapters or {}).get(name)
        return {} if adapter is None else {"adapter": adapter}


def whole(weight: te_fused.Weight, axes: tuple[str | None, ...]) -> te_fused.Weight:
    """The weight, whole along the width."""
    return dataclasses.replace(weight, kernel=gathered(weight.kernel, axes))
