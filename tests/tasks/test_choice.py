"""The two-way choice against logits written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tasks.test_language import Table

from paxlike.models.decoder import Output
from paxlike.tasks.choice import two_way_accuracy
from paxlike.tasks.language import CausalLanguage

# Vocabulary of 4: the answers are 1 and 2, and 3 has the largest logit everywhere.
LOGITS = np.array(
    [
        [[0, 9, 0, 10], [0, 2, 1, 10]],  # the target 1 beats 2 at position 1: right
        [[0, 0, 5, 10], [0, 4, 0, 10]],  # the target 1 does not beat 2 at position 0: wrong
        [[0, 0, 0, 10], [0, 3, 3, 10]],  # equal: wrong, the comparison is strict
        [[0, 0, 0, 10], [0, 1, 4, 10]],  # the target 2 beats 1: right
        [[0, 9, 0, 10], [0, 9, 0, 10]],  # no alternative: not asked
        [[0, 9, 0, 10], [0, 9, 0, 10]],  # only fills the batch
    ],
    np.float32,
)
BATCH = {
    "tokens": np.zeros((6, 2), np.int32),
    "targets": np.array([[2, 1], [1, 2], [0, 2], [0, 2], [1, 1], [1, 1]], np.int32),
    "alternatives": np.array([[-1, 2], [2, -1], [-1, 1], [-1, 1], [-1, -1], [2, 2]], np.int32),
    "weights": np.array([[0, 1], [1, 0], [0, 1], [0, 1], [0, 1], [0, 1]], np.float32),
    "whole_answer": np.ones(6, np.float32),
    "example_weight": np.array([1, 1, 1, 1, 1, 0], np.float32),
}


def test_by_hand():
    model = Table(tuple(tuple(map(tuple, row)) for row in LOGITS.tolist()))
    metrics = CausalLanguage().evaluate(model, {}, jax.tree.map(jnp.array, BATCH))
    assert (float(metrics["boolq_acc"].sum), float(metrics["boolq_acc"].weight)) == (2, 4)
    assert metrics["acc_strict"].value() == 0, "another token had the largest logit each time"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equals_the_logits_of_the_model_on_a_mesh(dtype):
    b, s, d, v = 8, 6, 16, 32
    rng = np.random.default_rng(0)
    hidden = jnp.array(rng.normal(size=(b, s, d)), dtype)
    table = jnp.array(rng.normal(size=(v, d)), jnp.float32)
    targets, other = rng.integers(0, v, (2, b, s)).astype(np.int32)
    at = rng.integers(0, s, b)
    alternatives = np.where(np.arange(s) == at[:, None], other, -1).astype(np.int32)
    logits = np.array(Output(hidden, table).logits())
    rows = np.arange(b)
    right = logits[rows, at, targets[rows, at]] > logits[rows, at, other[rows, at]]
    weight = np.array([1, 1, 1, 0, 1, 1, 1, 1], np.float32)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    place = lambda x, *spec: jax.device_put(
        x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    )
    metric = jax.jit(two_way_accuracy)(
        place(hidden, "data"),
        place(table, "tensor"),
        place(targets, "data"),
        place(alternatives, "data"),
        place(weight, "data"),
    )
    assert float(metric.weight) == 7
    assert float(metric.sum) == (right * weight).sum()
    assert 0 < float(metric.sum) < 7
