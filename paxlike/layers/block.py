"""One residual block: a mixer over the sequence, then a feed-forward, each behind its norm."""

from __future__ import annotations

from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from paxlike import parallel
from paxlike.layers import fused
from paxlike.layers.sequence import Sequence


class Block(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)) (pre-norm, Xiong et al. 2020).

    Attributes:
      mixer, ffn: modules called with `(x, sequence)`, each behind its norm (see also `layers.fused`).
      mixer_norm, ffn_norm: modules called with `x`.
      mixer_post_norm, ffn_post_norm: of what comes out of each half, before it is added (Gemma 2).
    """

    mixer: nn.Module
    ffn: nn.Module
    mixer_norm: nn.Module
    ffn_norm: nn.Module
    mixer_post_norm: nn.Module | None = None
    ffn_post_norm: nn.Module | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], sequence: Sequence) -> Float[Array, "b s d"]:
        y = fused.behind(self.mixer_norm, self.mixer, x, sequence)
        x = x + (y if self.mixer_post_norm is None else self.mixer_post_norm(y))
        y = fused.behind(self.ffn_norm, self.ffn, x, sequence)
        x = x + (y if self.ffn_post_norm is None else self.ffn_post_norm(y))
        return checkpoint_name(
            parallel.shard(x, "batch", "residual_length", "act_embed"), "transformer_layer_out"
        )
