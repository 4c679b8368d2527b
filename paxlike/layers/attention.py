"""Multi-head attention with grouped keys and values (Ainslie et al. 2023), and its cache for decoding.

Shape legend: b batch, s length, t cache length, d width, h query heads, g key/value heads, k head size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from paxlike import parallel
from paxlike.layers.dropout import Dropout
from paxlike.layers.linear import Initializer, Linear
from paxlike.layers.sequence import Sequence
from paxlike.ops import attention as ops


class Attention(nn.Module):
    """Self-attention: project to queries, keys and values, attend, project back.

    Attributes:
      num_heads, head_dim: query heads and their size.
      num_kv_heads: key/value heads, None for as many as query heads.
      combine_qkv: one weight (d, 3, h, k) for the three projections; only where num_kv_heads equals num_heads.
      causal: a token sees itself and those before it.
      implementation: backend of `ops.attention`.
      query_scale: factor of the scores; None is 1/sqrt(head_dim).
    """

    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None
    combine_qkv: bool = True
    causal: bool = True
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.normal(0.02)
    dropout: float = 0.0
    implementation: ops.Implementation = "auto"
    query_scale: float | None = None
    dtype: str = "float32"
    dot_general_cls: type | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], sequence: Sequence) -> Float[Array, "b s d"]:
        q, k, v = self._project(x)
        if sequence.cache_length:
            context = self._cached(q, k, v, sequence)
        else:
            context = ops.attention(
                q,
                k,
                v,
                causal=self.causal,
                segments=sequence.segments,
                scale=self.query_scale,
                implementation=self.implementation,
            )
        context = parallel.shard(context, "batch", "length", "act_heads", None)
        context = checkpoint_name(context, "context")
        y = self._linear(x.shape[-1], ("heads", "head_dim", "embed"), "out")(context)
        y = checkpoint_name(parallel.shard(y, "batch", "length", "act_embed"), "out_proj")
        return Dropout(self.dropout, name="dropout")(y, train=sequence.train)

    def _project(self, x):
        h, g, size = self.num_heads, self.num_kv_heads or self.num_heads, self.head_dim
        if h % g:
            raise ValueError(f"num_heads={h} is not a multiple of num_kv_heads={g}")
        if self.combine_qkv and g == h:
            qkv = self._linear((3, h, size), ("embed", None, "heads", "head_dim"), "qkv")(x)
            qkv = checkpoint_name(
                parallel.shard(qkv, "batch", "length", None, "act_heads", None), "combined_qkv_proj"
            )
            return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        names = {"query": (h, "heads"), "key": (g, "kv_heads"), "value": (g, "kv_heads")}
        return tuple(
            checkpoint_name(
                parallel.shard(
                    self._linear((heads, size), ("embed", axis, "head_dim"), name)(x),
                    "batch",
                    "length",
                    "act_heads",
                    None,
                ),
                f"{name}_proj",
            )
            for name, (heads, axis) in names.items()
        )

    def _linear(self, features, axes, name) -> Linear:
        return Linear(
            features=features,
            axes=axes,
            use_bias=self.use_bias,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            dot_general_cls=self.dot_general_cls,
            name=name,
        )

    def _cached(self, q, k, v, sequence: Sequence):
        """Writes keys and values behind those already cached, row by row, and attends to all that are there."""
        b, _, g, size = k.shape
        shape = (b, g, sequence.cache_length, size)  # the order in which the scores are summed
        keys = self.variable("cache", "cached_key", jnp.zeros, shape, k.dtype)
        values = self.variable("cache", "cached_value", jnp.zeros, shape, v.dtype)
        keys.value = _write(keys.value, k, sequence)
        values.value = _write(values.value, v, sequence)
        if sequence.offset is None:  # nothing was cached before: the rows see themselves only
            return ops.attention(
                q, k, v, causal=True, scale=self.query_scale, implementation=self.implementation
            )
        # Causality against absolute positions hides what lies beyond each row's own length: it was written by padding.
        return ops.attention(
            q,
            _read(keys.value, sequence),
            _read(values.value, sequence),
            causal=True,
            offset=sequence.offset,
            scale=self.query_scale,
            implementation="xla",
        )


def _write(cache: jax.Array, new: jax.Array, sequence: Sequence) -> jax.Array:
    """`cache`, (b, g, t, k) of one layer or (r, b, g, t, k) of all repeats, with `new` behind what each row has."""
    offset, repeat, new = sequence.offset, sequence.repeat, new.swapaxes(1, 2)
    if offset is None:
        cache = jax.lax.dynamic_update_slice(cache, new, (0, 0, 0, 0))
    elif repeat is None:
        write = lambda row, x, i: jax.lax.dynamic_update_slice(row, x, (0, i, 0))
        cache = jax.vmap(write)(cache, new, offset)
    else:
        # What `vmap` of an update makes, less the transposes of the whole cache around it.
        dimensions = jax.lax.ScatterDimensionNumbers(
            update_window_dims=(1, 2, 3),
            inserted_window_dims=(0,),
            scatter_dims_to_operand_dims=(0, 3),
            operand_batching_dims=(1,),
            scatter_indices_batching_dims=(0,),
        )
        where = jnp.stack([jnp.broadcast_to(repeat, offset.shape), offset], axis=-1)
        cache = jax.lax.scatter(cache, where, new, dimensions, unique_indices=True, mode="clip")
    return parallel.shard(cache, *(None,) * (cache.ndim - 4), "batch", "act_heads", None, None)


def _read(cache: jax.Array, sequence: Sequence) -> jax.Array:
    """Keys or values (b, t, g, k) of this layer."""
    if sequence.repeat is not None:
        cache = jax.lax.dynamic_index_in_dim(cache, sequence.repeat, keepdims=False)
    return parallel.shard(cache, "batch", "act_heads", None, None).swapaxes(1, 2)
