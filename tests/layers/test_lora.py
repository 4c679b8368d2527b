"""Adapters of Linear against the sum of the weights, written out; what is counted, named, merged and stored."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy import stats

from paxlike import parallel
from paxlike.layers.linear import Linear
from paxlike.layers.lora import Lora, adopt, base_of, layout, merge_lora
from paxlike.ops import quantized

# features, axes, shape of the inputs behind (b, s), A B as a weight, the product
CASES = {
    "plain": (6, ("embed", "mlp"), (4,), "dr,rf->df", "bsd,df->bsf"),
    "combined": (
        (3, 2, 6),
        ("embed", None, "heads", "head_dim"),
        (4,),
        "cdr,crhk->dchk",
        "bsd,dchk->bschk",
    ),
    "heads": ((2, 6), ("embed", "heads", "head_dim"), (4,), "dr,rhk->dhk", "bsd,dhk->bshk"),
    "out": (8, ("heads", "head_dim", "embed"), (2, 6), "hkr,rd->hkd", "bshk,hkd->bsd"),
}
LORAS = {
    "lora": Lora(rank=3),
    "alpha": Lora(rank=3, alpha=12.0),
    "rslora": Lora(rank=3, alpha=6.0, kind="rslora"),
    "dora": Lora(rank=3, alpha=6.0, kind="dora"),
}
SCALES = {"lora": 1.0, "alpha": 4.0, "rslora": 6.0 / math.sqrt(3.0), "dora": 2.0}


def linear(name, lora, **options):
    features, axes, inputs, *_ = CASES[name]
    layer = Linear(features, axes, kernel_init=nn.initializers.normal(1.0), adapter=lora, **options)
    return layer, normal(2, 3, *inputs)


@pytest.mark.parametrize("kind", LORAS)
@pytest.mark.parametrize("name", CASES)
def test_two_thin_products_equal_the_sum_of_the_weights(name, kind):
    layer, x = linear(name, LORAS[kind])
    *_, delta, product = CASES[name]
    params = random_like(init(layer, x))
    inputs = tuple(range(len(CASES[name][2])))

    def expected(params, x):
        adapter = params["lora"]
        added = SCALES[kind] * jnp.einsum(delta, adapter["a"], adapter["b"])
        weight = params["kernel"] + added
        if kind == "dora":  # equations 5 and 11 of the paper
            norm = jnp.sqrt(jnp.sum(params["kernel"] ** 2, axis=inputs, keepdims=True))
            magnitude = jnp.expand_dims(adapter["magnitude"], inputs) + norm
            column = jnp.sqrt(jnp.sum(weight**2, axis=inputs, keepdims=True))
            weight = magnitude * weight / jax.lax.stop_gradient(column)
        return jnp.einsum(product, x, weight) + params["bias"][None, None]

    params, x = jax.tree.map(jnp.asarray, (params, x))
    y, pullback = jax.vjp(functools.partial(apply, layer), params, x)
    wanted, reference = jax.vjp(jax.jit(expected), params, x)
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)
    dy = jnp.asarray(normal(*y.shape, seed=1))
    got, wanted = pullback(dy), reference(dy)
    for leaf in ("a", "b", *(("magnitude",) if kind == "dora" else ())):
        np.testing.assert_allclose(
            got[0]["lora"][leaf], wanted[0]["lora"][leaf], rtol=1e-4, atol=1e-4
        )
    np.testing.assert_allclose(got[1], wanted[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", ["combined", "out"])
def test_a_fresh_adapter_changes_nothing(name, kind):
    layer, x = linear(name, LORAS[kind])
    plain, params = init(layer.clone(adapter=None), x), init(layer, x)
    assert jax.tree.all(jax.tree.map(np.array_equal, plain["kernel"], params["kernel"]))
    np.testing.assert_allclose(
        apply(layer, params, x), apply(layer.clone(adapter=None), plain, x), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["rslora", "dora"])
@pytest.mark.parametrize("name", CASES)
def test_merged_weights_compute_the_same_in_the_shapes_of_the_base(name, kind):
    layer, x = linear(name, LORAS[kind])
    params = [random_like(init(layer, x), seed=i) for i in range(2)]
    single = merge_lora(params[0], LORAS[kind])
    stacked = merge_lora(jax.tree.map(lambda *leaves: np.stack(leaves), *params), LORAS[kind])
    base = layer.clone(adapter=None)
    shapes = jax.tree.map(np.shape, init(base, x))
    for i, before in enumerate(params):
        after = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
        assert jax.tree.map(np.shape, dict(after)) == shapes
        np.testing.assert_allclose(
            apply(base, after, x), apply(layer, before, x), rtol=1e-4, atol=1e-4
        )
    np.testing.assert_allclose(single["kernel"], stacked["kernel"][0], rtol=1e-5, atol=1e-6)


def test_what_has_no_adapter_is_left_as_it_is():
    params = {"norm": {"scale": np.ones(3)}, "ffn": {"kernel": np.ones((2, 3))}}
    merged = merge_lora(params, Lora())
    assert merged["norm"]["scale"] is params["norm"]["scale"]
    assert merged["ffn"]["kernel"] is params["ffn"]["kernel"]


@pytest.mark.parametrize(
    ("lora", "bound"), [(Lora(rank=4), 1 / math.sqrt(12)), (Lora(rank=4, init="base"), None)]
)
def test_a_is_drawn_as_asked_and_b_is_zero(lora, bound):
    layer = Linear(
        400, ("heads", "head_dim", "embed"), kernel_init=nn.initializers.constant(0.5), adapter=lora
    )
    adapter = init(layer, normal(1, 1, 2, 6))["lora"]
    assert not adapter["b"].any()
    if bound is None:
        assert (adapter["a"] == 0.5).all()
    else:
        assert bound * 0.8 < np.abs(adapter["a"]).max() <= bound


def test_parameters_have_the_names_of_their_layer():
    boxes = jax.eval_shape(
        lambda: linear("combined", Lora(rank=4, kind="dora"))[0].init(
            jax.random.key(0), jnp.zeros((1, 1, 4))
        )
    )["params"]["lora"]
    assert boxes["a"].names == (None, "embed", None) and boxes["a"].value.shape == (3, 4, 4)
    assert boxes["b"].names == (None, None, "heads", "head_dim")
    assert boxes["b"].value.shape == (3, 4, 2, 6)
    assert boxes["magnitude"].names == (None, "heads", "head_dim")
    out = jax.eval_shape(
        lambda: linear("out", Lora(rank=4, kind="dora"))[0].init(
            jax.random.key(0), jnp.zeros((1, 1, 2, 6))
        )
    )["params"]["lora"]
    assert out["a"].names == ("heads", "head_dim", None) and out["b"].names == (None, "embed")
    assert out["magnitude"].names == ("norm",)


@pytest.mark.parametrize("combined", [False, True])
def test_rank_32_on_llama_7b_trains_as_many_parameters_as_in_pax(combined):
    d, f, h, k = 4096, 11008, 32, 128
    lora, into = Lora(rank=32), ("embed", "heads", "head_dim")
    qkv = [((3, h, k), ("embed", None, "heads", "head_dim"), (d,))]
    layers = [*(qkv if combined else [((h, k), into, (d,))] * 3)]
    layers += [(d, ("heads", "head_dim", "embed"), (h, k)), (d, ("mlp", "embed"), (f,))]
    layers += [(f, ("embed", "mlp"), (d,))] * 2
    count = 0
    for features, axes, inputs in layers:
        layer = Linear(features, axes, use_bias=False, adapter=lora)
        params = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 1, *inputs)))["params"]
        count += sum(leaf.size for leaf in jax.tree.leaves(params["lora"]))
    assert 32 * count == 79_953_920


def test_dropout_is_on_the_adapter_alone_and_only_in_training():
    layer, x = linear("plain", Lora(rank=3, dropout=0.5))
    params = random_like(init(layer, x))
    still = apply(layer, params, x)
    whole = layer.clone(adapter=Lora(rank=3))
    np.testing.assert_array_equal(still, apply(whole, params, x))

    @jax.jit
    def noisy(params, seed):
        return layer.apply(
            {"params": params}, jnp.asarray(x), rngs={"dropout": jax.random.key(seed)}
        )

    assert not np.allclose(noisy(params, 0), noisy(params, 1))
    mean = np.mean([noisy(params, seed) for seed in range(300)], axis=0)
    np.testing.assert_allclose(mean, still, atol=0.15 * np.abs(still).max())
    fresh = {**params, "lora": {**params["lora"], "b": np.zeros_like(params["lora"]["b"])}}
    np.testing.assert_allclose(noisy(fresh, 0), apply(whole, fresh, x), rtol=1e-6)


@pytest.mark.parametrize("base", [None, "int8", "nf4"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", ["combined", "out"])
def test_same_values_and_gradients_on_a_mesh(name, kind, base):
    layer, _ = linear(name, Lora(rank=3, alpha=6.0, kind=kind, base=base))
    x = normal(2, 4, *CASES[name][2])
    params = random_like(init(layer, x))
    adapter, frozen = params["lora"], {k: v for k, v in params.items() if k != "lora"}

    def step(adapter, frozen, x):
        x = parallel.shard(x, "batch", "length", *[None] * (x.ndim - 2))
        return jnp.sum(jnp.square(layer.apply({"params": {**frozen, "lora": adapter}}, x)))

    run = lambda: jax.jit(jax.value_and_grad(step, argnums=(0, 2)))(adapter, frozen, x)
    expected = run()
    mesh = parallel.Mesh(ici=(1, 2, 2)).build(jax.devices()[:4])
    with parallel.activate(mesh):
        got = run()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("base", ["int8", "nf4", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_a_base_in_few_bits_is_the_weight_that_it_stands_for(name, base):
    layer, x = linear(name, Lora(rank=3, base=base))
    params = random_like(init(layer, x))
    wide = {**params, "kernel": np.asarray(quantized.dequantize(params["kernel"]))}
    plain = layer.clone(adapter=Lora(rank=3))
    loss = lambda layer: (
        lambda adapter, params, x: jnp.sum(jnp.square(apply(layer, {**params, "lora": adapter}, x)))
    )
    both = lambda layer: jax.jit(jax.value_and_grad(loss(layer), argnums=(0, 2)))
    got = both(layer)(params["lora"], params, x)
    expected = both(plain)(wide["lora"], wide, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), got, expected)
    merged = merge_lora(params, Lora(rank=3, base=base))["kernel"]
    np.testing.assert_allclose(merged, merge_lora(wide, Lora(rank=3))["kernel"], rtol=1e-6)


def test_weights_of_a_model_without_adapters_are_taken_up():
    for base, error in {None: 0.0, "bfloat16": 0.02, "int8": 0.02, "nf4": 0.5}.items():
        layer, x = linear("combined", Lora(rank=3, base=base))
        plain = random_like(init(layer.clone(adapter=None), x), seed=5)
        params = jax.tree.map(jnp.asarray, init(layer, x))
        wanted = base_of(params)
        assert jax.tree.map(lambda leaf: leaf.shape, wanted) == jax.tree.map(np.shape, plain)
        taken = adopt(jax.tree.map(jnp.asarray, plain), params)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), taken) == jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), params
        )
        assert taken["lora"] is params["lora"]
        np.testing.assert_allclose(
            quantized.dequantize(taken["kernel"]), plain["kernel"], atol=error + 1e-7
        )


def nf4_values():
    """What the 16 codes stand for."""
    codes = np.arange(16, dtype=np.uint8)
    stored = {"nf4": jnp.asarray(codes[0::2] | (codes[1::2] << 4)), "absmax": jnp.ones(1)}
    return np.asarray(quantized.dequantize(stored))


def test_nf4_is_the_quantiles_of_a_normal_distribution():
    # Appendix E: evenly spaced probabilities on each side of zero, 8 above and 7 below, divided by the largest.
    end = 0.5 * ((1 - 1 / 32) + (1 - 1 / 30))
    above = stats.norm.ppf(np.linspace(end, 0.5, 9)[:-1])
    below = -stats.norm.ppf(np.linspace(end, 0.5, 8)[:-1])
    values = np.sort([0.0, *above, *below])
    np.testing.assert_allclose(nf4_values(), values / values.max(), atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 128), (3, 4, 6)])
def test_quantised_weights_are_near(shape):
    weight = normal(*shape)
    stored = quantized.quantize(jnp.asarray(weight), "int8", input_axes=(0,))
    assert stored["int8"].dtype == jnp.int8 and stored["scale"].shape == (1, *shape[1:])
    step = np.abs(weight).max(0, keepdims=True) / 127
    assert (np.abs(quantized.dequantize(stored) - weight) <= step / 2 + 1e-6).all()
    stored = quantized.quantize(jnp.asarray(weight), "nf4", input_axes=())
    assert stored["nf4"].dtype == jnp.uint8 and stored["nf4"].shape == (*shape[:-1], shape[-1] // 2)
    blocks = weight.reshape(*stored["absmax"].shape, -1)
    normed = blocks / np.abs(blocks).max(-1, keepdims=True)
    values = nf4_values()
    nearest = values[np.abs(normed[..., None] - values).argmin(-1)]
    expected = (nearest * np.abs(blocks).max(-1, keepdims=True)).reshape(shape)
    np.testing.assert_allclose(quantized.dequantize(stored), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_weight_of_zeros_stays_zero(kind):
    stored = quantized.quantize(jnp.zeros((4, 8)), kind, input_axes=(0,))
    assert not quantized.dequantize(stored).any()


def test_only_the_stored_weight_lives_until_the_backward_pass():
    weight = quantized.quantize(jnp.asarray(normal(64, 128)), "int8", input_axes=(0,))
    product = lambda x: quantized.frozen_product(x, weight, (64, 128))
    _, pullback = jax.vjp(product, jnp.asarray(normal(2, 64)))
    kept = [leaf for leaf in jax.tree.leaves(pullback) if leaf.size == 64 * 128]
    assert [leaf.dtype for leaf in kept] == [jnp.dtype("int8")]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Lora(rank=0), "LORA_RANK=0 must be at least 1; USE_LORA=False trains without"),
        (lambda: Lora(alpha=0.0), "LORA_ALPHA=0.0 must be above 0, or None for the rank"),
        (lambda: Lora(dropout=1.0), r"LORA_DROPOUT=1.0 is not in \[0, 1\)"),
        (lambda: Lora(kind="loha"), "LORA_KIND='loha' is none of lora, rslora, dora"),
        (lambda: Lora(init="zeros"), "LORA_INIT='zeros' is none of kaiming, base"),
        (lambda: Lora(base="int4"), "LORA_BASE='int4' is none of None, int8, nf4, bfloat16"),
        (
            lambda: layout((4, 3), (2, 6), (4, 6)),
            r"an adapter of shapes \(4, 3\) and \(2, 6\) does not fit a weight of shape \(4, 6\)",
        ),
        (
            lambda: merge_lora(
                {"kernel": np.ones((4, 6)), "lora": {"a": np.ones((4, 3)), "b": np.ones((3, 6))}},
                Lora(rank=4),
            ),
            "LORA_RANK=4, but the adapter has rank 3",
        ),
        (
            lambda: merge_lora(
                {"kernel": np.ones((4, 6)), "lora": {"a": np.ones((4, 3)), "b": np.ones((3, 6))}},
                Lora(rank=3, kind="dora"),
            ),
            r"LORA_KIND='dora', but the adapter has no magnitude \(DoRA\)",
        ),
        (
            lambda: quantized.quantize(jnp.ones((4, 3)), "nf4", input_axes=()),
            "last dimension is 3 cannot be kept in 4 bits; it must be even",
        ),
        (
            lambda: init(*linear("plain", Lora(base="int8"), dot_general_cls=object)),
            "LORA_BASE='int8' and USE_FP8=True are two ways to store a weight",
        ),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def init(layer, x):
    return jax.tree.map(
        np.asarray, jax.jit(lambda x: nn.unbox(layer.init(jax.random.key(0), x)))(x)["params"]
    )


def apply(layer, params, x):
    return jax.jit(lambda p, x: layer.apply({"params": p}, x))(params, x)


def random_like(params, seed=0):
    """Random values in the place of floats; the codes of a quantised weight stay."""
    rng = np.random.default_rng(seed)
    draw = lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype)
    return jax.tree.map(lambda p: draw(p) if p.dtype in ("float32", "bfloat16") else p, params)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
