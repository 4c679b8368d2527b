"""A layer behind its norm, as one operation where Transformer Engine is to multiply and has one (`ops.te_fused`)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from paxlike import parallel
from paxlike.layers.norm import LayerNorm, RMSNorm
from paxlike.layers.projection import Projecting
from paxlike.layers.sequence import Sequence
from paxlike.ops import platform, te_fused
from paxlike.ops.attention import is_plain
from paxlike.ops.te import TransformerEngine


def behind(
    norm: nn.Module, layer: nn.Module, x: Float[Array, "b s d"], sequence: Sequence
) -> Float[Array, "b s d"]:
    """`layer(norm(x), sequence)`."""
    if _is_wanted(layer) and not _is_left_out(layer, sequence):
        why = _obstacle(norm, layer, x)
        if why is None:
            return layer(x, sequence, norm.parts(x))
        if any(engine.fused for engine in _engines(layer)):
            path = "/".join(layer.path)
            warnings.warn(
                f"TE_FUSED=True: {path} stays apart from its norm, because {why}", stacklevel=2
            )
    return layer(parallel.gather_length(norm(x)), sequence)


def _engines(layer: nn.Module) -> list[TransformerEngine]:
    made = getattr(layer, "dot_general_cls", None)
    made = list(made.values()) if isinstance(made, Mapping) else [made]
    return [engine for engine in made if isinstance(engine, TransformerEngine)]


def _is_wanted(layer: nn.Module) -> bool:
    return any(engine.fused is not False for engine in _engines(layer))


def _is_left_out(layer: nn.Module, sequence: Sequence) -> bool:
    """Where it would gain nothing: parameters made, FLOPs counted, tokens generated, a plan made (which refuses it)."""
    if layer.is_initializing() or is_plain() or sequence.cache_length:
        return True
    return platform.is_nvidia() and not platform.is_here()


def _obstacle(norm: nn.Module, layer: nn.Module, x) -> str | None:
    """Why they cannot be one operation, as the end of a sentence."""
    if not isinstance(norm, LayerNorm | RMSNorm):
        return f"Transformer Engine has no {type(norm).__name__}"
    names = layer.behind_norm() if isinstance(layer, Projecting) else ()
    if not names:
        return f"Transformer Engine has no {type(layer).__name__} of this shape"
    if not layer.fused(*names):
        return f"{', '.join(names)} have adapters, or are not all multiplied by it in one way"
    dtypes = {str(x.dtype), str(jnp.dtype(norm.dtype)), str(jnp.dtype(layer.dtype))}
    if len(dtypes) > 1:
        return (
            f"residual stream, norm and layer are of different types, {', '.join(sorted(dtypes))}"
        )
    return te_fused.mesh_obstacle()
