"""Decoder-only language model: embed, run the stack, normalise; the logits are left to the loss and to the sampler.

The model returns hidden states and the table that turns them into logits, because a loss that works in chunks, a
sampler that needs one position and an evaluator want different things from them.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Shaped

from paxlike import parallel
from paxlike.layers.dropout import Dropout, Noise, noise
from paxlike.layers.embedding import Embedding
from paxlike.layers.sequence import Sequence
from paxlike.ops import platform
from paxlike.ops.attention import is_plain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """Hidden states (b, s, d) behind the last norm, and the (v, d) table of the output layer.

    With a `logit_cap` the logits are cap * tanh(hidden @ table.T / cap). With a `context` the tokens of a row are
    spread over devices and may stand in another order, see `aligned`.
    """

    hidden: Float[Array, "b s d"]
    table: Float[Array, "v d"]
    logit_cap: float | None = dataclasses.field(default=None, metadata={"static": True})
    context: parallel.Context | None = dataclasses.field(default=None, metadata={"static": True})

    def aligned(self, x: Shaped[Array, "b s"]) -> Shaped[Array, "b s"]:
        """Targets, weights and the like in the order in which the tokens of `hidden` stand."""
        if self.context is None:
            return x
        return parallel.shard(self.context.arrange(x), "batch", "length")

    def in_order(self) -> Float[Array, "b s d"]:
        """`hidden`, its tokens in the order of the row."""
        return self.hidden if self.context is None else self.context.restore(self.hidden)

    def turned(self) -> Float[Array, "d v"] | None:
        """The table as `logits` reads it faster, where it is read so often that a copy pays; else None."""
        if not platform.may_copy(self.table):
            return None
        return self.table.astype(self.hidden.dtype).T

    def logits(self, turned: Float[Array, "d v"] | None = None) -> Float[Array, "b s v"]:
        """The logits in float32, for all positions in the order of the row; `turned` may stand for the table."""
        hidden = self.in_order()
        dimensions = (((2,), (1 if turned is None else 0,)), ((), ()))
        table = self.table.astype(hidden.dtype) if turned is None else turned
        logits = jax.lax.dot_general(hidden, table, dimensions, preferred_element_type=jnp.float32)
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
      logit_scale: factor of the logits (GLaM: 1 / sqrt(width)), None for 1.
      context: how attention works on rows that are spread over devices, see `parallel.Context`.
      prefix: a stack in front of `stack`, where the first layers are of another kind; None for none.
      tail: a stack behind `stack`, where the last period is not a whole one; None for none.
    """

    embedding: Embedding
    stack: nn.Module
    norm: nn.Module
    position: nn.Module | None = None
    head: Embedding | None = None
    embedding_dropout: float = 0.0
    logit_cap: float | None = None
    logit_scale: float | None = None
    context: str = "ring"
    prefix: nn.Module | None = None
    tail: nn.Module | None = None

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

        Raises:
          ValueError: rows that do not divide over the mesh, or that are spread over it while decoding.
        """
        context, places = self._context(tokens.shape[1], cache_length), None
        if context is not None and context.is_zigzag:
            places = jnp.asarray(context.places(tokens.shape[1]))
            if positions is None:
                positions = jnp.broadcast_to(places[None], tokens.shape)
            else:
                positions = _arrange(context, positions)
            tokens, segments = _arrange(context, tokens), _arrange(context, segments)
        if positions is None and offset is not None:
            positions = offset[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
        sequence = Sequence(
            positions,
            segments,
            offset=offset,
            train=train,
            context=context,
            cache_length=cache_length,
        )
        x = self.embedding(tokens)
        if self.position is not None:
            x = self.position(x, positions)
        key = self.make_rng("dropout") if train and self.has_rng("dropout") else None
        with noise(Noise(key, x.shape[:2], places=places)):
            x = parallel.shard(
                self.dropout(x, train=train), "batch", "residual_length", "act_embed"
            )
            if self.prefix is not None:
                x = self.prefix(x, sequence)
            x = self.stack(x, sequence)
            if self.tail is not None:
                x = self.tail(x, sequence)
            x = parallel.gather_length(self.norm(x))
        if self.logit_scale is not None:
            x = x * jnp.asarray(self.logit_scale, x.dtype)
        head = self.embedding if self.head is None else self.head
        x = parallel.shard(x, "batch", "length", "act_embed")
        return Output(x, head.table, self.logit_cap, context)

    def _context(self, length: int, cache_length: int) -> parallel.Context | None:
        """How the rows are spread; None where they are whole, and where only shapes or FLOPs are asked for."""
        context = parallel.current_context(self.context)
        if self.is_initializing() and length == 1:  # to learn of the parameters
            return None
        if cache_length and context is not None:
            raise ValueError(
                f"rows are whole while decoding, but the mesh spreads them over {context.axis} = {context.parts}: use "
                "`parallel.whole_rows`"
            )
        parallel.check_current_length(length, self.context)
        return None if self.is_initializing() or is_plain() else context


def _arrange(context: parallel.Context, x):
    """`x` (b, s) in the order of `context`, on the devices that it belongs to."""
    return None if x is None else parallel.shard(context.arrange(x), "batch", "length")
