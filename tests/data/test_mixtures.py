import numpy as np
import pytest

from paxlike.data.mixtures import MixedRows, Mixture, component_seed, training_order
from paxlike.data.synthetic import SyntheticTokens


def rows_of(order, start, stop):
    return order(np.arange(start, stop))


@pytest.mark.parametrize("n", [7, 1000, 5000])
def test_every_epoch_is_another_permutation(n):
    order = training_order([n], seeds=[3], shuffle=True)
    epochs = [rows_of(order, e * n, (e + 1) * n)[:, 1] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(n))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = training_order([n], seeds=[4], shuffle=True)
    # Neighbouring seeds share no order: Grain alone would give seed 4 the second epoch of seed 3.
    assert not (rows_of(other, 0, n)[:, 1] == epochs[1]).all()


def test_stored_order_repeats():
    stored = training_order([10], seeds=[3], shuffle=False)
    assert rows_of(stored, 8, 22)[:, 1].tolist() == [8, 9, *range(10), 0, 1]


def test_shares_are_exact_from_the_beginning():
    weights = [5.0, 3.0, 2.0]
    order = training_order([40, 7, 1000], weights=weights, seeds=[0, 1, 2], shuffle=True)
    parts = rows_of(order, 0, 5000)[:, 0]
    counts = np.stack([np.cumsum(parts == k) for k in range(3)], axis=1)
    wanted = np.arange(1, 5001)[:, None] * np.array(weights) / sum(weights)
    assert np.abs(counts - wanted).max() <= 2
    # Each data set goes through all its rows before it repeats one.
    for k, length in enumerate([40, 7, 1000]):
        mine = rows_of(order, 0, 5000)
        mine = mine[mine[:, 0] == k, 1]
        for epoch in range(len(mine) // length):
            assert sorted(mine[epoch * length : (epoch + 1) * length]) == list(range(length))


def test_seeds_are_each_source_s_own():
    lengths, weights = [500, 500], [1.0, 1.0]
    first, second = (
        rows_of(training_order(lengths, weights=weights, seeds=s, shuffle=True), 0, 400)
        for s in ([1, 2], [1, 3])
    )
    np.testing.assert_array_equal(first[:, 0], second[:, 0])
    a, b = (rows[rows[:, 0] == 0, 1] for rows in (first, second))
    np.testing.assert_array_equal(a, b)
    a, b = (rows[rows[:, 0] == 1, 1] for rows in (first, second))
    assert (a != b).any()
    assert component_seed(7, 0) == 7
    assert len({component_seed(7, k) for k in range(5)}) == 5


def test_far_away_rows_need_no_walk():
    order = training_order([10**9, 10**8], weights=[1, 2], seeds=[0, 1], shuffle=True)
    far = order(np.array([10**15, 10**15 + 1]))
    assert far.shape == (2, 2)
    assert set(far[:, 0]) <= {0, 1}
    assert (far[:, 1] < 10**9).all()


def test_gather_keeps_the_order_asked_for():
    sources = [SyntheticTokens(50, seed) for seed in (1, 2)]
    parts = [s.rows(tokenizer=None, seq_len=5, packing="packed") for s in sources]
    mixed = MixedRows(parts)
    where = np.array([[1, 3], [0, 4], [1, 0], [0, 4]])
    found = mixed.gather(where)
    for row, (part, index) in enumerate(where):
        for key, value in parts[part].gather(np.array([index])).items():
            np.testing.assert_array_equal(found[key][row], value[0])
    n = len(parts[0])
    assert mixed.in_sequence(np.array([0, n - 1, n, n + 5])).tolist() == [
        [0, 0], [0, n - 1], [1, 0], [1, 5],
    ]  # fmt: skip


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sources": [1, 2], "weights": [1]}, "2 sources, 1 weights"),
        ({"sources": [], "weights": []}, "0 sources"),
        ({"sources": [1, 2], "weights": [1, 1], "seeds": [1]}, r"seeds=\[1\]"),
        ({"sources": [1, 2], "weights": [1, 0]}, r"weights must be above 0: \(1, 0\); drop"),
        ({"sources": [Mixture([1], [1])], "weights": [1]}, "list all sources"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Mixture(**arguments)
