"""Scaled dot-product attention (Vaswani et al. 2017, equation 1) with interchangeable backends.

Shape legend: b batch, s query length, t key length, h query heads, g key/value heads (h is a multiple of g), k head
size.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from paxlike import compat, parallel
from paxlike.ops import platform
from paxlike.scoped import Scoped

Implementation = Literal["auto", "xla", "cudnn"]
IMPLEMENTATIONS = ("auto", "xla", "cudnn")
CPU_BLOCK = 128  # queries; smaller ones do not fill the matrix product of a CPU


_plain = Scoped("plain", False)


def plain() -> contextlib.AbstractContextManager[None]:
    """Inside it every attention is traced as the plain reference: FLOPs are counted on that, whatever backend runs."""
    return _plain.set(True)


def is_plain() -> bool:
    """Whether this is traced inside `plain`."""
    return _plain.get()


def attention(
    q: Float[Array, "b s h k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t g k"],
    *,
    causal: bool,
    segments: Int[Array, "b s"] | None = None,
    offset: Int[Array, "b"] | None = None,
    scale: float | None = None,
    window: int | None = None,
    logit_cap: float | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "b s h k"]:
    """Softmax(q k^T * scale) v, the softmax in float32.

    Args:
      causal: query i sees keys up to its own position.
      segments: document numbers of self-attention (s == t); queries see keys of their own document only.
      offset: position of the first query among the keys (`0` where None), for decoding against a cache.
      scale: factor of the scores, 1/sqrt(k) where None.
      window: a query sees this many keys at most, itself and those just before it (Beltagy et al. 2020); causal only.
      logit_cap: scores become cap * tanh(score / cap) (Gemma 2, section 2).
      implementation: `xla` is the plain reference; `cudnn` is fused attention on NVIDIA GPUs; `auto` takes cudnn where
        it can serve (NVIDIA GPU, 16-bit inputs, head size a multiple of 8 up to 128, 256 on Hopper, no cache, no cap)
        and xla elsewhere.
    """
    scores = Scores.checked(
        q.shape[-1], causal=causal, scale=scale, window=window, logit_cap=logit_cap
    )
    reference = causal_attention if causal else full_attention
    if _plain.get():
        return reference(q, k, v, segments, offset, scores=scores)
    if implementation == "auto":
        implementation = "xla" if _why_not_cudnn(q, segments, offset, scores) else "cudnn"
    if implementation == "cudnn":
        if reason := _why_not_cudnn(q, segments, offset, scores):
            raise ValueError(
                f"cuDNN attention {reason}: set USE_CUDNN_FLASH_ATTENTION=None, which takes it where it can serve"
            )
        return _on_each_device(_fused(scores, causal), q, k, v, segments)
    if implementation != "xla":
        raise ValueError(
            f"attention implementation '{implementation}' is none of {', '.join(IMPLEMENTATIONS)}"
        )
    if causal and offset is None and _num_blocks(q.shape[1], k.shape[1]) > 1:
        return causal_attention_in_blocks(q, k, v, segments, scores=scores)
    return reference(q, k, v, segments, offset, scores=scores)


def _fused(scores: Scores, causal: bool):
    """cuDNN's attention as a function of (q, k, v, segments)."""

    def attend(q, k, v, segments):
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=None if segments is None else _segment_mask(segments),
            scale=scores.scale,
            is_causal=causal,
            local_window_size=None if scores.window is None else (scores.window - 1, 0),
            implementation="cudnn",
        )

    return attend


def _on_each_device(attend, q, k, v, segments):
    """`attend`, mapped by hand over the rest of the mesh where some axes are mapped by hand already (a pipeline).

    The partitioner of the fused kernel cannot be called there.
    """
    free = compat.current_mesh_shape()
    if not compat.in_manual_region() or math.prod(free.values()) == 1:
        return attend(q, k, v, segments)
    heads = parallel.spec("batch", None, "act_heads", None)
    rows = parallel.spec("batch", None)
    return jax.shard_map(
        attend,
        in_specs=(heads, heads, heads, None if segments is None else rows),
        out_specs=heads,
        axis_names=set(free),
        check_vma=False,
    )(q, k, v, segments)


class Scores(NamedTuple):
    """What becomes of q k^T; a static argument."""

    scale: float
    window: int | None
    logit_cap: float | None

    @classmethod
    def checked(
        cls,
        head_dim: int,
        *,
        causal: bool,
        scale: float | None,
        window: int | None,
        logit_cap: float | None,
    ) -> Scores:
        """From the arguments of `attention`; ValueError where they make no sense."""
        if window is not None and (window < 1 or not causal):
            raise ValueError(f"a window of {window} needs causal attention and at least 1 key")
        if logit_cap is not None and logit_cap <= 0:
            raise ValueError(f"a logit cap of {logit_cap} must be above 0 (None for none)")
        return cls(head_dim**-0.5 if scale is None else scale, window, logit_cap)


def _reference(q, k, v, segments, offset, *, scores: Scores, causal: bool):
    b, s, h, size = q.shape
    t, groups = k.shape[1], k.shape[2]
    mask = _mask(s, t, segments, offset, scores.window, causal)
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wide_product(form: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """The contraction `form`, its result in float32.

    Differentiation would multiply float32 cotangents with 16-bit operands, which tensor cores cannot; they are rounded
    to the operands' type first, as fused attention does.
    """
    return jnp.einsum(form, a, b, preferred_element_type=jnp.float32)


def _wide_product_backward(form, operands, cotangent):
    a, b = operands
    (of_a, of_b), of_result = form.split("->")[0].split(","), form.split("->")[1]
    cotangent = cotangent.astype(a.dtype)
    return (
        jnp.einsum(f"{of_result},{of_b}->{of_a}", cotangent, b),
        jnp.einsum(f"{of_result},{of_a}->{of_b}", cotangent, a),
    )


_wide_product.defvjp(lambda form, a, b: (_wide_product(form, a, b), (a, b)), _wide_product_backward)


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


def _segment_mask(segments: jax.Array) -> jax.Array:
    return (segments[:, :, None] == segments[:, None, :])[:, None]


def _num_blocks(s: int, t: int) -> int:
    """Blocks of queries on a CPU, at most four so that the program stays short; 1 elsewhere."""
    if s != t or not platform.is_cpu():
        return 1
    return next((n for n in (4, 3, 2) if s % n == 0 and s // n >= CPU_BLOCK), 1)


def _why_not_cudnn(q: jax.Array, segments, offset, scores: Scores) -> str | None:
    """What keeps cuDNN's fused attention from these inputs; None where it serves."""
    if not platform.is_nvidia():
        return f"needs an NVIDIA GPU and this is a {platform.name()}"
    capability, size = platform.compute_capability(), q.shape[-1]
    limit = 256 if capability >= 9.0 else 128
    if capability < 8.0:
        return f"needs compute capability 8.0 and this GPU has {capability}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs 16-bit inputs and these are {q.dtype}"
    if size % 8 or size > limit:
        return f"needs heads of a multiple of 8 up to {limit} and these have {size}"
    if segments is not None and q.shape[1] % 2:
        return f"of packed rows needs an even length and this is {q.shape[1]}"
    if offset is not None:
        return "does not read a cache"
    if scores.logit_cap is not None:
        return f"has no cap of the scores and ATTEN_LOGIT_CAP is {scores.logit_cap}"
    return None
