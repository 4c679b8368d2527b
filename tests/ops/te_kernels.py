"""Kernels of Transformer Engine, imitated on a CPU, one device's part at a time.

Its operations are divided over a mesh by rules of their own, around their kernels. With kernels that run, what comes
out on a mesh can be compared with one device without a GPU. Norms have to have `EPSILON`: the backward kernel reads
what the forward one left, and is told none.
"""

import importlib
import sys

import jax
import jax.numpy as jnp
from jax.interpreters import mlir

from tests.ops import te_stand_in

EPSILON = 1e-6


def install(monkeypatch):
    """Makes Transformer Engine use its kernels, which this process then has for delayed scaling and without FP8."""
    answer_for_the_driver(monkeypatch)
    its = lambda module: sys.modules[f"transformer_engine.jax.cpp_extensions.{module}"]
    activations = {int(kind): names for names, kind in its("activation").ActivationEnum.items()}
    layer_norm = importlib.import_module("transformer_engine_jax").NVTE_Norm_Type.LayerNorm

    def normed(x, gamma, beta, norm_type, zero_centered, epsilon=EPSILON):
        if norm_type != layer_norm:
            return te_stand_in.normed(x, gamma, None, "rmsnorm", zero_centered, epsilon)
        return te_stand_in.normed(x, gamma, beta, "layernorm", zero_centered, epsilon)

    def norm(avals, x, scale, _, *vectors, norm_type, zero_centered_gamma, epsilon, **__):
        arrays = (array.astype("float32") for array in (x, *vectors))
        y = normed(*arrays, norm_type, zero_centered_gamma, epsilon)
        return *rounded(avals, y, scale), *zeros(avals[5:])

    def norm_backward(avals, dy, x, mu, rsigma, gamma, *, norm_type, zero_centered_gamma):
        call = lambda *arrays: normed(*arrays, norm_type, zero_centered_gamma)
        dx, dgamma, dbeta = jax.vjp(call, x, gamma, jnp.zeros_like(gamma))[1](dy)
        return dx, dgamma, dbeta[: avals[2].shape[0]], *zeros(avals[3:])

    def gemm(avals, x, x_scale, w, w_scale, bias, *_, contracting_dims, **__):
        x, w = x.astype("float32"), w.astype("float32")
        y = jax.lax.dot_general(x, w, (contracting_dims, ((), ())))
        y = (y * x_scale * w_scale if x_scale.size else y).astype(avals[0].dtype)
        return y + bias if bias.size else y, *zeros(avals[1:])

    def activation(avals, x, scale, _, *, act_enum, **__):
        y = te_stand_in.activated(x.astype("float32"), activations[int(act_enum)])
        return rounded(avals, y, scale)

    def activation_backward(avals, dy, x, scale, _, *, act_enum, is_dbias, **__):
        call = lambda x: te_stand_in.activated(x, activations[int(act_enum)])
        (dx,) = jax.vjp(call, x.astype("float32"))[1](dy.astype("float32"))
        return *rounded(avals, dx, scale), *bias_gradient(avals, dx, is_dbias, 2)

    def quantize(avals, x, scale, *_, is_dbias, flatten_axis, **__):
        x = x.astype("float32")
        return *rounded(avals, x, scale), *bias_gradient(avals, x, is_dbias, -flatten_axis)

    for module, name, kernel in (
        ("normalization", "NormFwdPrimitive", norm),
        ("normalization", "NormBwdPrimitive", norm_backward),
        ("gemm", "GemmPrimitive", gemm),
        ("activation", "ActLuPrimitive", activation),
        ("activation", "DActLuDBiasQuantizePrimitive", activation_backward),
        ("activation", "DActLuQuantizePrimitive", activation_backward),
        ("quantization", "DBiasQuantizePrimitive", quantize),
        ("quantization", "QuantizePrimitive", quantize),
    ):
        primitive = getattr(its(module), name).inner_primitive
        mlir.register_lowering(primitive, _rule(kernel), platform="cpu")


def rounded(avals, y, scale):
    """`y` in the type wanted, by a scale where that has 8 bits: the five results with which its kernels begin."""
    wanted, transposed, inverse, *_ = avals
    peak = jnp.max(jnp.abs(y)).reshape(1)
    factor = zeros([inverse])[0]
    if wanted.dtype.itemsize == 1:
        top = float(jnp.finfo(wanted.dtype).max)
        y, factor = jnp.clip(y * scale, -top, top), 1.0 / scale
    return y.astype(wanted.dtype), *zeros([transposed]), factor, *zeros(avals[3:4]), peak


def bias_gradient(avals, dy, is_dbias, features):
    """The results behind those five, of a gradient whose last dimensions are `features`."""
    if not is_dbias:
        return zeros(avals[5:])
    summed = jnp.sum(dy, axis=tuple(range(dy.ndim - features)))
    return summed.astype(avals[5].dtype), *zeros(avals[6:])


def zeros(avals):
    """What nobody reads."""
    return [jnp.zeros(aval.shape, aval.dtype) for aval in avals]


def _rule(kernel):
    def lower(ctx, *arguments, **options):
        call = lambda *arrays: kernel(ctx.avals_out, *arrays, **options)
        with jax.numpy_rank_promotion("allow"):
            return mlir.lower_fun(call, multiple_results=True)(ctx, *arguments)

    return lower


def answer_for_the_driver(monkeypatch):
    """What asks a driver that is not there."""
    driver = importlib.import_module("transformer_engine_jax")
    for name in ("norm_fwd", "norm_bwd", "dbias_quantize", "dact_dbias_quantize"):
        sizes = lambda *_: (((1,), driver.DType.kByte),)
        monkeypatch.setattr(driver, f"get_{name}_workspace_sizes", sizes)
    gemm = sys.modules["transformer_engine.jax.cpp_extensions.gemm"]
    for module in (driver, gemm):
        monkeypatch.setattr(module, "get_device_compute_capability", lambda number=0: 90)
    monkeypatch.setenv("NVTE_JAX_CUSTOM_CALLS", "true")
