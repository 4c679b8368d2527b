"""The notation of rearrangements, against plain numpy."""

import itertools

import numpy as np
import pytest

from paxlike.weights.rearrange import rearrangement

CASES = {
    "(h k) d -> d h k": ((4, 2, 3), lambda x: x.reshape(2, 3, 4).transpose(2, 0, 1)),
    "d (h k) -> h k d": ((2, 3, 4), lambda x: x.reshape(4, 2, 3).transpose(1, 2, 0)),
    "d (c h k) -> d c h k": ((4, 3, 2, 3), lambda x: x.reshape(4, 3, 2, 3)),
    "f d -> d f": ((4, 5), lambda x: x.T),
    "d -> d": ((4,), lambda x: x),
}


@pytest.mark.parametrize("pattern", CASES)
def test_every_box_is_a_part_of_the_whole_and_goes_back(pattern):
    shape, naive = CASES[pattern]
    how = rearrangement(pattern)
    foreign = np.arange(np.prod(shape)).reshape(how.foreign_shape(shape))
    whole = naive(foreign)
    assert whole.shape == shape
    np.testing.assert_array_equal(how.put(whole), foreign)
    ends = [[slice(a, b) for a in range(n) for b in range(a + 1, n + 1)] for n in shape]
    for index in itertools.product(*ends):
        part = how.take(lambda box: foreign[box].copy(), shape, index)
        np.testing.assert_array_equal(part, whole[index])


def test_only_the_rows_of_a_head_are_read():
    """A cut of heads becomes a cut of rows; one inside heads cannot, and reads them whole."""
    how = rearrangement("(h k) d -> d h k")
    foreign, asked = np.arange(8 * 4).reshape(8, 4), []

    def read(box):
        asked.append(box)
        return foreign[box]

    how.take(read, (4, 4, 2), (slice(0, 2), slice(1, 3), slice(0, 2)))
    how.take(read, (4, 4, 2), (slice(0, 4), slice(0, 4), slice(1, 2)))
    assert asked == [(slice(2, 6), slice(0, 2)), (slice(0, 8), slice(0, 4))]


def test_rotated_heads():
    """Member p of pair i: at p * 3 + i where the halves follow each other, at 2 i + p where pairs do."""
    halves_to_pairs = rearrangement("(h r) d -> d h r", ours_interleaved=True)
    foreign = np.arange(12).reshape(12, 1)  # two heads of size 6
    found = halves_to_pairs.take(lambda box: foreign[box], (1, 2, 6), _all((1, 2, 6)))
    assert found[0].tolist() == [[0, 3, 1, 4, 2, 5], [6, 9, 7, 10, 8, 11]]
    np.testing.assert_array_equal(halves_to_pairs.put(found), foreign)
    pairs_to_halves = rearrangement("(h r) d -> d h r", theirs_interleaved=True)
    back = pairs_to_halves.take(lambda box: found.reshape(12, 1)[box], (1, 2, 6), _all((1, 2, 6)))
    np.testing.assert_array_equal(back.reshape(12, 1), foreign)
    for cut in itertools.product([slice(0, 1)], [slice(1, 2)], [slice(2, 5)]):
        part = halves_to_pairs.take(lambda box: foreign[box], (1, 2, 6), cut)
        np.testing.assert_array_equal(part, found[cut])
    same = rearrangement("(h r) d -> d h r", theirs_interleaved=True, ours_interleaved=True)
    assert same == rearrangement("(h r) d -> d h r")


def test_a_fixed_index_is_a_place():
    how = rearrangement("(h k) d -> d 1 h k")
    assert how.at(lead=(5,)) == (5, None, 1, None, None)
    assert how.foreign_shape((4, 2, 3)) == (6, 4)


def test_an_odd_head_has_no_pairs():
    how = rearrangement("(h r) d -> d h r", ours_interleaved=True)
    with pytest.raises(
        ValueError, match="a head of size 5 has no pairs to rotate: it must be even"
    ):
        how.foreign_shape((4, 2, 5))


def _all(shape):
    return tuple(slice(0, size) for size in shape)
