"""Transformer Engine as a backend: the numbers, the parameters and the state of our own FP8.

With Transformer Engine (scripts/build_te_cpu.sh) its own CPU forms are tested, else a stand-in of the same interface
tests what lies around it.
"""

import dataclasses
import importlib
import inspect
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from parallel import meshes

from paxlike import parallel
from paxlike.layers.linear import Linear
from paxlike.layers.lora import Lora
from paxlike.log.flops import matmul_flops
from paxlike.ops import attention, fp8, platform, te
from paxlike.ops import attention_kernels as kernels
from paxlike.ops.fp8 import Fp8
from paxlike.ops.scores import Scores
from paxlike.ops.te import TransformerEngine
from tests.ops import te_stand_in
from tests.ops.te_models import assert_same_state, net_of


def operands():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 16, 48))
    w = 0.02 * jax.random.normal(keys[1], (48, 2, 32))
    return x, w, 1e-6 * jax.random.normal(keys[2], (2, 16, 2, 32))


@pytest.mark.parametrize(
    ("recipe", "margin"), [("delayed", 0), ("delayed", 1), ("current", 0), (None, 0)]
)
def test_products_and_what_is_seen_are_ours(engine, recipe, margin):
    x, w, dy = operands()
    peaks = None
    if recipe == "delayed":
        peaks = jnp.stack([jnp.max(jnp.abs(t)) for t in (x, w, dy)])
    ours = lambda x, w, p: fp8.product(x, w, p, margin)
    if recipe is None:
        ours = lambda x, w, p: jnp.einsum("bsp,pcq->bscq", x, w)
    expected, expected_back = jax.vjp(ours, x, w, peaks)
    found, back = jax.vjp(lambda x, w, p: te.product(x, w, p, recipe, margin), x, w, peaks)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(back(dy), expected_back(dy)):
        if one is not None:
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-10)


def in_blocks(x, axis):
    """`x` with each 32 values along `axis` rounded to E4M3, by a power of two that they share (OCP MX, 2023)."""
    moved = np.moveaxis(np.asarray(x, np.float32), axis, -1)
    blocks = moved.reshape(*moved.shape[:-1], -1, 32)
    peak = np.abs(blocks).max(-1, keepdims=True)
    power = 2.0 ** np.ceil(np.log2(peak / 448.0))
    rounded = np.asarray((blocks / power).astype(jnp.float8_e4m3fn), np.float32) * power
    return np.moveaxis(rounded.reshape(moved.shape), -1, axis)


def test_blocks_of_32_are_rounded_as_the_standard_says(engine, monkeypatch):
    """MXFP8 up to the product itself, which no CPU has: products of what Transformer Engine has rounded."""
    if engine == "stand-in":
        pytest.skip("the stand-in has no blocks")

    def multiply(x, w, x_scales, w_scales, preferred_element_type):
        wide = lambda t, s: t.astype("float32") * jnp.repeat(s.astype("float32"), 32, axis=-1)
        y = jnp.einsum("bmk,bnk->bmn", wide(x, x_scales), wide(w, w_scales))
        return y.astype(preferred_element_type)

    monkeypatch.setattr(jax.nn, "scaled_matmul", multiply)
    keys = jax.random.split(jax.random.key(0), 4)
    # Blocks of very different size.
    size = jnp.exp2(jax.random.randint(keys[3], (64, 1), -12, 4).astype("float32"))
    x = jax.random.normal(keys[0], (64, 96)) * size
    w, dy = 0.02 * jax.random.normal(keys[1], (96, 32)), jax.random.normal(keys[2], (64, 32))
    found, back = jax.vjp(lambda x, w: te.product(x, w, None, "mxfp8"), x, w)
    dx, dw = back(dy)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(b).max())
    close(found, in_blocks(x, 1) @ in_blocks(w, 0))
    close(dx, in_blocks(dy, 1) @ in_blocks(w, 1).T)
    close(dw, in_blocks(x, 0).T @ in_blocks(dy, 0))


def test_the_same_parameters_and_state_and_training_goes_on_by_either(engine):
    """Two steps of ours, and of Transformer Engine from the same state: a checkpoint serves both.

    In the second block its norms are part of its products.
    """
    options = {"compiler_options": meshes.IN_HASTE}
    ours = Fp8(amax_history=4)
    ours = tiny.Trainer(net=net_of(ours, ours, remat="SAVE_DOT_ONLY"), **options)
    product = TransformerEngine("delayed", amax_history=4)
    behind_norms = dataclasses.replace(product, fused=None)
    net = net_of(product, behind_norms, remat="SAVE_DOT_ONLY")
    theirs = tiny.Trainer(net=net, **options)
    describe = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert describe(theirs.abstract) == describe(ours.abstract)
    ours.step(ours.data[0])
    theirs.state = jax.device_put(jax.device_get(ours.state), theirs.shardings)
    for batch in ours.data[1:3]:
        np.testing.assert_allclose(
            theirs.step(batch)["loss"].value(), ours.step(batch)["loss"].value(), rtol=1e-4
        )
    assert_same_state(ours, theirs, steps=3)


