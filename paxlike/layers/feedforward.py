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
from paxlike.layers.projection import Projecting
from paxlike.layers.sequence import Sequence

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class FeedForward(Projecting):
    """activation(x W1 + b1) W2 + b2, or with a gate (activation(x Wg) * (x W1)) W2.

    Attributes:
      hidden: width between the two layers.
      activation: one of `ACTIVATIONS`; `gelu` is the tanh approximation of GPT.
      gated: multiply with a second projection; with `silu` this is SwiGLU.
    """

    hidden: int
    activation: str = "gelu"
    gated: bool = False
    dropout: float = 0.0

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
        y = self.projection("ffn2", x.shape[-1], ("mlp", "embed"))(hidden)
        y = checkpoint_name(parallel.scatter_length(y), "ffn2")
        return Dropout(self.dropout, name="dropout")(y, train=sequence.train)

    def _in(self, name: str, saved_as: str):
        linear = self.projection(name, self.hidden, ("embed", "mlp"))
        return lambda x: checkpoint_name(
            parallel.shard(linear(x), "batch", "length", "act_mlp"), saved_as
        )
