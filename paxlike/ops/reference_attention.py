"""The plain attention that every other form is held to: all scores at once, in float32.

Shape legend: b batch, s query length, t key length, h query heads, g key/value heads (h is a multiple of g), k head
size.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from paxlike.ops import platform
from paxlike.ops.scores import Scores

CPU_BLOCK = 128  # queries; smaller ones do not fill the matrix product of a CPU


def reference_attention(q, k, v, segments, offset=None, *, scores: Scores, causal: bool):
    """`ops.attention`, in the form that is fastest on this device."""
    if causal and offset is None and _num_blocks(q.shape[1], k.shape[1]) > 1:
        return causal_attention_in_blocks(q, k, v, segments, scores=scores)
    return whole_attention(q, k, v, segments, offset, scores=scores, causal=causal)


def whole_attention(q, k, v, segments, offset=None, *, scores: Scores, causal: bool):
    """The same with one product of all queries and all keys."""
    whole = causal_attention if causal else full_attention
    return whole(q, k, v, segments, offset, scores=scores)


def _reference(q, k, v, segments, offset, *, scores: Scores, causal: bool):
    b, s, h, size = q.shape
    t, groups = k.shape[1], k.shape[2]
    mask = _mask(s, t, segments, offset, scores.window, causal)
    if s == 1 and platform.is_cpu():
        return _one_query(q, k, v, mask, scores)
    if groups == h:
        # Not as groups of one: a CPU's matrix products want their operands in two more copies then.
        query_axes, score_axes = "bsgk", "bgst"
        mask = None if mask is None else mask[:, :, 0]
    else:
        # Grouped queries: the h // g queries of a group share one key, so they stand beside the length.
        query_axes, score_axes = "bsgqk", "bgqst"
        q = q.reshape(b, s, groups, h // groups, size)
    form = f"{query_axes},btgk->{score_axes}"
    wide = _wide_product(form, q, k) if q.dtype != jnp.float32 else jnp.einsum(form, q, k)
    logits = scores.scale * wide
    if scores.logit_cap is not None:
        logits = scores.logit_cap * jnp.tanh(logits / scores.logit_cap)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(q.dtype)
    return jnp.einsum(f"{score_axes},btgk->{query_axes}", weights, v).reshape(b, s, h, size)


def _one_query(q, k, v, mask, scores: Scores):
    """The same for a token that is generated, with the products in the order that a CPU is fast at."""
    b, _, h, size = q.shape
    groups = k.shape[2]
    q = q.reshape(b, groups, h // groups, size)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # as the cache has them
    product = lambda x, y, axis: jax.lax.dot_general(
        x, y, (((3,), (axis,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32
    )
    logits = scores.scale * product(q, k, 3)
    if scores.logit_cap is not None:
        logits = scores.logit_cap * jnp.tanh(logits / scores.logit_cap)
    if mask is not None:
        logits = jnp.where(mask[..., 0, :], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(q.dtype)
    return product(weights, v, 2).astype(q.dtype).reshape(b, 1, h, size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wide_product(form: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """The contraction `form`, its result in float32.

    Differentiation would multiply float32 cotangents with 16-bit operands, which tensor cores cannot; they are rounded
    to the operands' type first, as fused attention does.
    """
    return _wide_einsum(form, a, b)


def _wide_einsum(form, a, b):
    return jnp.einsum(form, a, b, preferred_element_type=jnp.float32)


def _wide_product_backward(form, operands, cotangent):
    a, b = operands
    (of_a, of_b), of_result = form.split("->")[0].split(","), form.split("->")[1]
    cotangent = cotangent.astype(a.dtype)
    return (
        jnp.einsum(f"{of_result},{of_b}->{of_a}", cotangent, b),
        jnp.einsum(f"{of_result},{of_a}->{of_b}", cotangent, a),
    )


# The product itself: inside of `_wide_product` a policy of rematerialisation would not see it.
_wide_product.defvjp(lambda form, a, b: (_wide_einsum(form, a, b), (a, b)), _wide_product_backward)


# The name of the jitted function is what the FLOP counter knows a causal attention by (half of the scores are needed).
@functools.partial(jax.jit, static_argnames="scores")
def causal_attention(q, k, v, segments, offset, *, scores):
    """The reference with a causal mask."""
    return _reference(q, k, v, segments, offset, scores=scores, causal=True)


@functools.partial(jax.jit, static_argnames="scores")
def causal_attention_in_blocks(q, k, v, segments, *, scores):
    """The same numbers, without most of the products that the mask throws away: a quarter off its time on a CPU."""
    block, rows = q.shape[1] // _num_blocks(q.shape[1], k.shape[1]), []
    for start in range(0, q.shape[1], block):
        seen = slice(max(0, start - (scores.window or start + 1) + 1), start + block)
        queries = slice(start, start + block)
        documents = None if segments is None else (segments[:, queries], segments[:, seen])
        offset = jnp.full((1,), start - seen.start, jnp.int32)
        part = _reference(
            q[:, queries], k[:, seen], v[:, seen], documents, offset, scores=scores, causal=True
        )
        rows.append(part)
    return jnp.concatenate(rows, axis=1)


@functools.partial(jax.jit, static_argnames="scores")
def full_attention(q, k, v, segments, offset, *, scores):
    """The reference without a causal mask."""
    return _reference(q, k, v, segments, offset, scores=scores, causal=False)


def _mask(s, t, segments, offset, window, causal) -> jax.Array | None:
    """Boolean mask that broadcasts to (b, g, q, s, t), or None where everything is seen."""
    parts = []
    if causal:
        first = jnp.zeros((1,), jnp.int32) if offset is None else offset
        rows = (first[:, None] + jnp.arange(s)[None, :])[:, None, None, :, None]
        keys = jnp.arange(t)[None, None, None, None, :]
        parts.append(rows >= keys)
        if window is not None and window < t:
            parts.append(rows - keys < window)
    if segments is not None:
        of_queries, of_keys = segments if isinstance(segments, tuple) else (segments, segments)
        parts.append((of_queries[:, :, None] == of_keys[:, None, :])[:, None, None])
    return functools.reduce(jnp.logical_and, parts) if parts else None


def _num_blocks(s: int, t: int) -> int:
    """Blocks of queries on a CPU, at most four so that the program stays short; 1 elsewhere."""
    if s != t or not platform.is_cpu():
        return 1
    return next((n for n in (4, 3, 2) if s % n == 0 and s // n >= CPU_BLOCK), 1)
