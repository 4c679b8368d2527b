"""What `paxlike.ops.te` uses of Transformer Engine, by our own products: for where it is not installed."""

import contextlib
import dataclasses
import types

import jax
import jax.numpy as jnp

from paxlike.ops import fp8
from paxlike.ops.reference_attention import whole_attention
from paxlike.ops.scores import Scores


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Quantizer:
    """Scale (1,) and history (2,) of one tensor; None for current scaling."""

    scale: object = None
    amax_history: object = None


@dataclasses.dataclass
class Recipe:
    margin: int = 0
    amax_history_len: int = 1024


@jax.custom_vjp
def _dense(x, kernel, quantizers):
    return _forward(x, kernel, quantizers)[0]


def _forward(x, kernel, quantizers):
    tops = [float(jnp.finfo(t).max) for t in (fp8.FORWARD, fp8.FORWARD, fp8.BACKWARD)]
    peaks = None
    if quantizers[0].scale is not None:
        peaks = jnp.stack([top / q.scale[0] for top, q in zip(tops, quantizers)])
    y, back = jax.vjp(lambda x, w, p: fp8.product(x, w, p), x, kernel, peaks)
    return y, (back, quantizers)


def _backward(residuals, dy):
    back, quantizers = residuals
    dx, dw, seen = back(dy)
    if seen is not None:
        # Entered in front, turned by one, and the first place cleared.
        after = [
            jnp.roll(q.amax_history.at[0].set(s), -1).at[0].set(0) for q, s in zip(quantizers, seen)
        ]
        quantizers = [Quantizer(q.scale, history) for q, history in zip(quantizers, after)]
    return dx, dw, quantizers


_dense.defvjp(_forward, _backward)


def dense(x, kernel, contracting_dims, quantizer_set=None):
    assert contracting_dims == ((x.ndim - 1,), (0,))
    if quantizer_set is None:
        return jax.lax.dot_general(x, kernel, (contracting_dims, ((), ())))
    return _dense(x, kernel, list(quantizer_set))


class Factory:
    @staticmethod
    def create_set(*, fp8_recipe, quantize_meta_set):
        return quantize_meta_set


@dataclasses.dataclass
class MeshResource:
    dp_resource: str | None = None
    tp_resource: str | None = None
    fsdp_resource: str | None = None
    pp_resource: str | None = None
    cp_resource: str | None = None
    ep_resource: str | None = None


guards: list[MeshResource] = []


@contextlib.contextmanager
def guard(resource):
    guards.append(resource)
    yield


def fused_attn(
    qkv,
    bias,
    sequence_descriptor,
    seed,
    *,
    attn_bias_type,
    attn_mask_type,
    qkv_layout,
    softmax_type,
    scaling_factor,
    dropout_probability,
    is_training,
    window_size=None,
):
    q, k, v = qkv
    assert bias is None and seed is None and dropout_probability == 0.0 and is_training
    assert (attn_bias_type, qkv_layout, softmax_type) == ("none", "bshd", "vanilla")
    assert [a.shape for a in sequence_descriptor] == [q.shape[:1], k.shape[:1]]
    assert guards[-1] == MeshResource()
    window = None
    if window_size is not None:
        left, right = window_size
        assert right == 0
        window = left + 1
    scores = Scores(scaling_factor, window, None)
    return whole_attention(q, k, v, None, scores=scores, causal=attn_mask_type == "causal")


def modules():
    """Name -> module."""
    recipe = types.ModuleType("transformer_engine.common.recipe")
    recipe.DelayedScaling = recipe.Float8CurrentScaling = Recipe
    engine = types.ModuleType("transformer_engine.jax")
    engine.MeshResource = MeshResource
    engine.dense = types.SimpleNamespace(dense=dense)
    engine.sharding = types.SimpleNamespace(global_shard_guard=guard)
    engine.attention = types.SimpleNamespace(
        fused_attn=fused_attn,
        SequenceDescriptor=types.SimpleNamespace(from_seqlens=lambda pair: pair),
        AttnBiasType=types.SimpleNamespace(NO_BIAS="none"),
        AttnMaskType=types.SimpleNamespace(CAUSAL_MASK="causal", NO_MASK="no"),
        QKVLayout=types.SimpleNamespace(BSHD_BSHD_BSHD="bshd"),
        AttnSoftmaxType=types.SimpleNamespace(VANILLA_SOFTMAX="vanilla"),
    )
    engine.quantize = types.SimpleNamespace(
        QuantizeMeta=Quantizer,
        QuantizeMetaSet=lambda x, kernel, grad: [x, kernel, grad],
        QuantizerFactory=Factory,
        is_quantize_recipe_supported=lambda name: (
            name != "MXFP8BlockScaling",
            "it needs Blackwell",
        ),
    )
    return {
        "transformer_engine": types.ModuleType("transformer_engine"),
        "transformer_engine.common": types.ModuleType("transformer_engine.common"),
        "transformer_engine.common.recipe": recipe,
        "transformer_engine.jax": engine,
    }
