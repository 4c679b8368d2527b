"""What `paxlike.ops.te` uses of Transformer Engine, by our own products: for where it is not installed."""

import contextlib
import dataclasses
import types

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

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


def layernorm_dense(
    x,
    kernel,
    gamma,
    beta,
    bias=None,
    norm_type="layernorm",
    zero_centered_gamma=False,
    epsilon=1e-6,
    transpose_batch_sequence=False,
    layernorm_input_axes=None,
    dot_input_axes=None,
    kernel_axes=None,
    quantizer_set=None,
):
    assert kernel_axes is None and not transpose_batch_sequence
    x = _constrained(x, layernorm_input_axes)
    x = normed(x, gamma, beta, norm_type, zero_centered_gamma, epsilon)
    y = dense(_constrained(x, dot_input_axes), kernel, ((x.ndim - 1,), (0,)), quantizer_set)
    return y if bias is None else y + bias


def layernorm_mlp(
    x,
    gamma,
    beta,
    kernels,
    biases,
    norm_type,
    zero_centered_gamma=False,
    epsilon=1e-6,
    transpose_batch_sequence=False,
    norm_input_axes=None,
    dot_1_input_axes=None,
    dot_2_input_axes=None,
    kernel_1_axes=None,
    kernel_2_axes=None,
    ffn1_ckpt_name="ffn1",
    ffn2_ckpt_name="ffn2",
    activation_type=("gelu",),
    activation_params=None,
    collective_op_sets=None,
    quantizer_sets=(None, None),
):
    assert kernel_1_axes is kernel_2_axes is activation_params is collective_op_sets is None
    (one, two), (bias_1, bias_2), (first, second) = kernels, biases, quantizer_sets
    assert one.shape[1] == len(activation_type) and not transpose_batch_sequence
    if first is not None:  # the gradients of the two outputs are rounded by the other's
        first, second = [*first[:2], second[2]], [*second[:2], first[2]]
    x = _constrained(x, norm_input_axes)
    x = normed(x, gamma, beta, norm_type, zero_centered_gamma, epsilon)
    x = dense(_constrained(x, dot_1_input_axes), one, ((x.ndim - 1,), (0,)), first)
    x = checkpoint_name(x if bias_1 is None else x + bias_1, ffn1_ckpt_name)
    hidden = _constrained(activated(x, activation_type), dot_2_input_axes)
    y = dense(hidden, two, ((x.ndim - 2,), (0,)), second)
    y = _constrained(y if bias_2 is None else y + bias_2, dot_1_input_axes)
    return checkpoint_name(y, ffn2_ckpt_name)


def activated(x, activation_type):
    """The product of its functions of the parts (..., n, f)."""
    known = {"gelu": jax.nn.gelu, "relu": jax.nn.relu, "silu": jax.nn.silu, "linear": lambda x: x}
    y = 1.0
    for i, name in enumerate(activation_type):
        y = y * known[name](x[..., i, :])
    return y


def normed(x, gamma, beta, norm_type, zero_centered_gamma, epsilon):
    assert gamma.dtype == x.dtype  # it has kernels for no other
    wide = x.astype(jnp.float32)
    if norm_type == "layernorm":
        assert beta.dtype == x.dtype
        wide = wide - jnp.mean(wide, -1, keepdims=True)
    else:
        assert norm_type == "rmsnorm" and beta is None and not zero_centered_gamma
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + epsilon)
    wide = wide * (gamma.astype(jnp.float32) + (1.0 if zero_centered_gamma else 0.0))
    return (wide if beta is None else wide + beta.astype(jnp.float32)).astype(x.dtype)


told: set[tuple] = set()  # (logical axes, mesh axes)


def _constrained(x, axes):
    assert len(axes) == x.ndim and nn.get_logical_axis_rules()
    spec = nn.logical_to_mesh_axes(axes)
    told.add((axes, tuple(spec)))
    if any(spec):
        return jax.lax.with_sharding_constraint(x, spec)
    return x


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
    engine.layernorm_dense = types.SimpleNamespace(layernorm_dense=layernorm_dense)
    engine.layernorm_mlp = types.SimpleNamespace(layernorm_mlp=layernorm_mlp)
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
