"""Bits of chosen tokens are those that the whole batch would have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxlike.ops import random


@pytest.mark.parametrize("shape", [(6, 8, 5), (3, 4, 1000)])
def test_equals_a_part_of_what_jax_draws(shape):
    _, s, width = shape
    key = jax.random.key(3)
    rows, places = jnp.array([2, 0]), jnp.array([3, 1, 0, 2])
    expected = jax.random.bernoulli(key, 0.7, shape)[rows][:, places]
    got = random.bernoulli_at(key, 0.7, rows, places, length=s, width=width)
    np.testing.assert_array_equal(got, expected)
    assert 0.5 < got.mean() < 0.9


def test_numbers_beyond_32_bits():
    token = np.array([[5, 65536, 3_000_000_000]], np.uint32)
    high, low = random._number(jnp.asarray(token), 12345)
    number = (np.asarray(high, np.uint64) << 32) + np.asarray(low, np.uint64)
    wanted = token.astype(np.uint64)[..., None] * 12345 + np.arange(12345, dtype=np.uint64)
    np.testing.assert_array_equal(number, wanted)


def test_other_generators_are_refused():
    key = jax.random.key(0, impl="rbg")
    with pytest.raises(ValueError, match="needs keys of threefry2x32 .* these are rbg and 4"):
        random.bernoulli_at(key, 0.5, jnp.arange(2), jnp.arange(2), length=2, width=4)
