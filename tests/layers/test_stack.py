"""The stack: scanned and unrolled are the same, rematerialisation changes memory and work but no number."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from paxlike.layers.attention import Attention
from paxlike.layers.block import Block
from paxlike.layers.feedforward import FeedForward
from paxlike.layers.norm import LayerNorm
from paxlike.layers.remat import REMAT_POLICIES
from paxlike.layers.sequence import Sequence
from paxlike.layers.stack import Stack

B, S, D, REPEATS = 2, 6, 8, 3
RNGS = {"dropout": jax.random.key(1, impl="rbg")}  # compiles faster than the default
IN_HASTE = {"xla_backend_optimization_level": 0}  # the programs are tiny, and there are many

# Matrix products of a block that the backward pass repeats: of qkv (three where they are separate), scores, context,
# output projection, ffn1. (ffn2 is the last thing in a block, whose result no gradient inside it needs.)
RECOMPUTED = {
    "SAVE_EVERYTHING": 0,
    "SAVE_NOTHING": 5,
    "SAVE_DOT_ONLY": 0,
    "SAVE_DOT_WITH_NO_BATCH_DIM": 2,  # scores, context
    "SAVE_QKV_OUT_PROJ": 3,  # scores, context, ffn1
    "SAVE_QKV_OUT_PROJ_SEPARATE": 3,  # the same, counted with separate projections
    "SAVE_CONTEXT": 4,  # qkv, scores, out, ffn1
    "SAVE_OUT_PROJ": 4,  # qkv, scores, context, ffn1
    "SAVE_CONTEXT_AND_OUT_PROJ": 3,  # qkv, scores, ffn1
    "SAVE_DOT_FOR_MLPERF_200B": 2,  # scores, ffn1
    "SAVE_DOT_EXCEPT_LOGITS_FFN1": 2,  # scores, ffn1
    "SAVE_DOT_EXCEPT_LOGITS": 1,  # scores
    "SAVE_ITERATION_INPUT": 5,
    "SAVE_QUANTIZED": 2,  # scores, ffn1
    "SAVE_TRANSFORMER_LAYER_OUTPUT": 5,
}


@pytest.fixture(scope="module")
def params():
    return _params(_stack())


@pytest.fixture(scope="module")
def expected(params):
    return _run(_stack(), params)


def test_equals_a_loop_over_the_blocks(params):
    x, block = _x(), _block()
    y = x
    for layer in range(REPEATS):
        mine = jax.tree.map(lambda p: jnp.asarray(p[layer]), params["period_0"])
        y = block.apply({"params": mine}, y, Sequence())
    np.testing.assert_allclose(_apply(_stack(), params), y, rtol=1e-5, atol=1e-6)


def test_scanned_and_unrolled_agree(params, expected):
    unrolled = _stack(scan=False)
    assert _shapes(unrolled) == _shapes(_stack())
    _assert_same(_run(unrolled, params), expected)


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "unrolled"])
def test_repeats_start_from_different_weights(scan):
    one_draw = lambda key, shape, dtype: jnp.full(
        shape, jax.random.uniform(key), dtype
    )  # quick to compile
    stack = _stack(scan=scan, init=one_draw)
    fresh = jax.jit(lambda: nn.unbox(stack.init(jax.random.key(0), _x(), Sequence())))()
    kernel = np.asarray(fresh["params"]["period_0"]["ffn"]["ffn1"]["kernel"])
    assert kernel.shape[0] == REPEATS
    assert len({layer.tobytes() for layer in kernel}) == REPEATS


def test_a_period_of_two_different_blocks():
    stack = Stack((_block(hidden=12), _block(hidden=20)), repeats=2)
    params = _params(stack)
    assert params["period_0"]["ffn"]["ffn1"]["kernel"].shape == (2, D, 12)
    assert params["period_1"]["ffn"]["ffn1"]["kernel"].shape == (2, D, 20)
    y = _x()
    for repeat in range(2):
        for number, hidden in enumerate((12, 20)):
            mine = jax.tree.map(lambda p: jnp.asarray(p[repeat]), params[f"period_{number}"])
            y = _block(hidden=hidden).apply({"params": mine}, y, Sequence())
    np.testing.assert_allclose(_apply(stack, params), y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", REMAT_POLICIES)
def test_rematerialisation_changes_no_number(policy, params, expected):
    _assert_same(_run(_stack(remat=policy), params), expected)


def test_rematerialisation_unrolled(params, expected):
    _assert_same(_run(_stack(remat="SAVE_NOTHING", scan=False), params), expected)


@pytest.mark.parametrize("policy", REMAT_POLICIES)
def test_each_policy_repeats_the_products_it_does_not_save(policy):
    separate = policy.endswith("_SEPARATE")
    forward, products = (8, 8 + 16) if separate else (6, 6 + 12)
    stack = _stack(remat=policy, combine_qkv=not separate)
    params = _params(stack)
    run = functools.partial(_loss, stack)
    assert _count_products(jax.make_jaxpr(run)(params, _x())) == forward
    assert (
        _count_products(jax.make_jaxpr(jax.grad(run, argnums=(0, 1)))(params, _x()))
        == products + RECOMPUTED[policy]
    )


@pytest.mark.parametrize(
    ("policy", "recomputed"),
    [("context", 4), ("context,out_proj", 3), ("ffn1, combined_qkv_proj", 3), ("host:context", 4)],
)
def test_a_list_of_tensors_is_a_policy(policy, recomputed, params, expected):
    stack = _stack(remat=policy)
    run = functools.partial(_loss, stack)
    gradient = jax.make_jaxpr(jax.grad(run, argnums=(0, 1)))(params, _x())
    assert _count_products(gradient) == 18 + recomputed
    assert ("pinned_host" in str(gradient) or "<host>" in str(gradient)) == ("host:" in policy)
    _assert_same(_run(stack, params), expected)


@pytest.mark.parametrize(
    ("layers", "share"),
    [("all", 3), ("first:1", 1), ("first:2", 2), ("every:3", 1), ("first:3", 3)],
)
@pytest.mark.parametrize("scan", [True, False], ids=["scan", "unrolled"])
def test_only_chosen_layers_are_computed_again(layers, share, scan, params, expected):
    chosen = {"remat": "SAVE_NOTHING", "layers": layers}
    stack = _stack(scan=scan, **chosen)
    _assert_same(_run(stack, params), expected)
    run = functools.partial(_loss, stack)
    gradient = jax.make_jaxpr(jax.grad(run, argnums=(0, 1)))(params, _x())
    again = _count_products(gradient, loops=True) - REPEATS * 18
    assert again == share * RECOMPUTED["SAVE_NOTHING"]


def test_chosen_layers_draw_the_same_noise(params):
    kept = _run(_stack(dropout=0.3), params)
    some = _stack(dropout=0.3, remat="SAVE_NOTHING", layers="first:1")
    _assert_same(_run(some, params), kept)


def test_the_more_layers_are_computed_again_the_less_memory():
    def temporary_bytes(**choice):
        lowered = _lowered(_stack(**choice), jax.ShapeDtypeStruct((4, 64, D), jnp.float32))
        return lowered.compile(IN_HASTE).memory_analysis().temp_size_in_bytes

    choices = ("first:1", "first:2", "all")
    sizes = [temporary_bytes(remat="SAVE_NOTHING", layers=layers) for layers in choices]
    assert temporary_bytes() > sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"layers": "last:2"}, "CHECKPOINT_LAYERS='last:2' is none of all, first:K"),
        ({"layers": "first:4"}, "K must be at least 1 and at most the 3 repeats"),
        ({"layers": "every:2"}, "K must be at least 1 and a divisor of the 3 repeats"),
        (
            {"remat": "context,contxt"},
            "SAVE_NOTHING, .* and 'contxt' is no tensor of a block: ",
        ),
    ],
)
def test_unknown_choices_of_layers_and_tensors(choice, message):
    with pytest.raises(ValueError, match=message):
        _params(_stack(**choice))


def test_saving_nothing_needs_less_memory():
    def temporary_bytes(policy):
        lowered = _lowered(_stack(remat=policy), jax.ShapeDtypeStruct((4, 64, D), jnp.float32))
        return lowered.compile(IN_HASTE).memory_analysis().temp_size_in_bytes

    assert temporary_bytes("SAVE_NOTHING") < 0.5 * temporary_bytes("SAVE_EVERYTHING")


def test_unrolled_recomputation_is_held_back_by_a_barrier():
    """It keeps a GPU's compiler from merging the two passes; a CPU's drops it, and memory stays."""

    def barriers(policy, scan):
        text = _lowered(_stack(remat=policy, scan=scan), _x()).as_text()
        return text.count("optimization_barrier")

    assert barriers("SAVE_NOTHING", scan=False) > barriers("SAVE_EVERYTHING", scan=False)
    assert barriers("SAVE_NOTHING", scan=True) == barriers("SAVE_EVERYTHING", scan=True)


def test_dropout_differs_between_layers_and_not_between_forms():
    """Blocks that add dropout(1) to their input: equal masks would add up to multiples of the number of layers."""
    results = []
    for scan in (True, False):
        stack = Stack((_AddNoise(),), repeats=4, scan=scan)
        y = stack.apply({}, jnp.zeros((B, S, D)), Sequence(train=True), rngs=RNGS)
        results.append(np.asarray(y))
    np.testing.assert_array_equal(*results)
    assert set(np.unique(results[0] / 2.0)) == {0.0, 1.0, 2.0, 3.0, 4.0}


def test_dropout_draws_the_same_when_it_is_recomputed(params, expected):
    kept = _run(_stack(dropout=0.3), params)
    _assert_same(_run(_stack(dropout=0.3, remat="SAVE_NOTHING"), params), kept)
    assert abs(kept[0] - expected[0]) > 1e-2 * expected[0]  # it was active


def test_unknown_policy():
    with pytest.raises(
        ValueError,
        match="CHECKPOINT_POLICY='SAVE_SOME' is none of SAVE_EVERYTHING, SAVE_NOTHING, ",
    ):
        _params(_stack(remat="SAVE_SOME"))


class _AddNoise(nn.Module):
    @nn.compact
    def __call__(self, x, sequence):
        keep = jax.random.bernoulli(self.make_rng("dropout"), 0.5, x.shape)
        return x + jnp.where(keep, 2.0, 0.0)


def _block(*, hidden=16, dropout=0.0, combine_qkv=True, init=None):
    init = init or nn.initializers.normal(0.3)
    return Block(
        mixer=Attention(
            2, 4, kernel_init=init, dropout=dropout, combine_qkv=combine_qkv, use_bias=False
        ),
        ffn=FeedForward(hidden, kernel_init=init, dropout=dropout, use_bias=False),
        mixer_norm=LayerNorm(use_bias=False),
        ffn_norm=LayerNorm(use_bias=False),
    )


def _stack(*, remat="SAVE_EVERYTHING", layers="all", scan=True, **kwargs):
    return Stack((_block(**kwargs),), REPEATS, remat=remat, remat_layers=layers, scan=scan)


def _shapes(stack):
    return nn.unbox(jax.eval_shape(lambda: stack.init(jax.random.key(0), _x(), Sequence())))[
        "params"
    ]


def _params(stack):
    """Weights drawn by numpy: compiling the initialisers takes longer than all the rest."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda p: np.asarray(0.3 * rng.standard_normal(p.shape), p.dtype), _shapes(stack)
    )


def _apply(stack, params):
    return jax.jit(lambda p, x: stack.apply({"params": p}, x, Sequence()))(params, _x())


def _loss(stack, params, x):
    y = stack.apply({"params": params}, x, Sequence(train=True), rngs=RNGS)
    return jnp.sum(jnp.square(y))


def _lowered(stack, x):
    return jax.jit(jax.grad(functools.partial(_loss, stack), argnums=(0, 1))).lower(
        _shapes(stack), x
    )


def _run(stack, params):
    """The loss and its gradients with respect to parameters and inputs."""
    step = jax.jit(jax.value_and_grad(functools.partial(_loss, stack), argnums=(0, 1)))
    return step.lower(params, _x()).compile(IN_HASTE)(params, _x())


def _assert_same(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def _count_products(jaxpr, *, loops=False):
    """Matrix products in a program, those of the body of a loop once, or as often as it runs."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == "dot_general"
        times = equation.params["length"] if loops and equation.primitive.name == "scan" else 1
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            count += times * _count_products(value, loops=loops) if _is_jaxpr(value) else 0
    return count


def _is_jaxpr(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def _x():
    return jnp.asarray(np.random.default_rng(0).standard_normal((B, S, D)), jnp.float32)
