"""Training with experts: auxiliary losses, biases that move without gradients, every form of the stack, generating."""

import re

import fiddle as fdl
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from configs import glam, mixtral
from paxlike import parallel
from paxlike.ops import platform
from tests import tiny

SMALL = {
    "NUM_HEADS": 2, "DIMS_PER_HEAD": 8, "MODEL_DIMS": 16, "HIDDEN_DIMS": 24, "VOCAB_SIZE": tiny.VOCAB,
    "MAX_SEQ_LEN": tiny.LENGTH, "FPROP_DTYPE": "float32", "ICI_MESH_SHAPE": (1, 1, 1), "DCN_MESH_SHAPE": (1, 1, 1),
    "NUM_EXPERTS": 4, "NUM_LAYERS": 4, "PERCORE_BATCH_SIZE": tiny.ROWS, "USE_REPEATED_LAYER": True,
}  # fmt: skip


def build(kind=glam.PileGLaM126M64E, **changes):
    return fdl.build(kind(**{**SMALL, **changes}).experiment())


def with_bias():
    """A model whose experts are balanced by a bias, which moves by 0.01 a step."""
    return build(
        mixtral.Mixtral8x7B,
        TRAIN_SET="text",
        EVAL_SETS=(),
        NUM_KV_HEADS=2,
        ROUTER_SCORE="sigmoid",
        ROUTER_BIAS_RATE=0.01,
    ).model


def whole(trainer):
    return jax.device_get(nn.unbox(trainer.state.params))


def trained(net, *, microbatches=1, steps=2, **options):
    trainer = tiny.Trainer(net=net, microbatches=microbatches, **options)
    metrics = [trainer.step(batch) for batch in trainer.data[:steps]]
    return whole(trainer), metrics


def test_what_is_computed_again_changes_nothing():
    # Layers that are written out, looped over, or partly computed again say the same about their experts.
    groups = {"MOE_GROUPS": tiny.ROWS}
    expected, metrics = trained(build(**groups).model)
    assert float(metrics[0]["aux_loss"].value()) > 0.0099
    for changes in (
        {"CHECKPOINT_POLICY": "SAVE_NOTHING", "CHECKPOINT_LAYERS": "first:1"},
        {"CHECKPOINT_POLICY": "SAVE_NOTHING", "CHECKPOINT_LAYERS": "every:2"},
    ):
        found, others = trained(build(**groups, **changes).model)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)
        assert metrics[1].keys() == others[1].keys()
        for name in ("aux_loss", "moe/entropy", "moe/share"):
            a, b = (np.asarray(m[1][name].sum) for m in (metrics, others))
            np.testing.assert_allclose(a, b, rtol=1e-4)


def test_microbatches_give_the_step_of_the_whole_batch():
    # Rows are routed apart, so that it makes no difference which of them are together.
    net = build(MOE_GROUPS=tiny.ROWS).model
    data = tiny.batches(weights=False)
    expected, metrics = trained(net, data=data)
    found, others = trained(net, microbatches=2, data=data)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)
    assert others[0]["aux_loss"].value() == pytest.approx(metrics[0]["aux_loss"].value(), rel=1e-4)
    assert metrics[0]["moe/share"].sum.shape == (2, 4)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_bias_moves_by_its_rate_and_by_nothing_else(microbatches):
    net = with_bias()
    params, metrics = trained(
        net,
        microbatches=microbatches,
        steps=1,
        opt=tiny.optimizer(decay_exclude="bias$"),
    )
    bias = params["stack"]["period_0"]["ffn"]["choice_bias"]
    assert bias.shape == (4, 4)
    # Up, down or not at all; with microbatches the mean of what they say.
    steps = bias * microbatches / 0.01
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)
    assert np.max(np.abs(bias)) == pytest.approx(0.01)
    assert np.any(bias > 0) and np.any(bias < 0)
    if microbatches == 1:
        share = np.asarray(metrics[0]["moe/share"].sum) / float(metrics[0]["moe/share"].weight)
        assert np.array_equal(np.sign(bias), np.sign(0.25 - share))


