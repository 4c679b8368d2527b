"""Choosing one of two answers: which of two tokens has the larger logit.

Where a batch has `alternatives`, the target there is one answer and the alternative the other. Only
these two logits are computed, from two rows of the output table: never those of a whole vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from paxlike.log.metric import Metric


def two_way_accuracy(
    hidden: Float[Array, "b s d"],
    table: Float[Array, "v d"],
    targets: Int[Array, "b s"],
    alternatives: Int[Array, "b s"],
    rows: Float[Array, "b"],
) -> Metric:
    """Share of rows in which the target's logit is strictly larger than the alternative's.

    A row is judged at its first position with an alternative (one that is not negative); one without
    any counts nothing, nor does one whose number in `rows` is 0. A soft cap of the logits, being
    increasing, would change nothing.
    """
    given = alternatives >= 0
    at = jnp.argmax(given, axis=1)[:, None]
    x = jnp.take_along_axis(hidden, at[..., None], axis=1)[:, 0]
    right = _logit(x, table, jnp.take_along_axis(targets, at, axis=1)[:, 0])
    other = _logit(x, table, jnp.take_along_axis(alternatives, at, axis=1)[:, 0])
    counted = rows * jnp.any(given, axis=1)
    return Metric(jnp.sum((right > other) * counted), jnp.sum(counted))


def _logit(x: Float[Array, "b d"], table: Float[Array, "v d"], ids: Int[Array, "b"]):
    """x @ table[ids], row by row, summed in float32 as the logits of the loss are."""
    rows = jnp.take(table, ids, axis=0, mode="clip").astype(x.dtype)
    return jax.lax.dot_general(
        x, rows, (((1,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32
    )