def test_parameters_without_fp8_are_those_without_it(engine):
    plain = meshes.init(tiny.model(layers=2, width=32))
    found = meshes.init(net_of(TransformerEngine()))
    jax.tree.map(np.testing.assert_array_equal, found, plain)


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tensor": 2}, {"data": 2, "pipeline": 2}], ids=str)
def test_on_a_mesh_it_is_told_the_axes(engine, sizes):
    product = TransformerEngine("current", fused=None)
    net = net_of(product, remat="SAVE_NOTHING", llama="tensor" in sizes)
    stack = net.stack.clone(pipeline=net.stack.pipeline.__class__(2))
    net, batch = net.clone(stack=stack), tiny.batches(1)[0]
    params = meshes.init(net)
    alone = meshes.loss_and_gradients(net, params, batch, {"data": 1})
    te_stand_in.guards.clear()
    te_stand_in.told.clear()
    found = meshes.loss_and_gradients(net, params, batch, sizes)
    np.testing.assert_allclose(found[0], alone[0], rtol=1e-3)
    # In 8 bits a sum in another order is rounded the other way; in a pipeline, each device scales the rows it holds.
    assert meshes.distance(found[1], alone[1]) < (2e-2 if "tensor" in sizes else 0.1)
    if engine == "stand-in" and "tensor" in sizes:
        asked = te_stand_in.MeshResource(fsdp_resource="fsdp", tp_resource="tensor")
        assert te_stand_in.guards
        assert all(resource == asked for resource in te_stand_in.guards)
        assert te_stand_in.told == {
            (("batch", "length", "act_embed"), ("fsdp", None, None)),
            (("batch", "length", "act_mlp"), ("fsdp", None, "tensor")),
        }


def test_the_stand_in_is_called_as_it_is(real_engine):
    """Its arguments are those of the real one, in their order."""
    for name in ("dense.dense", "layernorm_dense.layernorm_dense", "layernorm_mlp.layernorm_mlp"):
        module, function = name.split(".")
        real = getattr(importlib.import_module(f"transformer_engine.jax.{module}"), function)
        theirs = inspect.signature(real).parameters
        ours = inspect.signature(getattr(te_stand_in, function)).parameters
        if function != "dense":
            assert list(ours) == list(theirs)
        assert set(ours) <= set(theirs)
        needed = {name for name, each in theirs.items() if each.default is each.empty}
        assert needed <= set(ours)


def test_adapters_beside_it(engine):
    layer = Linear(32, ("embed", "mlp"), dot_general_cls=TransformerEngine("current"))
    x = operands()[0]
    plain = layer.init(jax.random.key(0), x)
    adapted = layer.clone(adapter=Lora(rank=2))
    both = adapted.init(jax.random.key(0), x)
    assert set(both["params"]) == {"kernel", "bias", "lora"}
    np.testing.assert_array_equal(adapted.apply(both, x), layer.apply(plain, x))


def test_flops_are_counted_on_products_that_can_be_seen(engine):
    layer = Linear(32, ("embed", "mlp"), dot_general_cls=TransformerEngine("current"))
    x = operands()[0]
    params = layer.init(jax.random.key(0), x)

    def forward(x):
        with attention.plain():
            return layer.apply(params, x)

    assert matmul_flops(forward, x) == 2 * 2 * 16 * 48 * 32


def heads(heads=4, kv_heads=2, dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(4, 24, h, 16) for h in (heads, kv_heads, kv_heads)]
    return [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes)]


def attend(q, k, v, *, causal=True, window=None):
    """By the kernel, whatever device this is."""
    scores = Scores(0.25, window, None)
    return kernels.find("te").attend(q, k, v, None, None, scores=scores, causal=causal)


@pytest.mark.parametrize("options", [{}, {"window": 5}, {"causal": False}], ids=str)
def test_attention_is_asked_for_what_is_wanted(engine, monkeypatch, options):
    """The stand-in gives the numbers; of the real one the call for a GPU is made, forward and backward."""
    q, k, v = heads()
    if engine == "stand-in":
        expected = attention.attention(
            q, k, v, scale=0.25, implementation="reference", **{"causal": True, **options}
        )
        np.testing.assert_allclose(attend(q, k, v, **options), expected, rtol=1e-5, atol=1e-6)
        return
    calls = cuda_calls(monkeypatch, lambda *a: attend(*a, **options), heads(dtype="bfloat16"))
    window = options.get("window")
    asked = {
        "attn_heads": 4,
        "num_gqa_groups": 2,
        "q_max_seqlen": 24,
        "scaling_factor": "2.500000e-01",
        "window_size_left": -1 if window is None else window - 1,
        # NVTE_NO_MASK and NVTE_CAUSAL_MASK of its fused_attn.h
        "mask_type": 2 if options.get("causal", True) else 0,
    }
    assert [name for name, _ in calls] == [
        "te_fused_attn_forward_ffi",
        "te_fused_attn_backward_ffi",
    ]
    for _, config in calls:
        for name, value in asked.items():
            assert f"{name} = {value} " in config


