"""Training in FP8: the state beside the parameters, however a step is computed and wherever it runs."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn
from parallel import meshes

from paxlike import parallel
from paxlike.checkpoint import Checkpointer
from paxlike.layers.block import Block
from paxlike.layers.experts import ExpertLinear
from paxlike.layers.feedforward import FeedForward
from paxlike.layers.linear import Linear
from paxlike.layers.lora import TRAINABLE, Lora
from paxlike.layers.moe import MoE, Router
from paxlike.layers.norm import LayerNorm
from paxlike.layers.sequence import Sequence
from paxlike.layers.stack import Pipeline, Stack
from paxlike.ops.exchange import Exchange
from paxlike.ops.fp8 import STATE, Fp8
from paxlike.parallel import Zero

HISTORY = 4
SMALL = {"layers": 2, "width": 16, "heads": 1, "remat": "SAVE_EVERYTHING"}
DELAYED = Fp8(amax_history=HISTORY)


def fp8_model(**adapters):
    """The tiny GPT, its projections and feed-forward layers in FP8."""
    net = tiny.model(**SMALL)
    (block,) = net.stack.period
    mixer = block.mixer.clone(dot_general_cls=DELAYED, adapters=adapters or None)
    block = block.clone(mixer=mixer, ffn=block.ffn.clone(dot_general_cls=DELAYED))
    return net.clone(stack=net.stack.clone(period=(block,)))


def trainer(shape=(1, 1, 1), *, net=None, **options):
    options = {"compiler_options": meshes.IN_HASTE, **options}
    return tiny.Trainer(shape, net=net or fp8_model(), **options)


def histories(state):
    """Name -> history (layers, 3, n), on the host."""
    tree = jax.device_get(dict(state.collections)[STATE])
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.array(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def same_histories(found, expected, rtol=0.0):
    assert sorted(found) == sorted(expected)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=rtol, err_msg=name)


@pytest.fixture(scope="module")
def made():
    """One compiled step with everything on, and its first state."""
    one = trainer(opt=tiny.optimizer(ema_decay=0.9))
    return one, jax.device_get(one.state)


@pytest.fixture
def one(made):
    """The compiled step with a state of its own."""
    again = copy.copy(made[0])
    again.state = jax.tree.map(jnp.array, made[1])
    return again


def test_it_is_not_plain_training_and_nearly_as_good(one):
    plain = trainer(net=tiny.model(**SMALL), opt=tiny.optimizer(ema_decay=0.9))
    plain.state = jax.tree.map(jnp.array, one.state.replace(collections={}))
    exact, rounded = plain.losses(), one.losses()
    assert not np.array_equal(rounded, exact)
    np.testing.assert_allclose(rounded, exact, rtol=2e-3)


def test_the_newest_step_comes_first(one):
    before = jax.device_get(one.state.params["stack"]["period_0"]["ffn"]["ffn1"]["kernel"])
    assert not any(h.any() for h in histories(one.state).values())
    one.step(one.data[0])
    name = "stack/period_0/ffn/ffn1/fp8/amax_history"
    history = histories(one.state)[name]
    assert history.shape == (2, 3, HISTORY)
    np.testing.assert_array_equal(history[:, 1, 0], np.abs(before).max((1, 2)))
    assert (history[..., 0] > 0).all()
    assert not history[..., 1:].any()
    one.step(one.data[1])
    np.testing.assert_array_equal(histories(one.state)[name][..., 1], history[..., 0])


def test_a_step_that_is_not_finite_leaves_the_state(one):
    one.step(one.data[0])
    before = histories(one.state)
    weights = one.data[1]["weights"]
    one.step({**one.data[1], "weights": np.where(weights > 0, np.inf, weights)})
    assert int(one.state.skipped_steps) == 1
    same_histories(histories(one.state), before)
    one.step(one.data[1])
    for name, after in histories(one.state).items():
        assert np.isfinite(after).all()
        np.testing.assert_array_equal(after[..., 1], before[name][..., 0])


def test_resume_is_identical(one, made, tmp_path):
    for batch in one.data[:2]:
        one.step(batch)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, one.state, data={}, config="{}", wait=True, force=True)
    other = copy.copy(made[0])
    with Checkpointer(tmp_path) as checkpointer:
        other.state = checkpointer.restore(other.abstract).state
    for batch in one.data[2:]:
        assert one.step(batch)["loss"].value() == other.step(batch)["loss"].value()
    same_histories(histories(other.state), histories(one.state))
    jax.tree.map(np.testing.assert_array_equal, other.state.params, one.state.params)


def test_evaluation_reads_the_state_with_averaged_parameters_and_cannot_change_it(one):
    one.step(one.data[0])
    variables = one.state.variables(use_ema=True)
    assert set(variables) == {"params", STATE}
    tokens = jnp.asarray(one.data[0]["tokens"])

    def hidden(variables):
        output, changed = one.model.apply(variables, tokens, mutable=[STATE])
        return output.hidden, changed

    hidden = jax.jit(hidden)
    found, changed = hidden(variables)
    jax.tree.map(np.testing.assert_array_equal, dict(changed)[STATE], variables[STATE])
    fresh = {**variables, STATE: jax.tree.map(jnp.zeros_like, variables[STATE])}
    assert not np.array_equal(found, hidden(fresh)[0])


def test_neither_clipping_nor_the_optimizer_nor_averaging_touches_the_state(one):
    other = trainer(opt=tiny.optimizer(clip_norm=1e-9, b1=0.1))
    other.state = other.state.replace(params=jax.tree.map(jnp.array, one.state.params))
    first, second = one.step(one.data[0]), other.step(one.data[0])
    assert second["clipped_grad_norm"] < 1e-6 < first["clipped_grad_norm"]
    np.testing.assert_array_equal(first["grad_norm"], second["grad_norm"])
    same_histories(histories(one.state), histories(other.state))
    kept = jax.tree.leaves((one.state.opt_state, one.state.ema))
    assert not any(leaf.shape[-2:] == (3, HISTORY) for leaf in kept)
    # Nor is what was seen part of the norm of the gradients.
    assert sum((h**2).sum() for h in histories(one.state).values()) > first["grad_norm"] ** 2


def test_microbatches_zero_and_accumulation_in_bfloat16(one):
    zero = Zero(stage=2, axes=("fsdp", "data"))
    many = trainer((2, 2, 1), zero=zero, microbatches=2, accumulation_dtype="bfloat16")
    many.state = jax.device_put(jax.device_get(one.state.replace(ema=None)), many.shardings)
    np.testing.assert_allclose(many.losses(), one.losses(), rtol=3e-4)
    first = lambda state: {name: h[..., 3:] for name, h in histories(state).items()}
    same_histories(first(many.state), first(one.state), 1e-2)  # of the first step


def test_adapters_learn_on_a_base_in_fp8():
    lora = Lora(rank=4, alpha=8.0)
    net = fp8_model(qkv=lora, out=lora)
    one = trainer(net=net, opt=tiny.optimizer(trainable=TRAINABLE, clip_norm=0.0))
    layer = lambda: jax.device_get(one.state.params["stack"]["period_0"]["mixer"]["qkv"])
    before = layer()
    one.losses()
    np.testing.assert_array_equal(before["kernel"], layer()["kernel"])
    assert (before["lora"]["b"] != layer()["lora"]["b"]).any()
    assert all((h > 0).all() for h in histories(one.state).values())


# --- a stack by itself: cheap enough to compile in every form -----------------------------------

WIDTH, ROWS, LENGTH, LAYERS = 16, 16, 8, 4


def stack_of(fp8=DELAYED, **options):
    ffn = FeedForward(hidden=32, dot_general_cls=fp8)
    block = Block(mixer=ffn.clone(), ffn=ffn, mixer_norm=LayerNorm(), ffn_norm=LayerNorm())
    return Stack((block,), LAYERS, **{"remat": "SAVE_EVERYTHING", **options})


@pytest.fixture(scope="module")
def variables():
    """Of the stack, with the scales of a second step: those of a first one round a gradient to nothing."""
    start = jax.jit(lambda: nn.unbox(stack_of().init(jax.random.key(0), rows(), SEQUENCE)))
    fresh = jax.device_get(start())
    _, gradients = loss_and_seen(stack_of(), fresh, {"data": 1})
    return {"params": fresh["params"], STATE: gradients[STATE]}


@pytest.fixture(scope="module")
def expected(variables):
    return loss_and_seen(stack_of(), variables, {"data": 1})


SEQUENCE = Sequence(None, None, train=True)


def rows():
    return jax.random.normal(jax.random.key(1), (ROWS, LENGTH, WIDTH))


def loss_and_seen(stack, variables, sizes):
    """(loss, {"params": gradients, "fp8": what was seen}) on a mesh of axis -> size."""
    mesh = meshes.build(sizes)

    def loss(variables, x):
        y = stack.apply(variables, parallel.shard(x, "batch", "length", "act_embed"), SEQUENCE)
        return 1e-3 * jnp.mean(jnp.sum(y, axis=-1) ** 2)

    with parallel.activate(mesh):
        place = parallel.named_sharding(mesh, ("batch", "length"))
        compute = jax.jit(jax.value_and_grad(loss), compiler_options=meshes.IN_HASTE)
        return jax.device_get(compute(variables, jax.device_put(rows(), place)))


def assert_same(found, expected):
    """A rounding that falls the other way moves one element by an eighth, and nothing by much."""
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-3)
    for ours, theirs in zip(
        *(jax.tree.leaves(r[1][STATE]) for r in (found, expected)), strict=True
    ):
        assert (theirs[..., 0] > 0).all()
        assert not theirs[..., 1:].any()
        np.testing.assert_allclose(ours, theirs, rtol=3e-2)
    assert meshes.distance(found[1]["params"], expected[1]["params"]) < 3e-2


# Those that differ where a block is made of feed-forward layers.
POLICIES = [
    "SAVE_NOTHING",
    "SAVE_DOT_ONLY",
    "SAVE_DOT_WITH_NO_BATCH_DIM",
    "SAVE_DOT_EXCEPT_LOGITS_FFN1",
    "SAVE_TRANSFORMER_LAYER_OUTPUT",
    "ffn1,ffn2",
]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_kind_of_remat_policy(policy, variables, expected):
    assert_same(loss_and_seen(stack_of(remat=policy), variables, {"data": 1}), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"scan": False},
        {"scan": False, "remat": "SAVE_NOTHING"},
        {"remat": "SAVE_NOTHING", "remat_layers": "first:1"},
        {"remat": "SAVE_NOTHING", "remat_layers": "every:2", "scan": False},
    ],
    ids=["unrolled", "unrolled and remat", "the first layer again", "every second, unrolled"],
)
def test_however_the_layers_are_passed(changes, variables, expected):
    assert_same(loss_and_seen(stack_of(**changes), variables, {"data": 1}), expected)


MESHES = [{"data": 4}, {"fsdp": 4}, {"tensor": 4}, {"fsdp": 2, "tensor": 2}, {"context": 2}]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_same_on_every_mesh(sizes, variables, expected):
    assert_same(loss_and_seen(stack_of(), variables, sizes), expected)


PIPELINES = {
    "two stages": ({"pipeline": 2}, Pipeline(4)),
    "twice around, fsdp": ({"pipeline": 2, "fsdp": 2}, Pipeline(4, 2)),
    "data, gathered in every tick": ({"pipeline": 2, "data": 2}, Pipeline(2, gather_once=False)),
    "tensor": ({"pipeline": 2, "tensor": 2}, Pipeline(2)),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_sees_the_largest_of_what_its_microbatches_see(name, variables, expected):
    sizes, pipeline = PIPELINES[name]
    found = loss_and_seen(stack_of(pipeline=pipeline, remat="SAVE_NOTHING"), variables, sizes)
    assert_same(found, expected)


def test_current_scaling_has_no_state_and_goes_through_a_pipeline(variables, expected):
    current = Fp8("current")
    assert set(jax.eval_shape(stack_of(current).init, jax.random.key(0), rows(), SEQUENCE)) == {
        "params"
    }
    params = {"params": variables["params"]}
    alone = loss_and_seen(stack_of(current), params, {"data": 1})
    np.testing.assert_allclose(alone[0], expected[0], rtol=2e-2)
    stack = stack_of(current, pipeline=Pipeline(2))
    found = loss_and_seen(stack, params, {"pipeline": 2, "data": 2})
    np.testing.assert_allclose(found[0], alone[0], rtol=2e-2)
    assert meshes.distance(found[1], alone[1]) < 0.1


def test_a_weight_that_is_used_twice_is_seen_too_large_at_most(variables, expected):
    stack = stack_of()

    def loss(state):
        given = {"params": variables["params"], STATE: state}
        y = stack.apply(given, stack.apply(given, rows(), SEQUENCE), SEQUENCE)
        return 1e-3 * jnp.mean(jnp.sum(y, axis=-1) ** 2)

    seen = jax.device_get(jax.jit(jax.grad(loss))(variables[STATE]))
    weight = lambda tree: tree["period_0"]["ffn"]["ffn1"]["fp8"]["amax_history"][:, 1]
    np.testing.assert_allclose(weight(seen), 2 * weight(expected[1][STATE]))


def experts_of(fp8=DELAYED, dispatch="index", capacity_factor=1.0, exchange="gather", **options):
    """A stack with layers of four experts, who have no place for some of the tokens."""
    router = Router(capacity_factor=capacity_factor, group_size=LENGTH, balance_weight=0.1)
    experts = MoE(
        4, 32, router, dispatch=dispatch, dot_general_cls=fp8, use_bias=False,
        kernel_init=nn.initializers.normal(0.2), exchange=Exchange(exchange),
    )  # fmt: skip
    mixer = FeedForward(hidden=16)
    block = Block(mixer=mixer, ffn=experts, mixer_norm=LayerNorm(), ffn_norm=LayerNorm())
    return Stack((block,), 2, **{"remat": "SAVE_EVERYTHING", **options})


@pytest.fixture(scope="module")
def of_experts():
    """Variables of a second step, and what one device makes of them."""
    start = jax.jit(lambda: nn.unbox(experts_of().init(jax.random.key(0), rows(), SEQUENCE)))
    fresh = jax.device_get(start())
    _, gradients = loss_and_seen(experts_of(), fresh, {"data": 1})
    variables = {"params": fresh["params"], STATE: gradients[STATE]}
    return variables, loss_and_seen(experts_of(), variables, {"data": 1})


def test_experts_are_nearly_those_in_float32(of_experts):
    variables, one = of_experts
    half = variables[STATE]["period_0"]["ffn"]
    assert sorted(half) == ["ffn1", "ffn2"]
    assert all((h["fp8"]["amax_history"][..., 0] > 0).all() for h in half.values())
    # One amax for the matrices of all experts of a layer.
    kernel = variables["params"]["period_0"]["ffn"]["ffn1"]["kernel"]
    seen = half["ffn1"]["fp8"]["amax_history"]
    assert seen.shape == (2, 3, HISTORY)
    seen = seen[:, 1, 0]
    np.testing.assert_array_equal(seen, np.abs(kernel).max((1, 2, 3)))
    exact = loss_and_seen(experts_of(None), {"params": variables["params"]}, {"data": 1})
    np.testing.assert_allclose(one[0], exact[0], rtol=3e-2)
    # Where a rounding changes whom a token goes to, the gradient is another one.
    assert 1e-2 < meshes.distance(one[1]["params"], exact[1]["params"]) < 0.3


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"expert": 2, "fsdp": 2}, {"dispatch": "einsum"}),
        ({"expert": 2, "pipeline": 2}, {"pipeline": Pipeline(2)}),
    ],
    ids=str,
)
def test_experts_see_the_same_on_every_mesh(sizes, options, of_experts):
    variables, one = of_experts
    assert_same(loss_and_seen(experts_of(**options), variables, sizes), one)


@pytest.fixture(scope="module")
def dropless(of_experts):
    """What one device makes of the same variables where all tokens have a place."""
    return loss_and_seen(experts_of(capacity_factor=None), of_experts[0], {"data": 1})


def test_experts_without_capacity_are_those_with_places_for_all(dropless, of_experts):
    places = loss_and_seen(experts_of(capacity_factor=4.0), of_experts[0], {"data": 1})
    np.testing.assert_allclose(dropless[0], places[0], rtol=1e-6)
    for ours, theirs in zip(*(jax.tree.leaves(r[1][STATE]) for r in (dropless, places))):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert meshes.distance(dropless[1]["params"], places[1]["params"]) < 1e-4
    assert meshes.distance(dropless[1]["params"], of_experts[1][1]["params"]) > 1e-2


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"expert": 2, "fsdp": 2}, {"remat": "SAVE_NOTHING", "exchange": "all_to_all"}),
        ({"pipeline": 2, "tensor": 2}, {"pipeline": Pipeline(2)}),
    ],
    ids=str,
)
def test_experts_without_capacity_see_the_same_on_every_mesh(sizes, options, of_experts, dropless):
    stack = experts_of(capacity_factor=None, **options)
    assert_same(loss_and_seen(stack, of_experts[0], sizes), dropless)


def test_experts_without_capacity_scale_by_what_all_devices_have(of_experts):
    stack = experts_of(Fp8("current"), capacity_factor=None)
    params = {"params": of_experts[0]["params"]}
    alone = loss_and_seen(stack, params, {"data": 1})
    found = loss_and_seen(stack, params, {"expert": 2, "tensor": 2})
    np.testing.assert_allclose(found[0], alone[0], rtol=1e-5)
    assert meshes.distance(found[1], alone[1]) < 1e-3


def test_adapters_beside_experts():
    layer = ExpertLinear(4, 16, 32, ("expert_embed", "mlp"), dot_general_cls=Fp8("current"))
    adapted = layer.clone(adapter=Lora(rank=2, alpha=4.0))
    x = rows()[:4]
    params = nn.unbox(adapted.init(jax.random.key(0), x))["params"]
    a, b = params["lora"]["a"], jnp.ones_like(params["lora"]["b"])
    found = adapted.apply({"params": {**params, "lora": {"a": a, "b": b}}}, x)
    plain = layer.apply({"params": {"kernel": params["kernel"]}}, x)
    thin = 2.0 * jnp.einsum("enp,epr,erq->enq", x, a, b)
    np.testing.assert_allclose(found, plain + thin, rtol=1e-5, atol=1e-5)
    assert not np.array_equal(plain, jnp.einsum("enp,epq->enq", x, params["kernel"]))


def test_sizes_that_are_no_multiple_of_sixteen():
    layer = Linear((3, 1, 8), ("embed", None, "heads", "head_dim"), dot_general_cls=DELAYED)
    with pytest.raises(
        ValueError, match=r"multiples of 16, and .* is 16 x 24: .*FP8_LAYERS"
    ) as error:
        jax.eval_shape(layer.init, jax.random.key(0), rows())
    assert "\n" not in str(error.value)
