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
from paxlike.layers.projection import Projecting, whole
from paxlike.layers.sequence import Sequence
from paxlike.layers.sizes import check_at_least
from paxlike.ops import te_fused

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
    def __call__(
        self, x: Float[Array, "b s d"], sequence: Sequence, norm: te_fused.Norm | None = None
    ) -> Float[Array, "b s d"]:
        """Of x, or of norm(x) where one is given."""
        check_at_least(1, self, "hidden")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"ACTIVATION='{self.activation}' is none of {', '.join(sorted(ACTIVATIONS))}"
            )
        activation = ACTIVATIONS[self.activation]
        if norm is not None and self._is_fused_whole():
            axes = ("mlp", "embed")
            second = whole(self.weight("ffn2", self.hidden, x.shape[-1], axes), axes)
            y = te_fused.feed_forward(x, norm, self._first(x), second, self.activation)
        else:
            if norm is None:
                hidden = self._in("ffn1", "ffn1")(x)
                gate = self._in("gate", "ffn1_gate")(x) if self.gated else None
            else:
                both = te_fused.product(x, norm, self._first(x))
                hidden = _named(both[:, :, -1], "ffn1")
                gate = _named(both[:, :, 0], "ffn1_gate") if self.gated else None
            hidden = activation(hidden) if gate is None else activation(gate) * hidden
            y = self.projection("ffn2", x.shape[-1], ("mlp", "embed"))(hidden)
        y = checkpoint_name(parallel.scatter_length(y), "ffn2")
        return Dropout(self.dropout, name="dropout")(y, train=sequence.train)

    def behind_norm(self) -> tuple[str, ...]:
        """The first product, or two."""
        return ("gate", "ffn1") if self.gated else ("ffn1",)

    def _is_fused_whole(self) -> bool:
        """Whether all of it can be one operation with the norm in front."""
        is_known = self.activation in te_fused.ACTIVATIONS
        return is_known and self.fused(*self.behind_norm(), "ffn2")

    def _in(self, name: str, saved_as: str):
        linear = self.projection(name, self.hidden, ("embed", "mlp"))
        return lambda x: _named(linear(x), saved_as)

    def _first(self, x) -> te_fused.Weight:
        """What x is multiplied by, (d, 2, hidden) with a gate, else (d, 1, hidden)."""
        axes = ("embed", "mlp")
        weights = [self.weight(n, x.shape[-1], self.hidden, axes) for n in self.behind_norm()]
        joined = te_fused.join([weight.reshape(1, self.hidden) for weight in weights], 0)
        return whole(joined, ("embed", None, "mlp"))


def _named(hidden, saved_as: str):
    return checkpoint_name(parallel.shard(hidden, "batch", "length", "act_mlp"), saved_as)
