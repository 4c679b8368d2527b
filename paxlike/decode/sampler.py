"""From logits to the next token: greedy, temperature, top-k, nucleus, repetition penalty.

Top-k and the nucleus both keep the logits above some threshold. The threshold is found by
bisection over the bits of a float32 (32 passes of compare and add) rather than by sorting: 20 times
as fast on a CPU, and on a mesh the vocabulary may stay sharded, because every pass is a sum. Logits
that are equal to the threshold are all kept.

Shape legend: b rows, v vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from paxlike.ops.largest import argmax


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How continuations are drawn.

    Attributes:
      max_tokens: tokens generated per continuation at most, the end-of-document token included.
      temperature: divides the logits; 0 takes the most probable token (greedy).
      top_k: sample among the k most probable tokens only, 0 for all (Fan et al. 2018).
      top_p: sample among the fewest tokens whose probabilities add up to p (Holtzman et al. 2019),
        1 for all.
      repetition_penalty: weakens tokens that the row holds already, prompt included (Keskar et al.
        2019), 1 for none.
      stop_strings: a continuation ends before the first of these.
      seed: of all the randomness; the draws of a row depend on it and on the number of its prompt,
        not on the rows beside it.
      num_samples: continuations per prompt.
      batch_size: rows decoded at a time, over all devices; None takes up to 32 per batch shard.
    """

    max_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop_strings: tuple[str, ...] = ()
    seed: int = 0
    num_samples: int = 1
    batch_size: int | None = None

    def __post_init__(self):
        if isinstance(self.stop_strings, str):
            raise ValueError(
                f"stop_strings={self.stop_strings!r} is one string: give a list of them"
            )
        object.__setattr__(self, "stop_strings", tuple(self.stop_strings))
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: give at least 1")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: give 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: give 0 (all tokens) or a positive number")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: give a share above 0 and at most 1 (all tokens)")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty}: give a positive number; 1 is none"
            )
        if "" in self.stop_strings:
            raise ValueError("a stop string is empty: everything would end at once")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed}: give a number from 0 to {2**32 - 1}")
        if self.num_samples < 1:
            raise ValueError(f"num_samples={self.num_samples}: give at least 1")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: give at least 1, or None")


def sample(
    logits: Float[Array, "b v"],
    keys: Key[Array, " b"],
    options: SamplingOptions,
    seen: Bool[Array, "b v"] | None = None,
) -> Int[Array, " b"]:
    """The next token of each row.

    In this order: penalty, temperature, top-k, nucleus of what top-k left, draw.

    Args:
      keys: one key for each row and draw.
      seen: tokens that the row holds already; needed where there is a repetition penalty.
    """
    logits = logits.astype(jnp.float32)
    if options.repetition_penalty != 1:
        if seen is None:
            raise ValueError(f"repetition_penalty={options.repetition_penalty} needs `seen`")
        logits = penalise(logits, seen, options.repetition_penalty)
    if options.temperature == 0:
        return argmax(logits)
    logits = logits / options.temperature
    if 0 < options.top_k < logits.shape[-1]:
        logits = keep_top_k(logits, options.top_k)
    if options.top_p < 1:
        logits = keep_nucleus(logits, options.top_p)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def penalise(
    logits: Float[Array, "b v"], seen: Bool[Array, "b v"], penalty: float
) -> Float[Array, "b v"]:
    """Lowers the logits of seen tokens: divides positive ones, multiplies negative ones."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Float[Array, "b v"], k: int) -> Float[Array, "b v"]:
    """The k largest logits of each row, the others -inf."""
    return _keep_from_threshold(logits, lambda kept: jnp.sum(kept, axis=-1) >= k)


def keep_nucleus(logits: Float[Array, "b v"], p: float) -> Float[Array, "b v"]:
    """The fewest largest logits of each row whose probabilities add up to `p`, the others -inf."""
    probabilities = jax.nn.softmax(logits, axis=-1)

    def is_enough(kept):
        return jnp.sum(jnp.where(kept, probabilities, 0.0), axis=-1) >= p

    return _keep_from_threshold(logits, is_enough)


def _keep_from_threshold(
    logits: jax.Array, is_enough: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Keeps logits from the highest threshold on where they are enough; all if they never are."""
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    order = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the floats

    def halve(_, bounds):
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)  # rounded up, and no overflow
        enough = is_enough(order >= middle[:, None])
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    rows = logits.shape[:1]
    info = jnp.iinfo(jnp.int32)
    bounds = jnp.full(rows, info.min, jnp.int32), jnp.full(rows, info.max, jnp.int32)
    low, _ = jax.lax.fori_loop(0, 32, halve, bounds)
    return jnp.where(order >= low[:, None], logits, -jnp.inf)