def cuda_calls(monkeypatch, attend, arrays):
    """(name, settings) of its custom calls in a program for a GPU; what asks the driver is answered here."""
    driver = importlib.import_module("transformer_engine_jax")
    backend = driver.NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen
    monkeypatch.setattr(driver, "get_fused_attn_backend", lambda params: (backend, ""))
    for name in ("get_fused_attn_fwd_workspace_sizes", "get_fused_attn_bwd_workspace_sizes"):
        monkeypatch.setattr(driver, name, lambda *args: ((1,), driver.DType.kByte))
    loss = lambda *arrays: jnp.sum(attend(*arrays).astype(jnp.float32))
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*arrays)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return re.findall(r"custom_call @(te_\w+)\(.*?mhlo.backend_config = \{(.*?)\}", text)


def test_attention_on_a_mesh_is_mapped_by_hand(engine, monkeypatch):
    """Also where the heads of keys do not divide: each device gets the keys of its queries."""
    arrays = heads(kv_heads=1)
    expected = attend(*arrays) if engine == "stand-in" else None
    with parallel.activate(parallel.Mesh(ici=(1, 2, 2)).build(jax.devices()[:4])):
        if engine == "stand-in":
            found = jax.jit(attend)(*arrays)
        else:
            arrays = [a.astype("bfloat16") for a in arrays]
            calls = cuda_calls(monkeypatch, attend, arrays)
            for _, config in calls:
                assert "input_batch = 2 " in config and "attn_heads = 2 " in config
    if engine == "stand-in":
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_its_attention_is_chosen_around(monkeypatch):
    h100 = platform.Hardware("cuda", 9.0)
    q = jnp.zeros((2, 32, 4, 64), "bfloat16")
    scores = Scores(0.25, None, None)
    request = lambda **has: kernels.Request.of(
        q, q, scores, **{"causal": True, "segments": False, "cache": False, **has}
    )
    te_kernel = kernels.find("te")
    ready = dataclasses.replace(te_kernel, missing=lambda: None)
    monkeypatch.setattr(kernels, "KERNELS", (ready, *kernels.KERNELS[1:]))
    with platform.traced_for(h100):
        assert kernels.choose(request(), "fused").kernel is ready
        assert kernels.choose(request()).line == "cuDNN"
        line = kernels.choose(request(segments=True), "fused").line
        assert line.startswith("cuDNN, because Transformer Engine of packed rows needs to be told")
        with pytest.raises(ValueError, match="Transformer Engine attention of packed rows needs"):
            kernels.choose(request(segments=True), "te")
        assert te_kernel.missing() == (
            "cannot be planned: it asks the GPU that it runs on while it is compiled"
        )


def test_a_plan_with_it_is_refused_in_one_line(engine):
    layer = Linear(32, ("embed", "mlp"), dot_general_cls=TransformerEngine("current"))
    with (
        platform.traced_for(platform.Hardware("cuda", 9.0)),
        pytest.raises(ValueError, match="USE_TE=True cannot be planned: .*; plan with USE_TE=F"),
    ):
        jax.eval_shape(layer.init, jax.random.key(0), operands()[0])


def test_what_it_or_the_device_lacks_is_one_line(engine, monkeypatch):
    if engine == "stand-in":
        with pytest.raises(ValueError, match="this Transformer Engine has no MXFP8BlockScaling"):
            te.check_recipe("mxfp8")
        monkeypatch.setattr(te.engine().recipe, "MXFP8BlockScaling", object, raising=False)
    quantize = te.engine().jax.quantize
    lacking = lambda name: (False, "it needs Blackwell")
    monkeypatch.setattr(quantize, "is_quantize_recipe_supported", lacking)
    with pytest.raises(ValueError, match="FP8_RECIPE=mxfp8 cannot be used with USE_TE=True here"):
        te.check_recipe("mxfp8")
    layer = Linear(24, ("embed", "mlp"), dot_general_cls=TransformerEngine("current"))
    with pytest.raises(ValueError, match="multiples of 16, and .* is 48 x 24"):
        layer.init(jax.random.key(0), operands()[0])


def test_not_installed_is_one_line(monkeypatch):
    for name in ("transformer_engine", "transformer_engine.jax"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="USE_TE=True, but Transformer Engine is not ins") as error:
        TransformerEngine()
    assert "\n" not in str(error.value)
    assert kernels.find("te").missing().startswith("is not installed (")
