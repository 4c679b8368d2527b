"""Multi-head attention with grouped keys and values (Ainslie et al. 2023), and its cache for decoding.

Shape legend: b batch, s length, t cache length, d width, h query heads, g key/value heads, k head size.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from paxlike import parallel
from paxlike.layers.dropout import Dropout
from paxlike.layers.projection import Projecting, whole
from paxlike.layers.sequence import Sequence
from paxlike.layers.sizes import check_at_least
from paxlike.ops import attention as ops
from paxlike.ops import te_fused
from paxlike.ops.attention_kernels import FUSED
from paxlike.ops.biased_attention import biased_attention
from paxlike.ops.context_attention import context_attention
from paxlike.ops.rope import Rope


class Attention(Projecting):
    """Self-attention: project to queries, keys and values, attend, project back.

    Attributes:
      num_heads, head_dim: query heads and their size.
      num_kv_heads: key/value heads, None for as many as query heads.
      combine_qkv: one weight (d, 3, h, k) for the three projections; only where num_kv_heads equals num_heads.
      causal: a token sees itself and those before it.
      window: keys that a query sees at most, itself and those just before it; None for all.
      use_out_bias: a bias on the way back; None: as `use_bias`.
      rope: turns queries and keys by their positions.
      query_norm, key_norm: over the features of each head, before `rope` (Dehghani et al. 2023, section 2).
      query_scale: factor of the scores; None is 1/sqrt(head_dim).
      logit_cap: bound of the scores, see `ops.attention`.
      relative_buckets: a trained bias of each head for so many ranges of distance (T5), None for none.
      relative_init: its initialiser.
      extra_logit: the softmax has one more score of 0 (see `ops.biased_attention`).
      implementation: backend of `ops.attention`.
    """

    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None
    combine_qkv: bool = True
    causal: bool = True
    window: int | None = None
    use_out_bias: bool | None = None
    rope: Rope | None = None
    query_norm: nn.Module | None = None
    key_norm: nn.Module | None = None
    query_scale: float | None = None
    logit_cap: float | None = None
    relative_buckets: int | None = None
    relative_init: Any = nn.initializers.normal(0.02)
    extra_logit: bool = False
    dropout: float = 0.0
    implementation: str = "auto"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b s d"], sequence: Sequence, norm: te_fused.Norm | None = None
    ) -> Float[Array, "b s d"]:
        """Of x, or of norm(x) where one is given."""
        sizes = ("num_heads", "head_dim", "num_kv_heads", "window", "relative_buckets")
        check_at_least(1, self, *sizes)
        q, k, v = self._project(x, sequence, norm)
        if self.query_norm is not None:
            q = self.query_norm(q)
        if self.key_norm is not None:
            k = self.key_norm(k)
        q, k = self._turn(q, k, sequence)
        if sequence.cache_length:
            context = self._cached(q, k, v, sequence)
        else:
            context = self._attend_rows(q, k, v, sequence)
        context = self._values(context)
        context = parallel.shard(context, "batch", "length", "act_heads", None)
        context = checkpoint_name(context, "context")
        axes = ("heads", "head_dim", "embed")
        y = self.projection("out", x.shape[-1], axes, use_bias=self.use_out_bias)(context)
        y = checkpoint_name(parallel.scatter_length(y), "out_proj")
        return Dropout(self.dropout, name="dropout")(y, train=sequence.train)

    def _turn(self, q, k, sequence: Sequence):
        """Queries and keys with their positions."""
        if self.rope is None:
            return q, k
        return self.rope(q, sequence.positions), self.rope(k, sequence.positions)

    def _values(self, context):
        """What the output projection reads."""
        return context

    def behind_norm(self) -> tuple[str, ...]:
        """The projections to queries, keys and values."""
        if self._is_combined:
            return ("qkv",)
        groups = self.num_kv_heads or self.num_heads
        return () if groups % parallel.num_shards("kv_heads") else ("query", "key", "value")

    @property
    def _is_combined(self) -> bool:
        return self.combine_qkv and (self.num_kv_heads or self.num_heads) == self.num_heads

    def _project(self, x, sequence: Sequence, norm: te_fused.Norm | None):
        h, g, size = self.num_heads, self.num_kv_heads or self.num_heads, self.head_dim
        if h % g:
            raise ValueError(f"NUM_HEADS={h} is not a multiple of NUM_KV_HEADS={g}")
        if self._is_combined:
            axes = ("embed", None, "heads", "head_dim")
            if norm is None:
                qkv = self.projection("qkv", (3, h, size), axes)(x)
            else:
                weight = whole(self.weight("qkv", x.shape[-1], (3, h, size), axes), axes)
                qkv = te_fused.product(x, norm, weight)
            qkv = parallel.shard(qkv, "batch", "length", None, "act_heads", None)
            qkv = checkpoint_name(qkv, "combined_qkv_proj")
            return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        made = ("query", h, "heads"), ("key", g, "kv_heads"), ("value", g, "kv_heads")
        if norm is not None:
            parts = self._project_at_once(x, norm, made)
            return tuple(_named(y, name) for y, (name, _, _) in zip(parts, made, strict=True))

        def project(name, heads, axis):
            return _named(
                self.projection(name, (heads, size), ("embed", axis, "head_dim"))(x), name
            )

        return tuple(project(*each) for each in made)

    def _project_at_once(self, x, norm: te_fused.Norm, made):
        """Queries, keys and values as one product, the heads of each group beside one another: so they are spread."""
        g, size, width = self.num_kv_heads or self.num_heads, self.head_dim, x.shape[-1]
        weights = [
            self.weight(name, width, (heads, size), ("embed", axis, "head_dim")).reshape(
                g, heads // g, size
            )
            for name, heads, axis in made
        ]
        weight = whole(te_fused.join(weights, 1), ("embed", "kv_heads", None, "head_dim"))
        y = te_fused.product(x, norm, weight)
        y = parallel.shard(y, "batch", "length", "act_heads", None, None)
        q, k, v = y[..., :-2, :], y[..., -2, :], y[..., -1, :]
        return q.reshape(*q.shape[:2], self.num_heads, size), k, v

    def _attend_rows(self, q, k, v, sequence: Sequence):
        """Attention of whole rows, wherever their tokens are."""
        context = sequence.context
        if context is None:
            return self._attend(q, k, v, segments=sequence.segments)
        if context.is_zigzag:
            if self._is_biased:
                raise ValueError(
                    f"relative positions and the extra logit do not go with CONTEXT_PARALLEL={context.kind}: use "
                    "all_to_all"
                )
            if self.implementation in FUSED:
                raise ValueError(
                    f"cuDNN attention does not serve CONTEXT_PARALLEL={context.kind}: set "
                    "USE_CUDNN_FLASH_ATTENTION=None, or CONTEXT_PARALLEL=all_to_all"
                )
            return context_attention(
                q, k, v, context=context, segments=sequence.segments, **self._scores
            )
        shards = parallel.num_shards("whole_heads")
        for name, heads in (("NUM_HEADS", q.shape[2]), ("NUM_KV_HEADS", k.shape[2])):
            if heads % shards:
                raise ValueError(
                    f"CONTEXT_PARALLEL=all_to_all: {name}={heads} does not divide over {context.axis} x tensor = "
                    f"{shards}; CONTEXT_PARALLEL=ring has no such limit"
                )
        # Named on both sides, so that nothing but what attention reads and returns changes hands.
        q, k, v = (parallel.shard(a, "batch", "length", "act_heads", None) for a in (q, k, v))
        q, k, v = (parallel.shard(a, "batch", None, "whole_heads", None) for a in (q, k, v))
        segments = sequence.segments
        if segments is not None:
            segments = parallel.shard(segments, "batch", None)
        y = self._attend(q, k, v, segments=segments)
        return parallel.shard(y, "batch", None, "whole_heads", None)

    @property
    def _scores(self):
        return {
            "causal": self.causal,
            "scale": self.query_scale,
            "window": self.window,
            "logit_cap": self.logit_cap,
        }

    def _attend_with_bias(self, q, k, v, *, segments=None, offset=None, **_):
        if self.window is not None or self.logit_cap is not None or not self.causal:
            raise ValueError(
                "relative_buckets and extra_logit are for causal attention without window and cap"
            )
        if self.implementation in FUSED:
            raise ValueError(
                "cuDNN attention has no relative bias and no extra logit here: set USE_CUDNN_FLASH_ATTENTION=None"
            )
        table = None
        if self.relative_buckets is not None:
            init = nn.with_logical_partitioning(self.relative_init, ("norm", "heads"))
            shape = (self.relative_buckets, self.num_heads)
            table = self.param("relative", init, shape, jnp.float32)
        return biased_attention(
            q,
            k,
            v,
            table,
            segments=segments,
            offset=offset,
            scale=self.query_scale,
            extra_logit=self.extra_logit,
        )

    @property
    def _is_biased(self) -> bool:
        return self.relative_buckets is not None or self.extra_logit

    def _attend(self, q, k, v, **options):
        if self._is_biased:
            return self._attend_with_bias(q, k, v, **options)
        options = {**self._scores, "implementation": self.implementation, **options}
        return ops.attention(q, k, v, **options)

    def _cached(self, q, k, v, sequence: Sequence):
        """Writes keys and values behind those already cached, row by row, and attends to all that are there."""
        b, _, g, size = k.shape
        shape = (b, g, sequence.cache_length, size)  # the order in which the scores are summed
        keys = self.variable("cache", "cached_key", jnp.zeros, shape, k.dtype)
        values = self.variable("cache", "cached_value", jnp.zeros, shape, v.dtype)
        keys.value = _write(keys.value, k, sequence)
        values.value = _write(values.value, v, sequence)
        if sequence.offset is None:  # nothing was cached before: the rows see themselves only
            return self._attend(q, k, v, causal=True)
        # Causality against absolute positions hides what lies beyond each row's own length: it was written by padding.
        k, v = _read(keys.value, sequence), _read(values.value, sequence)
        return self._attend(
            q, k, v, causal=True, offset=sequence.offset, implementation="reference"
        )


def _named(y: jax.Array, name: str) -> jax.Array:
    y = parallel.shard(y, "batch", "length", "act_heads", None)
    return checkpoint_name(y, f"{name}_proj")


def _write(cache: jax.Array, new: jax.Array, sequence: Sequence) -> jax.Array:
    """`cache`, (b, g, t, k) of one layer or (r, b, g, t, k) of all repeats, with `new` behind what each row has."""
    offset, repeat, new = sequence.offset, sequence.repeat, new.swapaxes(1, 2)
    if offset is None:
        cache = jax.lax.dynamic_update_slice(cache, new, (0, 0, 0, 0))
    else:
        # What `vmap` of an update makes, less the transposes of the whole cache around it.
        dimensions = jax.lax.ScatterDimensionNumbers(
            update_window_dims=(1, 2, 3),
            inserted_window_dims=(0,),
            scatter_dims_to_operand_dims=(0, 3),
            operand_batching_dims=(1,),
            scatter_indices_batching_dims=(0,),
        )
        place = 0 if repeat is None else repeat
        where = jnp.stack([jnp.broadcast_to(place, offset.shape), offset], axis=-1)
        all_ = cache[None] if repeat is None else cache
        all_ = jax.lax.scatter(all_, where, new, dimensions, unique_indices=True, mode="clip")
        cache = all_[0] if repeat is None else all_
    return parallel.shard(cache, *(None,) * (cache.ndim - 4), "batch", "act_heads", None, None)


def _read(cache: jax.Array, sequence: Sequence) -> jax.Array:
    """Keys or values (b, t, g, k) of this layer."""
    if sequence.repeat is not None:
        cache = jax.lax.dynamic_index_in_dim(cache, sequence.repeat, keepdims=False)
    return parallel.shard(cache, "batch", "act_heads", None, None).swapaxes(1, 2)
