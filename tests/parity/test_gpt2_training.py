"""Thirty training steps against an independent PyTorch loop.

Same weights, same batches; every loss and gradient norm within 1e-5 relative, and the weights at the end.
"""

import dataclasses

import jax
import numpy as np
import pytest

from paxlike import parallel
from paxlike.tasks.language import CausalLanguage
from paxlike.train.optimizer import Optimizer, Schedule
from paxlike.train.state import StateFactory
from paxlike.train.step import TrainStep

NEEDS = "parity tests need torch and transformers (the extra `parity`)"
pytest.importorskip("torch", reason=NEEDS)
pytest.importorskip("transformers", reason=NEEDS)

from tests.parity import torch_loop  # noqa: E402
from tests.parity.gpt2 import decoder, hugging_face, to_hugging_face, to_paxlike  # noqa: E402

pytestmark = pytest.mark.parity

NUM_STEPS = 30
ROWS, LENGTH, VOCAB_SIZE = 8, 24, 61
TOLERANCE = 1e-5  # asked for: 1e-4; measured: 5e-7
RECIPE = torch_loop.Recipe(
    peak=3e-3,
    warmup=6,
    decay_start=10,
    decay_end=26,
    min_ratio=0.1,
    betas=(0.9, 0.95),
    epsilon=1e-8,
    weight_decay=0.1,
    clip_norm=1.0,
)


@dataclasses.dataclass
class Case:
    """A variant: changes of the recipe, and what only paxlike has a choice in."""

    recipe: dict = dataclasses.field(default_factory=dict)
    decay_exclude: str | None = None
    chunk: int | None = None
    mesh: tuple[int, int, int] = (1, 1, 1)
    model: dict = dataclasses.field(default_factory=dict)


CASES = {
    "plain": Case(),
    "z-loss": Case({"z_loss": 3e-2}, chunk=8),
    "accumulation": Case({"num_microbatches": 2}),
    "no-decay-on-vectors": Case(
        {"decays": lambda name: not (".ln_" in name or name.endswith(".bias"))},
        decay_exclude="norm|bias",
    ),
    "mesh": Case(
        {"num_microbatches": 2, "z_loss": 3e-2},
        chunk=8,
        mesh=(1, 2, 2),
        model={"remat": "SAVE_NOTHING"},
    ),
}


@pytest.fixture(scope="module")
def reference():
    return hugging_face(
        num_layers=2, width=32, num_heads=4, vocab_size=VOCAB_SIZE + 3, max_length=LENGTH, std=0.1
    )


@pytest.fixture(scope="module")
def batches():
    return list(_batches())


@pytest.mark.parametrize("name", CASES)
def test_thirty_steps_equal_pytorch(name, reference, batches):
    case = CASES[name]
    recipe = dataclasses.replace(RECIPE, **case.recipe)
    expected = torch_loop.train(reference, batches, recipe)
    losses, norms, rates, params = _train(case, recipe, reference, batches)

    # The run tests something: it learns, and clipping is active in some steps and not in others.
    assert expected.losses[-1] < 0.8 * expected.losses[0]
    assert min(expected.grad_norms) < recipe.clip_norm < max(expected.grad_norms)
    np.testing.assert_allclose(rates, expected.rates, rtol=1e-6)
    np.testing.assert_allclose(losses, expected.losses, rtol=TOLERANCE, atol=0)
    np.testing.assert_allclose(norms, expected.grad_norms, rtol=TOLERANCE, atol=0)
    for key, value in to_hugging_face(params, expected.weights).items():
        value, wanted = _identifiable(key, value), _identifiable(key, expected.weights[key].numpy())
        np.testing.assert_allclose(value, wanted, atol=TOLERANCE, rtol=0, err_msg=key)


def _identifiable(key, value):
    """Drops the bias of the attention keys: it changes no output, so its gradient is rounding, which Adam magnifies."""
    if key.endswith("c_attn.bias"):
        query, _, value_bias = np.split(value, 3)
        return np.concatenate([query, value_bias])
    return value


def _train(case, recipe, reference, batches):
    model = decoder(reference.config, **case.model)
    schedule = Schedule(
        "linear_rampup_cosine_decay",
        recipe.peak,
        warmup=recipe.warmup,
        decay_start=recipe.decay_start,
        decay_end=recipe.decay_end,
        min_ratio=recipe.min_ratio,
    )
    optimizer = Optimizer(
        schedule,
        b1=recipe.betas[0],
        b2=recipe.betas[1],
        epsilon=recipe.epsilon,
        weight_decay=recipe.weight_decay,
        decay_exclude=case.decay_exclude,
        clip_norm=recipe.clip_norm,
    )
    mesh = parallel.Mesh(ici=case.mesh).build(jax.devices()[: int(np.prod(case.mesh))])
    task = CausalLanguage(z_loss=recipe.z_loss, chunk=case.chunk)
    with parallel.activate(mesh):
        spec = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batches[0].items()}
        factory = StateFactory(model, optimizer, spec, mesh)
        abstract = factory.abstract()
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        zeros = lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
        state = jax.tree.map(zeros, abstract)  # step and moments; no need to compile initialisers
        state = state.replace(params=to_paxlike(reference.state_dict(), abstract.params))
        step = TrainStep(
            model, task, optimizer, recipe.num_microbatches, shardings=shardings.params
        )
        step = jax.jit(step, out_shardings=(shardings, None))
        rows = parallel.named_sharding(mesh, ("batch", "length"))
        losses, norms, rates = [], [], []
        for batch in batches:
            state, metrics = step(state, jax.device_put(batch, rows))
            losses.append(metrics["loss"].value())
            norms.append(float(metrics["grad_norm"]))
            rates.append(float(metrics["learning_rate"]))
    return losses, norms, rates, jax.device_get(state.params)


def _batches():
    """Arithmetic progressions modulo the vocabulary, which can be learnt; unequal weights, whole rows without any."""
    rng = np.random.default_rng(0)
    for _ in range(NUM_STEPS):
        start = rng.integers(0, VOCAB_SIZE, (ROWS, 1))
        stride = rng.integers(1, 3, (ROWS, 1))
        stream = ((start + stride * np.arange(LENGTH + 1)) % VOCAB_SIZE).astype(np.int32)
        weights = (rng.random((ROWS, LENGTH)) < 0.7).astype(np.float32)
        weights[rng.integers(ROWS)] = 0.0
        yield {"tokens": stream[:, :-1], "targets": stream[:, 1:], "weights": weights}
