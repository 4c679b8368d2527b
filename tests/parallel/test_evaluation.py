"""What evaluation says on one device, on every mesh: held-out loss, LAMBADA's and BoolQ's accuracy, and logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from parallel import meshes, nets

from paxlike import parallel
from paxlike.tasks.language import CausalLanguage
from paxlike.train.state import abstract_variables

MESHES = [
    {"data": 4},
    {"fsdp": 4},
    {"tensor": 4},
    {"context": 4},
    {"data": 2, "context": 2},
    {"fsdp": 2, "tensor": 2},
    {"pipeline": 2, "fsdp": 2},
]


def net():
    return nets.gpt(layers=2, remat="SAVE_EVERYTHING")


@pytest.fixture(scope="module")
def params():
    return meshes.init(net())


@pytest.fixture(scope="module")
def data(params):
    """Four rows: the first is answered rightly, two are whole answers, one only fills the batch."""
    rows = nets.plain(4)
    logits = jax.jit(net().apply)({"params": params}, rows["tokens"]).logits()
    rows["targets"][0] = np.argmax(logits[0], axis=-1)
    alternatives = np.full((4, tiny.LENGTH), -1, np.int32)
    alternatives[0, [5, 9]] = alternatives[1, 30] = 3  # the first in the row counts
    marks = {
        "alternatives": alternatives,
        "whole_answer": np.float32([1, 0, 1, 0]),
        "example_weight": np.float32([1, 1, 1, 0]),
    }
    return rows | marks


def evaluate(params, data, sizes):
    """Metrics and logits, computed where weights and rows lie on the mesh."""
    mesh = meshes.build(sizes)
    with parallel.activate(mesh):
        place = jax.tree.map(lambda leaf: leaf.sharding, abstract_variables(net(), mesh)["params"])
        rows = {
            name: parallel.named_sharding(mesh, ("batch", "length")[: x.ndim])
            for name, x in data.items()
        }

        def both(params, data):
            variables = {"params": params}
            metrics = CausalLanguage().evaluate(net(), variables, data)
            return metrics, net().apply(variables, data["tokens"]).logits()

        compute = jax.jit(both, in_shardings=(place, rows), compiler_options=meshes.IN_HASTE)
        metrics, logits = compute(jax.device_put(params, place), jax.device_put(data, rows))
        values = {name: float(metric.value()) for name, metric in metrics.items()}
        return values, np.asarray(jnp.asarray(logits))


@pytest.fixture(scope="module")
def alone(params, data):
    return evaluate(params, data, {"data": 1})


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_numbers_are_those_of_one_device(params, data, alone, sizes):
    (found, logits), (expected, expected_logits) = evaluate(params, data, sizes), alone
    assert found.keys() == expected.keys() >= {"boolq_acc", "acc_strict", "accuracy", "loss"}
    assert expected["acc_strict"] == 0.5  # of the two whole answers the first
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    np.testing.assert_allclose(logits, expected_logits, rtol=1e-4, atol=1e-5)
