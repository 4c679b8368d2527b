"""Transformer Engine as a backend: the numbers, the parameters and the state of our own FP8.

With Transformer Engine (scripts/build_te_cpu.sh) its own CPU forms are tested, else a stand-in of the same interface
tests what lies around it.
"""

import collections
import dataclasses
import functools
import importlib
import inspect
import os
import re
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from parallel import meshes

from paxlike import parallel
from paxlike.layers.feedforward import ACTIVATIONS
from paxlike.layers.linear import Linear
from paxlike.layers.lora import Lora
from paxlike.layers.moe import MoE
from paxlike.layers.norm import LayerNorm, RMSNorm
from paxlike.layers.sequence import Sequence
from paxlike.log.flops import matmul_flops
from paxlike.ops import attention, fp8, platform, te, te_fused
from paxlike.ops import attention_kernels as kernels
from paxlike.ops.fp8 import STATE, Fp8
from paxlike.ops.scores import Scores
from paxlike.ops.te import TransformerEngine
from tests.ops import te_kernels, te_stand_in

try:
    importlib.import_module("transformer_engine.jax")
    MISSING = ""
except (ImportError, OSError) as error:
    MISSING = f"Transformer Engine cannot be imported here ({error}); see scripts/build_te_cpu.sh"


@pytest.fixture
def standing_in(monkeypatch):
    """The stand-in, whatever is installed."""
    for name, module in te_stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(params=["Transformer Engine", "stand-in"])
def engine(request, monkeypatch):
    """Transformer Engine itself, and what has its interface."""
    if request.param == "stand-in":
        request.getfixturevalue("standing_in")
        return request.param
    if MISSING:
        pytest.skip(MISSING)
    if jax.default_backend() == "cpu":
        assert os.environ.get("NVTE_JAX_CUSTOM_CALLS") == "false", "run it as build_te_cpu.sh says"
        # It asks the driver, which is not there.
        driver = importlib.import_module("transformer_engine_jax")
        monkeypatch.setattr(driver, "get_device_compute_capability", lambda number=0: 90)
    return request.param


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
        pytest.skip(f"the stand-in has no blocks. {MISSING}")

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


