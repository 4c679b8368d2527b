"""Rotary positions against complex multiplication in numpy, and their scaling rules against their definitions."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from paxlike.ops.rope import Rope, RopeScaling

B, S, H, K = 2, 6, 3, 8
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((B, S, H, K)), jnp.float32)
POSITIONS = jnp.array([[0, 1, 2, 0, 1, 2], [5, 6, 7, 8, 900, 901]], jnp.int32)


def naive(x, positions, *, theta=10000.0):
    """Pairs (2i, 2i + 1) as complex numbers, turned by theta^(-2i/k) radians per position."""
    x, positions = np.asarray(x, np.float64), np.asarray(positions)
    frequencies = theta ** (-np.arange(0, K, 2) / K)
    turn = np.exp(1j * positions[:, :, None, None] * frequencies)
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
    return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_interleaved_equals_complex_multiplication(theta):
    turned = Rope(theta, "interleaved")(X, POSITIONS)
    np.testing.assert_allclose(turned, naive(X, POSITIONS, theta=theta), atol=3e-4)


def test_half_is_interleaved_with_features_in_another_order():
    order = np.concatenate([np.arange(0, K, 2), np.arange(1, K, 2)])
    turned = Rope(layout="half")(X[..., order], POSITIONS)
    np.testing.assert_allclose(turned, naive(X, POSITIONS)[..., order], atol=3e-4)


def test_positions_count_from_zero_where_there_are_none():
    counted = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
    np.testing.assert_array_equal(Rope()(X, None), Rope()(X, counted))


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_scores_depend_on_distances_only(layout):
    rope, q, k = Rope(layout=layout), X[:1], X[1:]
    places = jnp.arange(S, dtype=jnp.int32)[None]
    score = lambda shift: np.einsum(
        "bshk,bthk->bhst", rope(q, places + shift), rope(k, places + shift)
    )
    np.testing.assert_allclose(score(0), score(40), atol=1e-4)
    assert np.abs(np.einsum("bshk,bthk->bhst", q, k) - score(0)).max() > 0.1


def test_linear_scaling_divides_positions():
    scaled = Rope(scaling=RopeScaling("linear", 4.0))
    np.testing.assert_allclose(scaled(X, 4 * POSITIONS), Rope()(X, POSITIONS), atol=1e-3)


def test_llama3_scaling_leaves_short_wavelengths_and_divides_long_ones():
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, original_length=8192)
    plain, scaled = Rope(5e5).frequencies(128), Rope(5e5, scaling=scaling).frequencies(128)
    wavelength = 2 * math.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192
    assert short.sum() > 20 and long.sum() > 20 and (~short & ~long).sum() > 3
    np.testing.assert_array_equal(scaled[short], plain[short])
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-6)
    between = scaled[~short & ~long] / plain[~short & ~long]
    assert np.all(between < 1) and np.all(between > 1 / 8) and np.all(np.diff(between) < 0)


def test_yarn_leaves_fast_pairs_and_divides_slow_ones():
    scaling = RopeScaling("yarn", 4.0, original_length=4096)
    plain, scaled = Rope(1e4).frequencies(128), Rope(1e4, scaling=scaling).frequencies(128)
    turns = 4096 * plain / (2 * math.pi)
    fast, slow = turns > 32.01 * 1e4 ** (1 / 64), turns < 0.99 * 1e4 ** (-1 / 64)  # one pair away
    assert fast.sum() > 15 and slow.sum() > 10 and (~fast & ~slow).sum() > 20
    np.testing.assert_array_equal(scaled[fast], plain[fast])
    np.testing.assert_allclose(scaled[slow], plain[slow] / 4, rtol=1e-6)
    between = scaled[~fast & ~slow] / plain[~fast & ~slow]
    assert np.all(np.diff(between) <= 0) and between[0] > 0.9 and between[-1] < 0.3


def test_yarn_makes_what_it_turns_larger():
    size = lambda x: np.linalg.norm(x)
    grown = lambda scaling: size(Rope(scaling=scaling)(X, POSITIONS)) / size(X)
    assert grown(RopeScaling("yarn", 40.0)) == pytest.approx(0.1 * math.log(40.0) + 1, rel=1e-5)
    one_eighth = RopeScaling("yarn", 40.0, mscale=0.25, mscale_all_dim=0.125)
    weight = lambda w: 0.1 * w * math.log(40.0) + 1
    assert grown(one_eighth) == pytest.approx(weight(0.25) / weight(0.125), rel=1e-5)
    assert one_eighth.score_factor == pytest.approx(weight(0.125) ** 2)
    assert grown(RopeScaling("yarn", 0.5)) == pytest.approx(1.0, rel=1e-5)  # rows got shorter


def test_result_has_the_dtype_of_the_input():
    assert Rope()(X.astype("bfloat16"), POSITIONS).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rope(layout="whole"), "ROPE_LAYOUT='whole' is none of half, interleaved"),
        (lambda: Rope(theta=0.0), "ROPE_THETA=0.0 must be above 0"),
        (lambda: Rope().frequencies(7), "DIMS_PER_HEAD=7 must be even"),
        (lambda: RopeScaling("ntk", 2.0), "ROPE_SCALING='ntk' is none of linear, llama3, yarn"),
        (
            lambda: RopeScaling("yarn", 2.0, beta_fast=1.0),
            "ROPE_BETA_SLOW=1.0 must be above 0 and below ROPE_BETA_FAST=1.0",
        ),
        (
            lambda: RopeScaling("yarn", 2.0, mscale=1.0),
            "ROPE_MSCALE=1.0 and ROPE_MSCALE_ALL_DIM=None: set both or neither",
        ),
        (
            lambda: Rope(1.0, scaling=RopeScaling("yarn", 2.0)),
            "ROPE_THETA=1.0 must be above 1 with ROPE_SCALING='yarn'",
        ),
        (lambda: RopeScaling("linear", 0.0), "ROPE_SCALING_FACTOR=0.0 must be above 0"),
        (
            lambda: RopeScaling("llama3", 8.0, 4.0, 4.0),
            "ROPE_LOW_FREQ_FACTOR=4.0 must be below ROPE_HIGH_FREQ_FACTOR=4.0",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
