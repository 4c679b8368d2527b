"""Metrics merge as sums and weights, inside and outside jit."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxlike.log.metric import Metric


def test_merging_is_the_weighted_mean():
    values, weights = np.array([2.0, 8.0, 5.0]), np.array([3.0, 1.0, 0.0])
    total = sum((Metric.of(v, w) for v, w in zip(values, weights, strict=True)), Metric(0.0, 0.0))
    assert total.value() == np.average(values, weights=weights)


def test_no_weight_has_no_value():
    assert math.isnan(Metric(0.0, 0.0).value())


def test_crosses_jit_scan_and_grad_aux_as_a_pytree():
    def add(total, x):
        return total + Metric.of(x, 2.0), None

    total, _ = jax.jit(lambda xs: jax.lax.scan(add, Metric(0.0, 0.0), xs))(jnp.array([1.0, 2.0]))
    assert isinstance(total, Metric)
    assert total.value() == 1.5
    assert len(jax.tree.leaves(total)) == 2


def test_adding_something_else_is_an_error():
    with pytest.raises(TypeError):
        Metric(1.0, 1.0) + 1.0
