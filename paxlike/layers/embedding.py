"""Token embedding and learned positions."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from paxlike import parallel
from paxlike.layers.linear import Initializer
from paxlike.layers.sizes import check_at_least
from paxlike.ops.lookup import lookup

Lookup = Literal["index", "matmul"]


class Embedding(nn.Module):
    """A table of one vector per token, used for looking up and, where weights are tied, for the logits.

    Attributes:
      vocab_size, features: shape of the table.
      lookup: `index` gathers rows; `matmul` multiplies with a one-hot matrix (Pax's choice, for TPUs).
      scale: factor of the vectors that are looked up, not of the logits (Gemma: the square root of the width).
    """

    vocab_size: int
    features: int
    table_init: Initializer = nn.initializers.normal(0.02)
    lookup: Lookup = "index"
    scale: float | None = None
    dtype: str = "float32"

    def setup(self):
        check_at_least(1, self, "vocab_size", "features")
        init = parallel.kernel_init(self.table_init, ("vocab", "embed"), num_inputs=1)
        self.table = self.param("table", init, (self.vocab_size, self.features), jnp.float32)

    def __call__(self, tokens: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        if self.lookup not in ("index", "matmul"):
            raise ValueError(f"EMBEDDING_LOOKUP_STYLE='{self.lookup}' is none of index, matmul")
        vectors = self._look_up(tokens)
        # The factor is rounded to the compute dtype, as in the models that have one.
        return vectors if self.scale is None else vectors * jnp.asarray(self.scale, self.dtype)

    def _look_up(self, tokens):
        if self.lookup == "matmul":
            table = parallel.shard(self.table.astype(self.dtype), "vocab", None)
            onehot = jax.nn.one_hot(tokens, self.vocab_size, dtype=self.dtype)
            return jax.lax.dot_general(onehot, table, (((2,), (0,)), ((), ())))
        return lookup(self.table, tokens, "vocab", self.dtype)


class LearnedPosition(nn.Module):
    """One trained vector per position (GPT-2), added to the token's."""

    max_length: int
    table_init: Initializer = nn.initializers.normal(0.02)
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b s d"], positions: Int[Array, "b s"] | None = None
    ) -> Float[Array, "b s d"]:
        check_at_least(1, self, "max_length")
        init = parallel.kernel_init(self.table_init, ("position", "embed"), num_inputs=1)
        table = self.param("table", init, (self.max_length, x.shape[-1]), jnp.float32)
        if positions is None:
            if x.shape[1] > self.max_length:
                raise ValueError(
                    f"{x.shape[1]} tokens in a row, but the model has MAX_SEQ_LEN={self.max_length} learned positions"
                )
            table = parallel.shard(table.astype(self.dtype), "position", None)
            return x + table[None, : x.shape[1]]
        return x + lookup(table, positions, "position", self.dtype)
