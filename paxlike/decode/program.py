"""What is compiled for decoding: reading the prompts, and the loop that draws token after token.

Keys and values of the padding behind a prompt are never seen: a row attends to positions up to its
own, and the tokens it generates overwrite the padding. A row that has ended stays where it is.

Shape legend: b rows, s padded length of the prompts, c tokens of a chunk, v vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from paxlike import parallel
from paxlike.decode.sampler import SamplingOptions, sample


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What the loop carries.

    Attributes:
      cache: keys and values.
      token: the last token of each row, not in the cache yet.
      offset: tokens of each row in the cache.
      room: tokens each row may still get.
      active: rows that have not ended.
      count: tokens generated per row so far, for the keys.
      identity: (prompt, sample) of each row, for the keys.
      seen: tokens that a row holds; None where nobody asks.
      table: of the output layer, turned for this hardware; None where the model's own serves.
    """

    cache: Any
    token: Int[Array, " b"]
    offset: Int[Array, " b"]
    room: Int[Array, " b"]
    active: Bool[Array, " b"]
    count: Int[Array, ""]
    identity: Int[Array, "b 2"]
    seen: Bool[Array, "b v"] | None
    table: Float[Array, "d v"] | None = None


@dataclasses.dataclass(frozen=True)
class Program:
    """The two functions that are compiled."""

    model: nn.Module
    options: SamplingOptions
    stop_ids: tuple[int, ...]
    num_ids: int

    def prefill(self, variables, tokens, lengths, room, identity, *, cache_length: int):
        """Reads the prompts; (state, first token (b, 1), its log probability (b, 1))."""
        tokens = parallel.shard(tokens, "batch", None)
        lengths, room = parallel.shard(lengths, "batch"), parallel.shard(room, "batch")
        output, updated = self.model.apply(
            variables, tokens, cache_length=cache_length, mutable=["cache"]
        )
        last = jnp.take_along_axis(output.hidden, (lengths - 1)[:, None, None], axis=1)
        logits = dataclasses.replace(output, hidden=last).logits()[:, 0]
        seen = None
        if self.options.repetition_penalty != 1:
            real = jnp.arange(tokens.shape[1])[None, :] < lengths[:, None]
            mark = lambda row, real: jnp.zeros(logits.shape[1], bool).at[row].max(real)
            seen = jax.vmap(mark)(tokens, real)
        state = State(
            cache=updated["cache"],
            token=lengths,
            offset=lengths,
            room=room,
            active=room > 0,
            count=jnp.zeros((), jnp.int32),
            identity=identity,
            seen=seen,
            table=output.turned(),
        )
        state, ids, logprobs = self._draw(state, logits)
        return state, _whole(ids[:, None]), _whole(logprobs[:, None])

    def advance(self, variables, state: State, going_on, *, cache_length: int, num_tokens: int):
        """Up to `num_tokens` more tokens of the rows in `going_on`.

        Returns the state, tokens (b, c), -1 where the row had ended before, and their log
        probabilities (b, c). Ends early when all rows have ended.
        """
        state = dataclasses.replace(state, active=state.active & parallel.shard(going_on, "batch"))
        shape = (state.token.shape[0], num_tokens)

        def goes_on(carry):
            step, state, *_ = carry
            return (step < num_tokens) & jnp.any(state.active)

        def body(carry):
            step, state, ids, logprobs = carry
            output, updated = self.model.apply(
                {**variables, "cache": state.cache},
                state.token[:, None],
                offset=state.offset,
                cache_length=cache_length,
                mutable=["cache"],
            )
            # A row that has ended stays where it is, so that it never writes beyond the cache.
            offset = state.offset + state.active
            state = dataclasses.replace(state, cache=updated["cache"], offset=offset)
            state, new_ids, new_logprobs = self._draw(state, output.logits(state.table)[:, 0])
            ids = jax.lax.dynamic_update_slice(ids, new_ids[:, None], (0, step))
            logprobs = jax.lax.dynamic_update_slice(logprobs, new_logprobs[:, None], (0, step))
            return step + 1, state, ids, logprobs

        ids, logprobs = jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32)
        carry = jnp.zeros((), jnp.int32), state, ids, logprobs
        _, state, ids, logprobs = jax.lax.while_loop(goes_on, body, carry)
        return state, _whole(ids), _whole(logprobs)

    def _draw(self, state: State, logits: jax.Array):
        """The next token of every row, its log probability, and the state behind it."""
        allowed = jnp.arange(logits.shape[-1])[None, :] < self.num_ids
        candidates = jnp.where(allowed, logits, -jnp.inf)
        drawn = sample(candidates, self._keys(state), self.options, state.seen)
        chosen = jnp.take_along_axis(logits, drawn[:, None], axis=-1)[:, 0]
        logprobs = chosen - jax.nn.logsumexp(logits, axis=-1)
        ids = jnp.where(state.active, drawn, -1)
        room = state.room - state.active
        seen = state.seen
        if seen is not None:
            # A comparison, because it stays on the device that holds the row where a scatter would not.
            seen = seen | (jnp.arange(seen.shape[1])[None, :] == drawn[:, None])
        state = dataclasses.replace(
            state,
            token=parallel.shard(drawn, "batch"),
            room=room,
            active=state.active & ~self._ends(drawn) & (room > 0),
            count=state.count + 1,
            seen=seen,
        )
        return state, ids, logprobs

    def _ends(self, drawn: jax.Array) -> jax.Array:
        """Whether each token ends its text."""
        return jnp.any(drawn[:, None] == jnp.asarray(self.stop_ids)[None, :], axis=-1)

    def _keys(self, state: State) -> jax.Array:
        """One key per row: of the seed, the prompt, the sample and the number of the token."""

        def key(identity):
            prompt = jax.random.fold_in(jax.random.key(self.options.seed), identity[0])
            return jax.random.fold_in(jax.random.fold_in(prompt, identity[1]), state.count)

        return jax.vmap(key)(state.identity)


def _whole(x: jax.Array) -> jax.Array:
    """Whole on every device, so that every process can read it."""
    return parallel.shard(x, *(None,) * x.ndim)