def net_of(*products, llama=False, **options):
    """Two blocks with a product each, repeated where there is one."""
    if llama:
        options |= {"combine_qkv": False, "num_kv_heads": 2}
    net = tiny.model(layers=2, width=32, **options)
    (block,) = net.stack.period
    if llama:
        ffn = block.ffn.clone(gated=True, activation="silu", use_bias=False)
        norms = {"mixer_norm": RMSNorm(), "ffn_norm": RMSNorm(zero_centered=True)}
        block = block.clone(ffn=ffn, mixer=block.mixer.clone(use_bias=False), **norms)
    period = tuple(
        block.clone(
            mixer=block.mixer.clone(dot_general_cls=product),
            ffn=block.ffn.clone(dot_general_cls=product),
        )
        for product in products
    )
    return net.clone(stack=net.stack.clone(period=period, repeats=2 // len(period)))


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
    pairs = zip(*(jax.tree.leaves(dict(t.state.collections)[STATE]) for t in (ours, theirs)))
    for one, other in pairs:
        assert (one[..., :3] > 0).all()
        np.testing.assert_allclose(one[..., 1:], other[..., 1:], rtol=1e-3)
        # After a step in which some values were rounded the other way; the largest gradient is itself an 8-bit sum.
        np.testing.assert_allclose(one[..., :2, 0], other[..., :2, 0], rtol=3e-2)
        np.testing.assert_allclose(one[..., 2, 0], other[..., 2, 0], rtol=1 / 8)


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


@pytest.mark.parametrize(
    "sizes",
    [{"data": 2, "fsdp": 2}, {"fsdp": 2, "tensor": 2}, {"data": 2, "pipeline": 2}],
    ids=str,
)
def test_its_operations_are_divided_over_a_mesh(monkeypatch, sizes):
    """Those of the real one, by their own rules, around kernels that are imitated."""
    if MISSING:
        pytest.skip(MISSING)
    llama = "tensor" in sizes
    net = net_of(TransformerEngine(fused=True), remat="SAVE_NOTHING", llama=llama)
    norms = {
        name: (RMSNorm if llama else LayerNorm)(te_kernels.EPSILON)
        for name in ("mixer_norm", "ffn_norm")
    }
    (block,) = net.stack.period
    pipeline = net.stack.pipeline.__class__(2)
    net = net.clone(stack=net.stack.clone(pipeline=pipeline, period=(block.clone(**norms),)))
    batch, params = tiny.batches(1)[0], meshes.init(net)
    alone = meshes.loss_and_gradients(net, params, batch, {"data": 1})
    te_kernels.install(monkeypatch)
    found = meshes.loss_and_gradients(net, params, batch, sizes)
    meshes.assert_same(found, alone, 1e-5)


def test_its_operations_see_all_of_a_mesh_in_8_bits(monkeypatch):
    """As above: what a step on four devices enters as seen is what one device sees."""
    if MISSING:
        pytest.skip(MISSING)
    product = TransformerEngine("delayed", amax_history=4, fused=None)
    net = net_of(product, remat="SAVE_NOTHING", llama=True)
    (block,) = net.stack.period
    norms = {name: RMSNorm(te_kernels.EPSILON) for name in ("mixer_norm", "ffn_norm")}
    net = net.clone(stack=net.stack.clone(period=(block.clone(**norms),)))
    options = {"net": net, "compiler_options": meshes.IN_HASTE}
    te_kernels.install(monkeypatch)
    alone, spread = tiny.Trainer(**options), tiny.Trainer((1, 2, 2), **options)
    for batch in alone.data[:2]:
        losses = [trainer.step(batch)["loss"].value() for trainer in (spread, alone)]
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    pairs = zip(*(jax.tree.leaves(dict(t.state.collections)[STATE]) for t in (spread, alone)))
    for one, other in pairs:
        assert (one[..., :2] > 0).all()
        np.testing.assert_allclose(one[..., 1:], other[..., 1:], rtol=1e-3)
        np.testing.assert_allclose(one[..., :2, 0], other[..., :2, 0], rtol=3e-2)
        np.testing.assert_allclose(one[..., 2, 0], other[..., 2, 0], rtol=1 / 8)


KEPT = "context,combined_qkv_proj,query_proj,key_proj,value_proj,ffn1,ffn1_gate"


@pytest.mark.parametrize("llama", [False, True], ids=["gpt", "llama"])
def test_a_model_behind_norms_is_the_model_without(engine, monkeypatch, llama):
    """Each layer asks for what is fused; scanned and computed again, numbers are the same, and so is what is kept."""
    batch = tiny.batches(1)[0]
    models = {
        remat: [
            net_of(how, llama=llama, remat=remat) for how in (TransformerEngine(fused=True), None)
        ]
        for remat in ("SAVE_EVERYTHING", KEPT, "SAVE_NOTHING")
    }
    params = meshes.init(models[KEPT][1])
    net, plain = models[KEPT]
    found, expected = (
        meshes.loss_and_gradients(m, params, batch, {"data": 1}) for m in (net, plain)
    )
    meshes.assert_same(found, expected, 1e-5)

    tokens = jnp.asarray(batch["tokens"])

    def products(net):
        loss = lambda params: jnp.sum(net.apply({"params": params}, tokens, train=True).hidden)
        return counted(jax.make_jaxpr(jax.grad(loss))(params))["dot_general"]

    again = {remat: [products(net) for net in nets] for remat, nets in models.items()}
    everything = again.pop("SAVE_EVERYTHING")
    again = {remat: [a - b for a, b in zip(all_, everything)] for remat, all_ in again.items()}
    assert again[KEPT][0] == again[KEPT][1] < again["SAVE_NOTHING"][0]

    def marked(name):
        module = getattr(te.engine().jax, name)
        its = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **o: checkpoint_name(its(*a, **o), name))

    marked("layernorm_dense")
    marked("layernorm_mlp")
    calls = counted(jax.make_jaxpr(net.apply)({"params": params}, tokens))
    assert calls["layernorm_dense"] == calls["layernorm_mlp"] == 2


def llama_with(**changes):
    """A block of a LLaMA, whose parts have these fields: `ffn__activation` and so on."""
    (block,) = net_of(TransformerEngine("current", fused=True), llama=True).stack.period
    parts = collections.defaultdict(dict)
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if field:
            parts[part][field] = value
    changes = {name: value for name, value in changes.items() if "__" not in name}
    changes |= {name: getattr(block, name).clone(**fields) for name, fields in parts.items()}
    return block.clone(**changes)


class Double(nn.Module):
    """No norm."""

    def __call__(self, x):
        return 2.0 * x


EXPERTS = MoE(hidden=64, num_experts=2, use_bias=False)
ALL = {"layernorm_dense": 1, "layernorm_mlp": 1}


@pytest.mark.parametrize(
    ("changes", "calls", "why"),
    [
        ({"mixer_post_norm": RMSNorm(), "ffn_post_norm": RMSNorm()}, ALL, None),
        ({"mixer__adapters": {"out": Lora(2)}}, ALL, None),
        ({"ffn__activation": "gelu_exact"}, {"layernorm_dense": 2}, None),
        ({"ffn__adapters": {"ffn2": Lora(2)}}, {"layernorm_dense": 2}, None),
        ({"ffn": EXPERTS}, {"layernorm_dense": 1}, None),
        ({"ffn__dot_general_cls": None}, {"layernorm_dense": 1}, None),
        (
            {"mixer__adapters": {"key": Lora(2)}},
            {"layernorm_mlp": 1},
            "mixer stays apart from its norm, because query, key, value have adapters",
        ),
        (
            {"ffn_norm": Double()},
            {"layernorm_dense": 1},
            "ffn stays apart from its norm, because Transformer Engine has no Double",
        ),
        (
            {"mixer_norm__dtype": "bfloat16"},
            {"layernorm_mlp": 1},
            "residual stream, norm and layer are of different types, bfloat16, float32",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_can_be_fused_is_and_the_rest_says_why(standing_in, changes, calls, why):
    assert fused_calls(llama_with(**changes), Sequence(), why) == calls


def test_fused_nowhere(standing_in):
    """While tokens are generated; where its gradients of a norm would lack those of other devices."""
    block = llama_with()
    assert fused_calls(block, Sequence(cache_length=32), None) == {}
    for sizes, rules in (
        ({"context": 2}, None),
        ({"fsdp": 2, "expert": 2}, None),
        ({"tensor": 2}, parallel.rules_with(residual_length=("context", "tensor"))),
    ):
        (axis,) = sizes.keys() - {"fsdp"}
        why = f"tokens are spread over {axis}, over which it does not sum the gradients of a norm"
        with parallel.activate(meshes.build(sizes), rules):
            assert fused_calls(block, Sequence(), why) == {}


def fused_calls(block, sequence, why):
    """How often the stand-in's fused functions are called for one block, which warns if `why` is not None."""
    found = collections.Counter()

    def counting(its):
        def call(*arguments, **options):
            found[its.__name__] += 1
            return its(*arguments, **options)

        return call

    its = te.engine().jax
    its.layernorm_dense.layernorm_dense = counting(te_stand_in.layernorm_dense)
    its.layernorm_mlp.layernorm_mlp = counting(te_stand_in.layernorm_mlp)
    x = jax.ShapeDtypeStruct((4, 32, 32), "float32")
    variables = jax.eval_shape(block.init, jax.random.key(0), x, sequence)
    found.clear()
    call = functools.partial(block.apply, sequence=sequence, mutable=["cache"])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        jax.eval_shape(call, nn.unbox(variables), x)
    said = [str(each.message) for each in said if "TE_FUSED" in str(each.message)]
    assert bool(said) == (why is not None)
    assert all(line.startswith("TE_FUSED=True: ") and why in line for line in said)
    return found


def test_for_a_gpu_norms_and_activation_write_8_bits(monkeypatch):
    """The programs of the real one: neither what a norm nor what an activation gives is written wide."""
    if MISSING:
        pytest.skip(MISSING)
    te_kernels.answer_for_the_driver(monkeypatch)
    product = TransformerEngine("delayed", amax_history=4, fused=True)
    (block,) = net_of(product, llama=True, dtype="bfloat16").stack.period
    norms = {name: RMSNorm(dtype="bfloat16") for name in ("mixer_norm", "ffn_norm")}
    block = block.clone(**norms)
    x = jax.ShapeDtypeStruct((4, 32, 32), "bfloat16")
    variables = nn.unbox(jax.eval_shape(block.init, jax.random.key(0), x, Sequence()))
    loss = lambda variables, x: jnp.sum(block.apply(variables, x, Sequence()).astype(jnp.float32))
    text = jax.jit(jax.grad(loss)).trace(variables, x).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @te_(\w+)_ffi\(.*-> \(tensor<([0-9x]+)x(\w+)>", text)
    assert collections.Counter(calls) >= collections.Counter(
        {
            ("norm_forward", "4x32x32", "f8E4M3FN"): 2,
            ("act_lu", "4x32x128", "f8E4M3FN"): 1,
            ("dact_dbias_quantize", "4x32x2x128", "f8E5M2"): 1,
            ("norm_backward", "4x32x32", "bf16"): 2,
        }
    )
    # Three for each weight, less the last one forward, which no gradient needs.
    assert sum(name == "gemm_v2" for name, _, _ in calls) == 3 * 4 - 1


def test_the_stand_in_is_called_as_it_is():
    """Its arguments are those of the real one, in their order."""
    if MISSING:
        pytest.skip(MISSING)
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


def counted(jaxpr, times=1):
    """How often a program does what, by the names of primitives, or of what was given a name."""
    found = collections.Counter()
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name = equation.primitive.name
        found[equation.params["name"] if name == "name" else name] += times
        turns = equation.params["length"] if name == "scan" else 1
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(value):
                found += counted(value, times * turns)
    return found


def is_jaxpr(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def test_adapters_beside_it(engine):
    layer = Linear(32, ("embed", "mlp"), dot_general_cls=TransformerEngine("current"))
    x = operands()[0]
    plain = layer.init(jax.random.key(0), x)
    adapted = layer.clone(adapter=Lora(rank=2))
    both = adapted.init(jax.random.key(0), x)
    assert set(both["params"]) == {"kernel", "bias", "lora"}
    np.testing.assert_array_equal(adapted.apply(both, x), layer.apply(plain, x))


def behind_a_norm(kind, activation, gated, recipe, use_bias):
    """A feed-forward layer behind its norm, by Transformer Engine and by us, and what both are called with."""
    keys = iter(jax.random.split(jax.random.key(0), 9))
    normal = lambda *shape: jax.random.normal(next(keys), shape)
    norm = RMSNorm(zero_centered=True) if kind == "rmsnorm" else LayerNorm(1e-3)
    x, parts = normal(2, 16, 48), 1 + gated
    params = {"scale": 0.1 * normal(48), "bias": 0.1 * normal(48)}
    if kind == "rmsnorm":
        del params["bias"]
    kernels = [0.1 * normal(48, parts, 32), 0.1 * normal(32, 48)]
    biases = [0.1 * normal(parts, 32), 0.1 * normal(48)] if use_bias else [None, None]
    peaks = [None] * 3
    if recipe == "delayed":  # those of gradients lie far apart: each has to go to its own
        peaks = [jnp.array([4.0, 0.5, top]) for top in (1e-1, 1e-4, 1e-6)]

    def theirs(x, params, kernels, biases, peaks):
        parts = norm.apply({"params": params}, x, method="parts")
        engine = TransformerEngine(recipe, fused=None)
        weight = lambda i, peaks: te_fused.Weight(kernels[i], biases[i], peaks, engine)
        both = te_fused.product(x, parts, weight(0, peaks[0]))
        weights = weight(0, peaks[1]), weight(1, peaks[2])
        return both, te_fused.feed_forward(x, parts, *weights, activation)

    def ours(x, params, kernels, biases, peaks):
        def times(x, i, peaks):
            y = jnp.tensordot(x, kernels[i], 1)
            if recipe is not None:
                y = fp8.product(x, kernels[i], peaks)
            return y if biases[i] is None else y + biases[i]

        x = norm.apply({"params": params}, x)
        hidden = times(x, 0, peaks[1])
        gate = hidden[:, :, 1] if gated else 1.0
        hidden = ACTIVATIONS[activation](hidden[:, :, 0]) * gate
        return times(x, 0, peaks[0]), times(hidden, 1, peaks[2])

    dy = 1e-1 * normal(2, 16, parts, 32), 1e-6 * normal(2, 16, 48)
    return theirs, ours, (x, params, kernels, biases, peaks), dy


FUSED = [
    ("layernorm", "gelu", False, "delayed", True),
    ("rmsnorm", "silu", True, None, False),
    ("layernorm", "relu", True, "current", True),
]


@pytest.mark.parametrize("case", FUSED, ids=lambda case: "-".join(map(str, case)))
def test_behind_a_norm_is_what_the_layers_are_one_by_one(engine, case):
    theirs, ours, operands, dy = behind_a_norm(*case)
    # In 8 bits single values are rounded the other way, where the norm differs in its last bit.
    tolerance = 1e-5 if case[3] is None else 5e-3

    def differentiated(function):
        def both(operands, dy):
            y, back = jax.vjp(function, *operands)
            zeros = [jnp.zeros_like(part) for part in dy]
            return y, back((dy[0], zeros[1])), back((zeros[0], dy[1]))

        with jax.numpy_rank_promotion("allow"):
            return jax.jit(both, compiler_options=meshes.IN_HASTE)(operands, dy)

    for one, other in zip(*(jax.tree.leaves(differentiated(each)) for each in (theirs, ours))):
        apart = np.linalg.norm(np.asarray(one) - other)
        assert apart <= tolerance * np.linalg.norm(np.asarray(other))


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
