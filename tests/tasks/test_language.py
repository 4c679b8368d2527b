"""Next-token prediction against sums written out by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from paxlike.models.decoder import Output
from paxlike.tasks.language import CausalLanguage


class Table(nn.Module):
    """A model whose logits of each position are given: hidden states are rows of the identity."""

    logits: tuple
    cap: float | None = None

    @nn.compact
    def __call__(self, tokens, *, train=False, positions=None, segments=None):
        logits = jnp.array(self.logits)
        b, s, v = logits.shape
        hidden = jax.nn.one_hot(jnp.arange(b * s), b * s).reshape(b, s, b * s)
        return Output(hidden, logits.reshape(b * s, v).T, self.cap)


def log_softmax(x):
    x = np.array(x, np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


LOGITS = np.array(
    [
        [[2, 0, 1, 0], [0, 3, 0, 1], [1, 0, 0, 5]],  # argmax 0 1 3
        [[0, 0, 4, 1], [1, 0, 2, 0], [0, 1, 0, 0]],  # argmax 2 2 1
        [[9, 0, 0, 0], [9, 0, 0, 0], [9, 0, 0, 0]],
    ],
    np.float32,
)
BATCH = {
    "tokens": np.zeros((3, 3), np.int32),
    "targets": np.array([[1, 1, 3], [2, 0, 1], [0, 0, 0]], np.int32),
    # Row 0 scores positions 1 and 2 (both right); row 1 scores 0 and 1 (one wrong); row 2 only fills the batch.
    "weights": np.array([[0, 1, 1], [1, 1, 0], [1, 1, 1]], np.float32),
    "example_weight": np.array([1, 1, 0], np.float32),
    "num_bytes": np.array([7, 4, 100], np.float32),
}


@pytest.fixture
def model():
    return Table(tuple(tuple(map(tuple, row)) for row in LOGITS.tolist()))


@pytest.mark.parametrize("chunk", [None, 1])
def test_evaluation_counts_whole_rows_real_tokens_and_bytes(model, chunk):
    metrics = CausalLanguage(chunk=chunk).evaluate(model, {}, jax.tree.map(jnp.array, BATCH))
    logp = log_softmax(LOGITS)
    nll = -(logp[0, 1, 1] + logp[0, 2, 3] + logp[1, 0, 2] + logp[1, 1, 0])
    assert metrics["loss"].value() == pytest.approx(nll / 4, rel=1e-6)
    assert metrics["log_pplx"].value() == pytest.approx(nll / 4, rel=1e-6)
    assert metrics["accuracy"].value() == pytest.approx(3 / 4)
    assert "acc_strict" not in metrics, "rows of running text are no answers"
    assert "boolq_acc" not in metrics
    assert metrics["bits_per_byte"].value() == pytest.approx(nll / math.log(2) / 11, rel=1e-6)


def test_a_cap_of_the_logits_is_part_of_the_loss():
    capped = Table(tuple(tuple(map(tuple, row)) for row in LOGITS.tolist()), cap=3.0)
    batch = {k: jnp.array(BATCH[k]) for k in ("tokens", "targets", "weights")}
    logp = log_softmax(3 * np.tanh(LOGITS / 3))
    nll = -np.take_along_axis(logp, BATCH["targets"][..., None], -1)[..., 0]
    expected = (BATCH["weights"] * nll).sum()
    task = CausalLanguage()
    assert float(task.loss(capped, {}, batch, {}).objective) == pytest.approx(expected, rel=1e-5)
    assert float(task.evaluate(capped, {}, batch)["loss"].sum) == pytest.approx(expected, rel=1e-5)


def test_strict_accuracy_is_of_rows_that_are_one_answer(model):
    batch = BATCH | {"whole_answer": np.ones(3, np.float32)}
    strict = CausalLanguage().evaluate(model, {}, jax.tree.map(jnp.array, batch))["acc_strict"]
    assert strict.value() == pytest.approx(1 / 2)
    assert float(strict.weight) == 2, "the row that fills the batch is no example"
    batch["whole_answer"][0] = 0  # a row of another data set
    strict = CausalLanguage().evaluate(model, {}, jax.tree.map(jnp.array, batch))["acc_strict"]
    assert (strict.value(), float(strict.weight)) == (0, 1)


def test_training_loss_is_the_mean_over_weights_plus_z_loss(model):
    task = CausalLanguage(z_loss=0.1)
    batch = {k: jnp.array(BATCH[k]) for k in ("tokens", "targets", "weights")}
    loss = task.loss(model, {}, batch, {})
    logp, weights = log_softmax(LOGITS), BATCH["weights"]
    nll = -np.take_along_axis(logp, BATCH["targets"][..., None], -1)[..., 0]
    normaliser = np.log(np.exp(LOGITS.astype(np.float64)).sum(-1))
    expected = (weights * (nll + 0.1 * normaliser**2)).sum()
    assert float(loss.objective) == pytest.approx(expected, rel=1e-6)
    assert loss.metrics["loss"].value() == pytest.approx(expected / weights.sum(), rel=1e-6)
    assert loss.metrics["log_pplx"].value() == pytest.approx(
        (weights * nll).sum() / weights.sum(), rel=1e-6
    )
    assert loss.metrics["z_loss"].value() == pytest.approx(
        0.1 * (weights * normaliser**2).sum() / weights.sum(), rel=1e-6
    )
    assert float(task.weight(batch)) == weights.sum()


def test_a_negative_weight_of_the_z_loss_is_refused():
    with pytest.raises(ValueError, match="Z_LOSS_WEIGHT=-1.0 must be at least 0"):
        CausalLanguage(z_loss=-1.0)
