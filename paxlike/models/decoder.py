"""Decoder-only language model: embed, run the stack, normalise; the logits are left to the loss and to the sampler.

The model returns hidden states and the table that turns them into logits, because a loss that works in chunks, a
sampler that needs one position and an evaluator want different things from them.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from paxlike import parallel
from paxlike.layers.dropout import Dropout, Noise, noise
from paxlike.layers.embedding import Embedding
from paxlike.layers.sequence import Sequence


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """Hidden states (b, s, d) behind the last norm, and the (v, d) table of the output layer.

    With a `logit_cap` the logits are cap * tanh(hidden @ table.T / cap).
    """

    hidden: Float[Array, "b s d"]
    table: Float[Array, "v d"]
    logit_cap: float | None = dataclasses.field(default=None, metadata={"static": True})

    def logits(self) -> Float[Array, "b s v"]:
        """The logits in float32, for all positions."""
        dimensions = (((2,), (1,)), ((), ()))
        table = self.table.astype(self.hidden.dtype)
        logits = jax.lax.dot_general(
            self.hidden, table, dimensions, preferred_element_type=jnp.float32
        )
        if self.logit_cap is not None:
            logits = self.logit_cap * jnp.tanh(logits / self.logit_cap)
        return parallel.shard(logits, "batch", "length", "act_vocab")


class Decoder(nn.Module):
    """A causal language model of any stack.

    Attributes:
      embedding: token table; also the output layer unless `head` is given.
      position: module called with `(x, positions)`, or None where the blocks know positions themselves.
      head: an `Embedding` of its own for the output layer (untied weights).
      embedding_dropout: on the sum of token and position.
      logit_cap: bound of the logits (Gemma 2), None for none.
    """

    embedding: Embedding
    stack: nn.Module
    norm: nn.Module
    position: nn.Module | None = None
    head: Embedding | None = None
    embedding_dropout: float = 0.0
    logit_cap: float | None = None

    def setup(self):
        self.dropout = Dropout(self.embedding_dropout)

    @property
    def vocab_size(self) -> int:
        """Number of rows of the token table."""
        return self.embedding.vocab_size

    def __call__(
        self,
        tokens: Int[Array, "b s"],
        *,
        positions: Int[Array, "b s"] | None = None,
        segments: Int[Array, "b s"] | None = None,
        offset: Int[Array, "b"] | None = None,
        train: bool = False,
        cache_length: int = 0,
    ) -> Output:
        """Hidden states and output table for `tokens`.

        Args:
          positions, segments: of packed documents; None where each row is one document from position 0.
          offset: tokens of each row that the cache holds already (decoding).
          cache_length: keep keys and values of up to this many tokens in the collection `cache`.
        """
        if positions is None and offset is not None:
            positions = offset[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
        sequence = Sequence(
            positions, segments, offset=offset, train=train, cache_length=cache_length
        )
        x = self.embedding(tokens)
        if self.position is not None:
            x = self.position(x, positions)
        key = self.make_rng("dropout") if train and self.has_rng("dropout") else None
        with noise(Noise(key, x.shape[:2], rows=sequence.rows, places=sequence.places)):
            x = parallel.shard(self.dropout(x, train=train), "batch", "length", "act_embed")
            x = self.norm(self.stack(x, sequence))
        head = self.embedding if self.head is None else self.head
        x = parallel.shard(x, "batch", "length", "act_embed")
        return Output(x, head.table, self.logit_cap)
