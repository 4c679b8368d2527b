"""What attention and feed-forward layers have in common: projections that share their options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from paxlike.layers.linear import Initializer, Linear


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
        return Linear(
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
