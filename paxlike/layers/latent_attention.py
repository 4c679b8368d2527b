"""Multi-head latent attention (DeepSeek-V2, 2024, section 2.1): keys and values from one narrow vector for each token.

Positions turn a part of each query and one more key that all heads share. Values may be narrower than keys. Generating
keeps the keys and values of all heads, as `Attention` does, not the narrow vector.

Shape legend: b batch, s length, d width, h heads, n features without position, r features with, v of a value.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn

from paxlike import parallel
from paxlike.layers.attention import Attention
from paxlike.layers.sequence import Sequence


class LatentAttention(Attention):
    """Attention whose projections are products of two, with a norm between.

    `head_dim` is n + r; `rope` turns the last r features.

    Attributes:
      rope_dim: r.
      value_dim: v, at most `head_dim`.
      query_rank: width between the two projections of queries; None: there is one.
      key_rank: width of the vector that keys and values are made of.
      query_latent_norm, key_latent_norm: between the two projections.
    """

    rope_dim: int = 64
    value_dim: int = 128
    query_rank: int | None = None
    key_rank: int = 512
    query_latent_norm: nn.Module | None = None
    key_latent_norm: nn.Module | None = None

    def behind_norm(self) -> tuple[str, ...]:
        """None: its first products make narrow vectors, which have norms of their own."""
        return ()

    def _project(self, x, sequence: Sequence, norm=None):
        h, size, r = self.num_heads, self.head_dim, self.rope_dim
        plain = size - r
        if self.value_dim > size or plain < 1:
            raise ValueError(
                f"VALUE_DIMS_PER_HEAD={self.value_dim} must be at most {size}, the size of a head, of which "
                f"ROPE_DIMS_PER_HEAD={r} must leave some"
            )
        if self.query_rank is None:
            q = self.projection("query", (h, size), ("embed", "heads", "head_dim"))(x)
        else:
            low = self.projection("query_a", self.query_rank, ("embed", None))(x)
            low = low if self.query_latent_norm is None else self.query_latent_norm(low)
            q = self.projection("query_b", (h, size), (None, "heads", "head_dim"))(low)
        low = self.projection("key_a", self.key_rank + r, ("embed", None))(x)
        low, turned = low[..., : self.key_rank], low[..., None, self.key_rank :]
        low = low if self.key_latent_norm is None else self.key_latent_norm(low)
        both = (h, plain + self.value_dim)
        kv = self.projection("key_b", both, (None, "heads", "head_dim"))(low)
        q, kv = (parallel.shard(a, "batch", "length", "act_heads", None) for a in (q, kv))
        q_turned = q[..., plain:]
        if self.rope is not None:
            q_turned = self.rope(q_turned, sequence.positions)
            turned = self.rope(turned, sequence.positions)
        q = jnp.concatenate([q[..., :plain], q_turned], axis=-1)
        turned = jnp.broadcast_to(turned, (*q.shape[:3], r))
        k = jnp.concatenate([kv[..., :plain], turned], axis=-1)
        # Attention wants values as wide as keys: what is added is 0, and is cut off again.
        wide = ((0, 0), (0, 0), (0, 0), (0, size - self.value_dim))
        return q, k, jnp.pad(kv[..., plain:], wide)

    def _turn(self, q, k, sequence: Sequence):
        return q, k  # they were where they are made

    def _values(self, context):
        return context[..., : self.value_dim]
