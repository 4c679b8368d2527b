"""Scaled dot-product attention (Vaswani et al. 2017, equation 1), by the fastest kernel that can do what is asked.

Shape legend: b batch, s query length, t key length, h query heads, g key/value heads (h is a multiple of g), k head
size.
"""

from __future__ import annotations

import contextlib

from jaxtyping import Array, Float, Int

from paxlike.ops import attention_kernels as kernels
from paxlike.ops.reference_attention import whole_attention
from paxlike.ops.scores import Scores
from paxlike.scoped import Scoped

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
    implementation: str = "auto",
) -> Float[Array, "b s h k"]:
    """Softmax(q k^T * scale) v, the softmax in float32.

    Args:
      causal: query i sees keys up to its own position.
      segments: document numbers of self-attention (s == t); queries see keys of their own document only.
      offset: position of the first query among the keys (`0` where None), for decoding against a cache.
      scale: factor of the scores, 1/sqrt(k) where None.
      window: a query sees this many keys at most, itself and those just before it (Beltagy et al. 2020); causal only.
      logit_cap: scores become cap * tanh(score / cap) (Gemma 2, section 2).
      implementation: a kernel of `ops.attention_kernels`, `auto` for the fastest that can serve, `fused` for
        Transformer Engine's or else cuDNN's.

    Raises:
      ValueError: options that make no sense, a kernel that is not known or cannot serve.
    """
    scores = Scores.checked(
        q.shape[-1], causal=causal, scale=scale, window=window, logit_cap=logit_cap
    )
    if _plain.get():
        return whole_attention(q, k, v, segments, offset, scores=scores, causal=causal)
    request = kernels.Request.of(
        q, k, scores, causal=causal, segments=segments is not None, cache=offset is not None
    )
    return kernels.attend(kernels.choose(request, implementation), q, k, v, segments, offset)
