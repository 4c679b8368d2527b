"""Causal attention whose scores know how far back a key lies (T5, Raffel et al. 2020, section 2.1), as in GLaM.

Plain products: fused attention has no such bias here.

Shape legend: b batch, s query length, t key length, h query heads, g key/value heads, k head size, n buckets.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_FAR = 128  # tokens back from which on all keys share the last bucket


def biased_attention(
    q: Float[Array, "b s h k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t g k"],
    table: Float[Array, "n h"] | None,
    *,
    segments: Int[Array, "b s"] | None = None,
    offset: Int[Array, "b"] | None = None,
    scale: float | None = None,
    extra_logit: bool = False,
) -> Float[Array, "b s h k"]:
    """Softmax(q k^T * scale + bias) v over the keys up to the query, the softmax in float32.

    Args:
      table: the bias of each head for each bucket of distances; None for none.
      segments, offset, scale: as in `ops.attention`.
      extra_logit: the softmax has one more score of 0, whose value is 0.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return causal_attention(
        q, k, v, segments, offset, table, scale=float(scale), extra_logit=extra_logit
    )


def bucket(distance: Int[Array, "..."], num_buckets: int) -> Int[Array, "..."]:
    """The bucket of a key that lies so many tokens back; 0 for later ones.

    Half of the buckets are for one distance each, the others for ranges that grow up to a distance of 128.
    """
    exact = num_buckets // 2
    distance = jnp.maximum(distance, 0)
    far = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact)
    far = exact + (far / math.log(_FAR / exact) * (num_buckets - exact)).astype(jnp.int32)
    return jnp.where(distance < exact, distance, jnp.minimum(far, num_buckets - 1))


# The FLOP counter knows a causal attention by this name.
@functools.partial(jax.jit, static_argnames=("scale", "extra_logit"))
def causal_attention(q, k, v, segments, offset, table, *, scale, extra_logit):
    """The whole computation."""
    b, s, h, size = q.shape
    t, groups = k.shape[1], k.shape[2]
    q = q.reshape(b, s, groups, h // groups, size)
    logits = scale * jnp.einsum("bsgqk,btgk->bgqst", q, k, preferred_element_type=jnp.float32)
    first = jnp.zeros((1,), jnp.int32) if offset is None else offset
    rows = first[:, None] + jnp.arange(s)[None]
    distance = rows[:, :, None] - jnp.arange(t)[None, None]
    if table is not None:
        wide = table.astype(jnp.float32).T
        bias = jnp.take(wide, bucket(distance, table.shape[0]), axis=1).swapaxes(0, 1)
        logits = logits + bias.reshape(-1, groups, h // groups, s, t)
    seen = (distance >= 0)[:, None, None]
    if segments is not None:
        seen = seen & (segments[:, :, None] == segments[:, None, :])[:, None, None]
    logits = jnp.where(seen, logits, jnp.finfo(jnp.float32).min)
    softmax = _softmax_with_zero if extra_logit else functools.partial(jax.nn.softmax, axis=-1)
    weights = softmax(logits).astype(v.dtype)
    return jnp.einsum("bgqst,btgk->bsgqk", weights, v).reshape(b, s, h, size)


def _softmax_with_zero(logits: jax.Array) -> jax.Array:
    """Softmax over the last dimension with one more score, 0, that is then left out."""
    highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    highest = jnp.maximum(highest, 0.0)
    powers = jnp.exp(logits - highest)
    return powers / (jnp.sum(powers, axis=-1, keepdims=True) + jnp.exp(-highest))
