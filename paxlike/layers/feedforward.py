"""The feed-forward half of a block, plain or gated (Shazeer 2020)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from paxlike import parallel
from paxlike.layers.dropout import Dropout
from paxlike.layers.linear import Initializer, Linear
from paxlike.layers.sequence import Sequence

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class FeedForward(nn.Module):
    """activation(x W1 + b1) W2 + b2, or with a gate (activation(x Wg) * (x W1)) W2.

    Attributes:
      hidden: width between the two layers.
      activation: one of `ACTIVATIONS`; `gelu` is the tanh approximation of GPT.
      gated: multiply with a second projection.
    """

    hidden: int
    activation: str = "gelu"
    gated: bool = False
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.normal(0.02)
    dropout: float = 0.0
    dtype: str = "float32"
    dot_general_cls: type | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], sequence: Sequence) -> Float[Array, "b s d"]:
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"ACTIVATION='{self.activation}' is none of {', '.join(sorted(ACTIVATIONS))}"
            )
        activation = ACTIVATIONS[self.activation]
        hidden = self._in("ffn1", "ffn1")(x)
        if self.gated:
            hidden = activation(self._in("gate", "ffn1_gate")(x)) * hidden
        else:
            hidden = activation(hidden)
        y = self._linear(x.shape[-1], ("mlp", "embed"), "ffn2")(hidden)
        y = checkpoint_name(parallel.shard(y, "batch", "length", "act_embed"), "ffn2")
        return Dropout(self.dropout, name="dropout")(y, train=sequence.train)

    def _in(self, name: str, saved_as: str):
        linear = self._linear(self.hidden, ("embed", "mlp"), name)
        return lambda x: checkpoint_name(
            parallel.shard(linear(x), "batch", "length", "act_mlp"), saved_as
        )

    def _linear(self, features, axes, name) -> Linear:
        return Linear(
            features=features,
            axes=axes,
            use_bias=self.use_bias,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            dot_general_cls=self.dot_general_cls,
            name=name,
        )
