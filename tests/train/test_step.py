"""The training step: the same numbers on every mesh, what is sharded, what is communicated, and every option."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from collectives import collectives

from paxlike.tasks.language import CausalLanguage
from paxlike.train.optimizer import Optimizer, Schedule

MESHES = [(4, 1, 1), (1, 4, 1), (1, 1, 4), (2, 2, 1), (1, 2, 2), (2, 1, 2)]


@pytest.fixture(scope="module")
def reference():
    return tiny.Trainer().losses()


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_same_losses_on_every_mesh(shape, reference):
    np.testing.assert_allclose(tiny.Trainer(shape).losses(), reference, rtol=1e-5)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"net": tiny.model(scan=False)},
        {"net": tiny.model(remat="SAVE_EVERYTHING")},
        {"net": tiny.model(scan=False, remat="SAVE_DOT_WITH_NO_BATCH_DIM")},
        {"microbatches": 4},
        {"task": CausalLanguage(chunk=8)},
        {"shape": (2, 1, 2), "microbatches": 2, "task": CausalLanguage(chunk=8)},
    ],
    ids=[
        "unrolled",
        "no remat",
        "unrolled, dots kept",
        "4 microbatches",
        "chunked loss",
        "all on a mesh",
    ],
)
def test_same_losses_however_it_is_computed(kwargs, reference):
    np.testing.assert_allclose(tiny.Trainer(**kwargs).losses(), reference, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 2, 1), (1, 2, 2)], ids=str)
def test_dropout_masks_do_not_depend_on_the_mesh(shape):
    net = tiny.model(dropout=0.2, layers=2)
    one, many = tiny.Trainer(net=net), tiny.Trainer(shape, net=net)
    expected = one.losses()
    np.testing.assert_allclose(many.losses(), expected, rtol=1e-5)
    still = tiny.Trainer(net=tiny.model(layers=2)).losses()
    assert abs(still[0] - expected[0]) > 1e-4, "dropout must change the loss"


@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 4, 1), (1, 2, 2)], ids=str)
def test_state_is_sharded_and_moments_like_their_parameters(shape):
    trainer = tiny.Trainer(shape, opt=tiny.optimizer(ema_decay=0.9))
    named = jax.tree_util.tree_leaves_with_path(trainer.state.params)
    matrices = [leaf for path, leaf in named if path[-1].key == "kernel"]
    parts = shape[1] * shape[2]
    assert matrices and all(
        leaf.addressable_shards[0].data.size * parts == leaf.size for leaf in matrices
    )
    adam = trainer.state.opt_state[0]
    for moments in (adam.mu, adam.nu, trainer.state.ema):
        same = jax.tree.map(lambda m, p: m.sharding == p.sharding, moments, trainer.state.params)
        assert all(jax.tree.leaves(same))
    # What the compiler says the arguments take on a device is the sum of the shards of the state and of the batch.
    arguments = [*jax.tree.leaves(trainer.abstract), *jax.tree.leaves(trainer.factory.spec)]
    expected = sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in arguments)
    assert trainer.compiled.memory_analysis().argument_size_in_bytes == pytest.approx(
        expected, rel=0.01
    )
    single = (
        tiny.Trainer(opt=tiny.optimizer(ema_decay=0.9))
        .compiled.memory_analysis()
        .argument_size_in_bytes
    )
    if parts > 1:
        assert expected < 1.35 * single / parts


def test_data_parallelism_reduces_gradients_once():
    found = collectives(tiny.Trainer((4, 1, 1)).compiled)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(tiny.Trainer().state.params))
    assert set(found) == {"all-reduce"}
    reduced = sum(sum(one.sizes) for one in found["all-reduce"])
    # The table is summed from two places (embedding and logits); everything else once. In the loop over layers the
    # program holds the reduction of one layer of four.
    assert reduced <= parameters + tiny.VOCAB * 64 + 100


def test_fsdp_gathers_weights_and_keeps_no_full_gradient():
    trainer = tiny.Trainer((1, 4, 1))
    found = collectives(trainer.compiled)
    assert set(found) <= {"all-gather", "all-reduce", "reduce-scatter"}
    # In each pass (nothing is saved) the weights of the layer, each once: qkv, out, ffn1, ffn2.
    for one_pass in (False, True):
        gathered = [
            one.size
            for one in found["all-gather"]
            if "stack._in_turn/while/body" in one.name and ("transpose" in one.name) == one_pass
        ]
        assert sorted(gathered) == [64 * 64, 3 * 64 * 64, 4 * 64 * 64, 4 * 64 * 64]
    # A CPU has no reduce-scatter: it reduces one layer and keeps its slice. Nothing of the size of all layers is
    # reduced or gathered: that would be a replicated gradient.
    stacked = max(leaf.size for leaf in jax.tree.leaves(trainer.state.params))
    largest = max(one.size for kind in found for one in found[kind])
    assert largest <= max(stacked // 4, tiny.VOCAB * 64)
    gradients = jax.tree.leaves(trainer.compiled.output_shardings[0].params)
    assert len(gradients) == len(jax.tree.leaves(trainer.state.params))


def test_tensor_parallelism_reduces_activations_twice_per_block_and_direction():
    trainer = tiny.Trainer((1, 1, 4), net=tiny.model(remat="SAVE_EVERYTHING"))
    found = collectives(trainer.compiled)
    activation = tiny.ROWS * tiny.LENGTH * 64
    inside = [
        one.name
        for one in found["all-reduce"]
        if one.sizes == (activation,) and "while/body" in one.name
    ]
    forward = [name for name in inside if "transpose" not in name]
    backward = [name for name in inside if "transpose" in name]
    assert len(forward) == 2 and len(backward) == 2, inside
    # No weight and no logits travel; the argmax of sharded logits gathers one number per position and shard.
    assert all(one.size <= 4 * tiny.ROWS * tiny.LENGTH for one in found["all-gather"])


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    trainer = tiny.Trainer(opt=tiny.optimizer(ema_decay=0.9))
    trainer.step(trainer.data[0])
    before = jax.tree.map(np.array, trainer.state)
    bad = dict(trainer.data[1])
    bad["weights"] = bad["weights"].copy()
    bad["weights"][0, 0] = np.inf
    metrics = trainer.step(bad)
    assert not np.isfinite(metrics["grad_norm"]) and metrics["skipped_steps"] == 1
    after = jax.tree.map(np.array, trainer.state)
    assert after.step == before.step + 1
    jax.tree.map(
        np.testing.assert_array_equal,
        dataclasses.replace(after, step=0, skipped_steps=0),
        dataclasses.replace(before, step=0, skipped_steps=0),
    )
    assert np.isfinite(trainer.step(trainer.data[2])["loss"].value())
    assert trainer.state.skipped_steps == 1


def test_steps_above_a_chosen_norm_are_skipped():
    trainer = tiny.Trainer(opt=tiny.optimizer(skip_norm=1e-3))
    assert trainer.step(trainer.data[0])["skipped_steps"] == 1


def test_ema_is_the_moving_average_of_the_parameters():
    trainer = tiny.Trainer(opt=tiny.optimizer(ema_decay=0.75))
    expected = np.array(trainer.state.params["embedding"]["table"])
    for batch in trainer.data:
        trainer.step(batch)
        expected = 0.75 * expected + 0.25 * np.array(trainer.state.params["embedding"]["table"])
    np.testing.assert_allclose(
        trainer.state.ema["embedding"]["table"], expected, rtol=1e-5, atol=1e-7
    )


def test_update_is_clip_then_adam_then_decay_times_the_schedule():
    schedule = Schedule("linear_rampup_cosine_decay", 0.1, warmup=4, decay_start=5, decay_end=9)
    ours = Optimizer(schedule, b1=0.8, b2=0.9, epsilon=1e-3, weight_decay=0.2, clip_norm=0.5)
    params = {"w": jnp.array([1.0, -2.0]), "norm": {"scale": jnp.array([3.0])}}
    opt_state = ours.init(params)
    m = v = jax.tree.map(np.zeros_like, jax.tree.map(np.array, params))
    expected = jax.tree.map(np.array, params)
    for step in range(10):
        gradients = jax.tree.map(lambda p: p * 0.3 + step, params)
        norm = optax.tree.norm(gradients)
        clipped = jax.tree.map(lambda g: g * ours.clip_factor(norm), gradients)
        directions, opt_state = ours.update(clipped, opt_state, params)
        rate = schedule(step)
        params = jax.tree.map(lambda p, u: p - rate * u, params, directions)
        # Written out: Adam with bias correction, decay on everything, norms included.
        g = jax.tree.map(lambda p: p * 0.3 + step, expected)
        scale = min(1.0, 0.5 / math.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(g))))
        g = jax.tree.map(lambda x: x * scale, g)
        m = jax.tree.map(lambda m, g: 0.8 * m + 0.2 * g, m, g)
        v = jax.tree.map(lambda v, g: 0.9 * v + 0.1 * g * g, v, g)
        t = step + 1
        update = jax.tree.map(
            lambda m, v, p: m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3) + 0.2 * p,
            m,
            v,
            expected,
        )
        lr = (
            0.1
            * (min(step / 4, 1.0))
            * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(max((step - 5) / 4, 0), 1))))
        )
        expected = jax.tree.map(lambda p, u: p - lr * u, expected, update)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), params, expected)


def test_decay_can_leave_out_norms_and_biases():
    params = {"kernel": jnp.ones(3), "bias": jnp.ones(3), "scale": jnp.ones(3)}
    ours = Optimizer(Schedule("constant", 1.0), weight_decay=0.5, decay_exclude=r"(scale|bias)$")
    update, _ = ours.update(jax.tree.map(jnp.zeros_like, params), ours.init(params), params)
    assert (
        float(update["kernel"][0]) == 0.5
        and float(update["bias"][0]) == 0
        and float(update["scale"][0]) == 0
    )


def test_pax_learning_rates():
    schedule = Schedule(
        "linear_rampup_cosine_decay", 6e-4, warmup=636, decay_start=637, decay_end=500000
    )
    points = {0: 0.0, 318: 3e-4, 636: 6e-4, 250318.5: 3.3e-4, 500000: 6e-5, 600000: 6e-5}
    for step, rate in points.items():
        assert float(schedule(step)) == pytest.approx(rate, rel=1e-5)
    exponential = Schedule(
        "linear_rampup_exponential_decay", 1e-3, warmup=4000, decay_start=4001, decay_end=300000
    )
    assert float(exponential(152000.5)) == pytest.approx(1e-3 * math.sqrt(0.1), rel=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule("cosine", 1e-3), "LR_SCHEDULE='cosine' is none of"),
        (
            lambda: Schedule("linear_rampup_cosine_decay", 1e-3, 10, 5, 20),
            "warmup <= decay start < decay end, got 10, 5, 20",
        ),
        (
            lambda: Optimizer(Schedule("constant", 1e-3), b1=1.0),
            r"ADAM_BETA1=1.0 is not in \[0, 1\)",
        ),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_does_not_divide_over_the_mesh_is_named():
    with pytest.raises(
        ValueError,
        match=r"parameter 'params/stack/period_0/mixer/.*'heads' = 2 .* tensor = 4; use tensor = 2",
    ):
        tiny.Trainer((1, 1, 4), net=tiny.model(heads=2))
    with pytest.raises(ValueError, match="a batch of 8 rows does not divide into 3 microbatches"):
        tiny.Trainer(microbatches=3)


def test_a_batch_can_be_learned_by_heart():
    trainer = tiny.Trainer(
        opt=tiny.optimizer(schedule=Schedule("constant", 1e-2), weight_decay=0.0),
        data=tiny.batches(1, rows=2),
    )
    for _ in range(60):
        loss = trainer.step(trainer.data[0])["loss"].value()
    assert loss < 0.05


def test_bfloat16_computes_in_16_bits_on_float32_masters():
    trainer = tiny.Trainer(net=tiny.model(dtype="bfloat16"))
    reference = tiny.Trainer().losses()
    losses = trainer.losses()
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(trainer.state.params))
    np.testing.assert_allclose(losses, reference, rtol=2e-3)
    assert losses != reference


def test_cudnn_attention_is_refused_where_there_is_no_gpu():
    with pytest.raises(ValueError, match="needs an NVIDIA GPU and this is a cpu: set USE_CUDNN"):
        tiny.Trainer(net=tiny.model(implementation="cudnn"))