def test_frozen_layers_of_experts_keep_their_bias():
    net = with_bias()
    params, _ = trained(net, steps=1, opt=tiny.optimizer(trainable="mixer"))
    assert np.all(params["stack"]["period_0"]["ffn"]["choice_bias"] == 0.0)


@pytest.mark.parametrize("scan", [True, False])
def test_generating_with_a_cache_equals_the_whole_row(scan, monkeypatch):
    monkeypatch.setattr(platform, "CPU_COPY_BYTES", 0)  # as for models too large for copies
    # Places for all: generating drops no token.
    net = build(EXPERT_CAPACITY_FACTOR=8.0, USE_REPEATED_LAYER=scan, NUM_EXPERTS=8).model
    tokens = jnp.asarray(tiny.batches()[0]["tokens"][:2, :10])
    mesh = parallel.Mesh().build(jax.devices()[:1])
    with parallel.activate(mesh):
        params = nn.unbox(jax.jit(net.init)(jax.random.key(0), tokens))["params"]
        params = jax.tree.map(
            lambda p: p + 0.05 * jnp.cos(jnp.arange(p.size).reshape(p.shape)), params
        )
        full = jax.jit(lambda p: net.apply({"params": p}, tokens).logits())(params)
        first = lambda p: net.apply(
            {"params": p}, tokens[:, :4], cache_length=16, mutable=["cache"]
        )
        output, state = jax.jit(first)(params)
        logits = [output.logits()]

        @jax.jit
        def next_token(params, cache, token, offset):
            return net.apply(
                {"params": params, "cache": cache},
                token,
                offset=offset,
                cache_length=16,
                mutable=["cache"],
            )

        step = lambda i: (tokens[:, i : i + 1], jnp.full((2,), i, jnp.int32))
        compiled = next_token.lower(params, state["cache"], *step(4)).compile()
        for i in range(4, 10):
            output, state = compiled(params, state["cache"], *step(i))
            logits.append(output.logits())
    np.testing.assert_allclose(jnp.concatenate(logits, axis=1), full, atol=2e-4)
    # The weights of chosen experts are cut out of those of all layers: no array holds all experts of a layer.
    made = r"= f32\[(1,)?8,(16,24|24,16)\]\S* (?!parameter|get-tuple-element|bitcast)"
    of_all_layers = r"f32\[2,8,(16,24|24,16)\]"
    program = compiled.as_text()
    assert re.search(of_all_layers, program)
    assert not [line for line in _not_fused(program) if re.search(made, line)]


def _not_fused(program):
    """Lines of the computations whose results are arrays in memory."""
    for computation in program.split("\n\n"):
        if not re.match(r"%?(fused|wrapped)", computation.lstrip()):
            yield from computation.splitlines()


def test_flops_count_the_experts_that_work():
    from paxlike.train.program import model_flops
    from paxlike.train.state import StateFactory

    def flops(**changes):
        experiment = build(**changes)
        spec = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in tiny.batches()[0].items()}
        mesh = parallel.Mesh().build(jax.devices()[:1])
        with parallel.activate(mesh):
            factory = StateFactory(experiment.model, experiment.optimizer, spec, mesh)
            return model_flops(experiment, factory.abstract(), spec)

    # Twice the experts, or none dropped: only the router grows.
    tokens, layers = tiny.ROWS * tiny.LENGTH, 2
    router = 3 * layers * 2 * tokens * 16 * 4
    assert flops(NUM_EXPERTS=8) - flops() == router
    assert flops(EXPERT_CAPACITY_FACTOR=None) == flops()
    expert = 3 * layers * 2 * tokens * 16 * 24 * 2
    assert flops() - flops(NUM_EXPERTS_PER_TOKEN=1) == expert
