"""Samplers against naive numpy, and against the distributions they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxlike.decode import SamplingOptions, sample
from paxlike.decode.sampler import keep_nucleus, keep_top_k, penalise


@pytest.fixture
def logits():
    """Rows of several scales, so that a nucleus has from one to nearly all tokens."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=(6, 200)) * np.array([0.01, 0.5, 1, 2, 5, 30])[:, None]).astype(
        np.float32
    )


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def naive_nucleus(row, p):
    probabilities = np.exp(row.astype(np.float64) - row.max())
    probabilities /= probabilities.sum()
    kept, total = set(), 0.0
    for i in np.argsort(-row):
        kept.add(int(i))
        total += probabilities[i]
        if total >= p:
            break
    return kept


def kept(masked):
    return [set(np.flatnonzero(np.isfinite(row)).tolist()) for row in np.asarray(masked)]


@pytest.mark.parametrize("k", [1, 2, 17, 199, 200])
def test_top_k_keeps_the_k_largest(logits, k):
    masked = keep_top_k(jnp.asarray(logits), k)
    assert kept(masked) == [set(np.argsort(-row)[:k].tolist()) for row in logits]
    finite = np.isfinite(masked)
    np.testing.assert_array_equal(np.asarray(masked)[finite], logits[finite])


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.99])
def test_nucleus_is_the_smallest_set_that_reaches_p(logits, p):
    assert kept(keep_nucleus(jnp.asarray(logits), p)) == [naive_nucleus(row, p) for row in logits]


def test_thresholds_keep_all_equal_logits_and_pass_over_minus_infinity():
    row = jnp.array([[2.0, 2.0, 1.0, -jnp.inf, -0.0, 0.0]])
    assert kept(keep_top_k(row, 1)) == [{0, 1}]
    assert kept(keep_top_k(row, 6)) == [{0, 1, 2, 4, 5}]
    assert kept(keep_nucleus(row, 0.3)) == [{0, 1}]


def test_repetition_penalty_lowers_seen_tokens_only():
    logits = jnp.array([[3.0, -3.0, 3.0, -3.0]])
    seen = jnp.array([[True, True, False, False]])
    np.testing.assert_allclose(penalise(logits, seen, 1.5), [[2.0, -4.5, 3.0, -3.0]], rtol=1e-6)


def test_penalty_changes_the_greedy_choice():
    options = SamplingOptions(temperature=0, repetition_penalty=2.0)
    logits = jnp.array([[3.0, 2.0], [3.0, 1.0]])
    seen = jnp.array([[True, False], [False, False]])
    assert sample(logits, keys(2), options, seen).tolist() == [1, 0]


def test_greedy_is_argmax_whatever_the_key(logits):
    options = SamplingOptions(temperature=0, top_k=3, top_p=0.5)
    for seed in (0, 1):
        ids = jax.jit(lambda x, k: sample(x, k, options))(logits, keys(len(logits), seed))
        np.testing.assert_array_equal(ids, logits.argmax(axis=-1))
    assert sample(jnp.array([[-7.0, -2.0, -2.0]]), keys(1), options).tolist() == [1]  # the first


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(),
        SamplingOptions(temperature=0.5),
        SamplingOptions(temperature=2.0, top_k=3),
        SamplingOptions(top_p=0.75),
        SamplingOptions(temperature=1.5, top_k=4, top_p=0.8),
    ],
    ids=lambda o: f"t{o.temperature}-k{o.top_k}-p{o.top_p}",
)
def test_draws_follow_the_promised_distribution(options):
    row = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -2.0], np.float32)
    scaled = row.astype(np.float64) / options.temperature
    allowed = set(np.argsort(-scaled)[: options.top_k or len(row)].tolist())
    scaled = np.where([i in allowed for i in range(len(row))], scaled, -np.inf)
    allowed = naive_nucleus(scaled, options.top_p) if options.top_p < 1 else allowed
    expected = np.exp(scaled) * [i in allowed for i in range(len(row))]
    expected /= expected.sum()
    n = 20_000
    ids = jax.jit(lambda x, k: sample(x, k, options))(np.tile(row, (n, 1)), keys(n))
    counts = np.bincount(np.asarray(ids), minlength=len(row))
    assert not counts[expected == 0].any()
    # Five standard deviations of a binomial count.
    assert (
        np.abs(counts - n * expected) <= 5 * np.sqrt(n * expected * (1 - expected)) + 1e-9
    ).all()


def test_a_row_is_drawn_by_its_own_key(logits):
    options = SamplingOptions(top_p=0.9)
    every = keys(len(logits))
    together = sample(jnp.asarray(logits), every, options)
    alone = [
        int(sample(jnp.asarray(logits[i : i + 1]), every[i : i + 1], options)[0])
        for i in range(len(logits))
    ]
    assert together.tolist() == alone


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"stop_strings": "abc"}, "stop_strings='abc' is one string"),
        ({"stop_strings": ("a", "")}, "a stop string is empty"),
        ({"seed": -1}, "seed=-1"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_options_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        SamplingOptions(**wrong)
    assert "\n" not in str(error.value)


def test_penalty_without_the_seen_tokens_is_refused():
    with pytest.raises(ValueError, match="needs `seen`"):
        sample(jnp.zeros((1, 4)), keys(1), SamplingOptions(repetition_penalty=1.1))
