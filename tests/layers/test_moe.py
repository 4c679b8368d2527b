"""The layer of experts against a loop over tokens and experts, in every form, values and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from paxlike.layers.feedforward import ACTIVATIONS
from paxlike.layers.lora import Lora
from paxlike.layers.moe import MoE, Router
from paxlike.layers.sequence import Sequence
from paxlike.ops.fp8 import Fp8
from paxlike.ops.routing import Choice
from paxlike.ops.sown import LOSSES, SUMMARIES, UPDATES

ROWS, LENGTH, WIDTH, HIDDEN, EXPERTS = 4, 6, 8, 12, 5
FORMS = ("einsum", "index", "sort")


def layer(
    *, k=2, gated=True, dispatch="index", score="softmax", renormalize=True, fp8=None, **router
):
    choice = Choice(k=k, score=score, renormalize=renormalize)
    return MoE(
        num_experts=EXPERTS,
        hidden=HIDDEN,
        activation="silu",
        gated=gated,
        dispatch=dispatch,
        use_bias=False,
        kernel_init=nn.initializers.normal(0.5),
        dot_general_cls=fp8,
        router=Router(choice, **router),
    )


def inputs(seed=0):
    return jax.random.normal(jax.random.key(seed), (ROWS, LENGTH, WIDTH))


def init(net, x):
    return jax.jit(lambda a: nn.unbox(net.init(jax.random.key(1), a, Sequence()))["params"])(x)


def apply(net, params, x, *, rngs=None, **sequence):
    return jax.jit(lambda p, a: net.apply({"params": p}, a, Sequence(**sequence), rngs=rngs))(
        params, x
    )


def naive(params, x, valid, *, k, gated, group, factor, renormalize=True):
    """(params, x) -> y: one token after another takes its place in the queues, then every expert sees every token."""
    scores = np.asarray(jax.nn.softmax(x.reshape(-1, WIDTH) @ params["router"]["kernel"], axis=-1))
    places = None
    if factor is not None:
        places = int(group * factor / EXPERTS)
        places = -(-places // 4) * 4 if places > 1 else 1
    chosen, served = np.zeros(scores.shape, bool), np.zeros(scores.shape, bool)
    for start in range(0, len(scores), group):
        used = np.zeros(EXPERTS, int)
        for j in range(k):
            for t in range(start, start + group):
                e = np.argsort(-scores[t], kind="stable")[j]
                chosen[t, e] = True
                if valid.reshape(-1)[t]:
                    used[e] += 1
                    served[t, e] = places is None or used[e] <= places

    @jax.jit
    def compute(params, x):
        tokens = x.reshape(-1, WIDTH)
        scores = jax.nn.softmax(tokens @ params["router"]["kernel"], axis=-1)
        if renormalize and k > 1:
            scores = scores / jnp.sum(scores * chosen, axis=-1, keepdims=True)
        out = jnp.zeros_like(tokens)
        for e in range(EXPERTS):
            inner = tokens @ params["ffn1"]["kernel"][e]
            if gated:
                inner = inner * ACTIVATIONS["silu"](tokens @ params["gate"]["kernel"][e])
            else:
                inner = ACTIVATIONS["silu"](inner)
            y = inner @ params["ffn2"]["kernel"][e]
            out = out + (scores[:, e] * served[:, e])[:, None] * y
        return out.reshape(x.shape)

    return compute


def value_and_gradients(function, *args):
    weights = jax.random.normal(jax.random.key(9), (ROWS, LENGTH, WIDTH))
    objective = lambda *a: jnp.sum(function(*a) * weights)
    return function(*args), jax.grad(objective, argnums=(0, 1))(*args)


def assert_close(found, expected, tolerance=2e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        found,
        expected,
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("k", "gated", "group", "factor"),
    [(2, True, 12, 1.0), (1, False, 24, 1.0), (3, True, 6, 1.5), (2, False, 12, 10.0)],
)
def test_every_form_equals_a_loop_over_tokens_and_experts(form, k, gated, group, factor):
    net = layer(k=k, gated=gated, dispatch=form, capacity_factor=factor, group_size=group)
    x = inputs()
    params = init(net, x)
    segments = jnp.ones((ROWS, LENGTH), jnp.int32).at[1, 2:4].set(0)
    valid = np.asarray(segments != 0)
    ours = value_and_gradients(
        jax.jit(lambda p, a: net.apply({"params": p}, a, Sequence(segments=segments))), params, x
    )
    loop = naive(params, x, valid, k=k, gated=gated, group=group, factor=factor)
    theirs = value_and_gradients(loop, params, x)
    assert_close(ours, theirs)
    assert np.all(np.asarray(ours[0])[1, 2:4] == 0.0)  # padding goes nowhere


@pytest.mark.parametrize("form", FORMS)
def test_dropless_equals_capacity_for_all(form):
    net = layer(dispatch="sort")
    x = inputs()
    params = init(net, x)
    wide = layer(dispatch=form, capacity_factor=float(EXPERTS))
    of = lambda module: jax.jit(lambda p, a: module.apply({"params": p}, a, Sequence()))
    assert_close(value_and_gradients(of(net), params, x), value_and_gradients(of(wide), params, x))
    everyone = np.ones((ROWS, LENGTH), bool)
    loop = naive(params, x, everyone, k=2, gated=True, group=24, factor=None)
    assert_close(of(net)(params, x), loop(params, x))


def test_who_is_dropped_is_the_same_in_every_form_and_passes_by():
    x = inputs(3)
    tight = {"capacity_factor": 0.3, "group_size": 24}
    params = init(layer(**tight), x)
    found = [apply(layer(dispatch=form, **tight), params, x) for form in FORMS]
    assert_close(found[1:], [found[0]] * 2)
    assert 0 < np.sum(np.all(np.asarray(found[0]) == 0.0, axis=-1)) < ROWS * LENGTH


@pytest.mark.parametrize("form", FORMS)
def test_identical_experts_are_one_feed_forward_layer(form):
    net = layer(dispatch=form, capacity_factor=float(EXPERTS))
    x = inputs()
    params = init(net, x)
    same = lambda name: jnp.broadcast_to(params[name]["kernel"][:1], params[name]["kernel"].shape)
    params = {**params, **{n: {"kernel": same(n)} for n in ("gate", "ffn1", "ffn2")}}
    gate, up, down = (params[n]["kernel"][0] for n in ("gate", "ffn1", "ffn2"))
    expected = (jax.nn.silu(x @ gate) * (x @ up)) @ down
    assert_close(apply(net, params, x), expected)


def sown(net, params, x, **sequence):
    names = [LOSSES, SUMMARIES, UPDATES]
    sequence = Sequence(train=True, **sequence)
    run = lambda p, a: net.apply({"params": p}, a, sequence, mutable=names)[1]
    return jax.jit(run)(params, x)


def test_the_balance_loss_is_1_when_balanced_and_e_when_all_go_to_one():
    # The width of what the router reads counts the experts, so that the tokens choose for themselves.
    choice = Choice(k=1, renormalize=False)
    net = MoE(num_experts=4, hidden=4, use_bias=False, router=Router(choice, balance_weight=1.0))
    x = jnp.eye(4)[None] * 30.0
    params = init(net, x)
    params["router"]["kernel"] = jnp.eye(4)
    assert sown(net, params, x)[LOSSES]["balance"] == pytest.approx(1.0)
    one = jnp.broadcast_to(x[:, :1], x.shape)
    assert sown(net, params, one)[LOSSES]["balance"] == pytest.approx(4.0)


def test_padding_counts_in_no_statistic():
    net = layer(capacity_factor=2.0, balance_weight=0.5, z_loss_weight=0.1)
    x = inputs()
    params = init(net, x)
    segments = jnp.ones((ROWS, LENGTH), jnp.int32).at[:, 4:].set(0)
    whole = sown(net, params, x, segments=segments)
    part = sown(
        dataclasses.replace(net, router=dataclasses.replace(net.router, capacity_factor=3.0)),
        params,
        x[:, :4],
    )
    assert_close(whole[LOSSES], part[LOSSES])
    assert_close(whole[SUMMARIES]["moe"]["share"], part[SUMMARIES]["moe"]["share"])
    assert_close(whole[SUMMARIES]["moe"]["entropy"], part[SUMMARIES]["moe"]["entropy"])


def test_the_bias_moves_up_where_an_expert_has_too_few_tokens():
    net = layer(score="sigmoid", bias_rate=0.01)
    x = inputs()
    params = init(net, x)
    found = sown(net, params, x)
    share = np.asarray(found[SUMMARIES]["moe"]["share"])
    np.testing.assert_allclose(share.sum(), 1.0, rtol=1e-6)
    expected = 0.01 * np.sign(1.0 / EXPERTS - share)
    np.testing.assert_allclose(found[UPDATES]["choice_bias"], expected, rtol=1e-6)
    # It decides who is chosen, and nothing else: the gates are those of the scores.
    far = {**params, "choice_bias": jnp.zeros(EXPERTS).at[3].set(10.0)}
    assert sown(net, far, x)[SUMMARIES]["moe"]["share"][3] == pytest.approx(0.5)
    square = lambda p: jnp.sum(jnp.square(net.apply({"params": p}, x, Sequence(train=True))))
    gradient = jax.jit(jax.grad(square))(params)
    assert np.all(np.asarray(gradient["choice_bias"]) == 0.0)
    assert np.any(np.asarray(gradient["router"]["kernel"]) != 0.0)


def test_experts_that_choose_have_as_many_tokens_each():
    net = layer(chosen_by="experts", capacity_factor=2.0, group_size=24)
    x = inputs()
    params = init(net, x)
    tokens = x.reshape(-1, WIDTH)
    scores = jax.nn.softmax(tokens @ params["router"]["kernel"], axis=-1)
    places = 12  # 24 * 2 / 5 = 9, up to a multiple of 4
    out = jnp.zeros_like(tokens)
    for e in range(EXPERTS):
        chosen = np.argsort(-np.asarray(scores[:, e]), kind="stable")[:places]
        gate, up = (tokens[chosen] @ params[n]["kernel"][e] for n in ("gate", "ffn1"))
        y = (jax.nn.silu(gate) * up) @ params["ffn2"]["kernel"][e]
        out = out.at[chosen].add(scores[chosen, e][:, None] * y)
    assert_close(apply(net, params, x), out.reshape(x.shape))


@pytest.mark.parametrize("form", FORMS)
def test_adapters_of_experts_equal_merged_weights(form):
    from paxlike.layers.lora import merge_lora

    lora = Lora(rank=2, alpha=3.0)
    names = ("gate", "ffn1", "ffn2")
    plain = layer(dispatch=form, capacity_factor=2.0)
    net = plain.clone(adapters=dict.fromkeys(names, lora))
    x = inputs()
    params = init(net, x)
    for name in names:
        shape = params[name]["lora"]["b"].shape
        params[name]["lora"]["b"] = 0.3 * jax.random.normal(jax.random.key(5), shape)
    merged = merge_lora(params, lora)
    found = apply(net, params, x)
    assert_close(found, apply(plain, merged, x), 1e-4)
    bare = {n: {"kernel": params[n]["kernel"]} for n in names} | {"router": params["router"]}
    assert np.max(np.abs(found - apply(plain, bare, x))) > 0.1


def test_generating_drops_no_token():
    net = layer(capacity_factor=0.3, group_size=24)
    x = inputs()
    params = init(net, x)
    cached = apply(net, params, x, cache_length=8)
    assert_close(cached, apply(layer(), params, x))
    # Nor does it multiply in 8 bits, which takes the matrices of all experts.
    np.testing.assert_array_equal(
        cached, apply(net.clone(dot_general_cls=Fp8()), params, x, cache_length=8)
    )


def test_jitter_changes_the_router_while_training_alone():
    net = layer(jitter=0.3)
    x = inputs()
    params = init(net, x)
    plain = apply(net, params, x)
    assert np.all(plain == apply(layer(), params, x))
    assert np.any(apply(net, params, x, train=True, rngs={"dropout": jax.random.key(0)}) != plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 6}, "NUM_EXPERTS_PER_TOKEN=6 is not between 1 and NUM_EXPERTS=5"),
        ({"k": 0}, "NUM_EXPERTS_PER_TOKEN=0 is not between 1 and NUM_EXPERTS=5"),
        (
            {"capacity_factor": 0.1, "group_size": 24},
            "less than one token for an expert; use a fac",
        ),
        ({"group_size": 7}, "do not divide into groups of 7 tokens; set MOE_GROUPS"),
        ({"score": "max"}, "ROUTER_SCORE='max' is none of softmax, softmax_of_chosen, sigmoid"),
        ({"dispatch": "magic"}, "MOE_DISPATCH='magic' is none of index, einsum, sort"),
        ({"jitter": 1.5}, r"ROUTER_JITTER=1.5 is not in \[0, 1\)"),
        ({"chosen_by": "experts"}, "need an EXPERT_CAPACITY_FACTOR"),
        (
            {"fp8": Fp8()},
            "FP8 needs sizes that are multiples of 16, and ffn1 is 8 x 12: change them",
        ),
        ({"fp8": dict}, "or by ops.fp8, and not by .*: set an EXPERT_CAPACITY_FACTOR and MOE_DISP"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(change, message):
    net = layer(**change)
    x = inputs()
    with pytest.raises(ValueError, match=message) as error:
        net.apply({"params": init(layer(), x)}, x, Sequence())
    assert "\n" not in str(error.value)
