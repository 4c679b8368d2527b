import numpy as np
import pytest
from data.data_helpers import TEXTS, naive_rows, write_json_lines

from paxlike.data.packing import PACKINGS, StreamRows
from paxlike.data.sources import JsonLines
from paxlike.data.token_cache import open_or_build
from paxlike.data.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packing")
    source = JsonLines(write_json_lines(folder / "a.jsonl", TEXTS * 3), part_bytes=90)
    stream = open_or_build(source, TOKENIZER, str(folder))
    assert len(stream.shards) > 3  # windows cross shards
    return stream


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("seq_len", [1, 4, 13, 64, 1000])
@pytest.mark.parametrize("bos_id, pad_id", [(0, 0), (5, 9)])
def test_rows_equal_the_naive_ones(stream, packing, seq_len, bos_id, pad_id):
    rows = StreamRows(stream, seq_len, packing, bos_id, pad_id)
    naive = naive_rows(TEXTS * 3, TOKENIZER, seq_len, packing, bos_id, pad_id)
    assert len(rows) == len(naive["tokens"])
    found = rows.gather(np.arange(len(rows)))
    assert found.keys() == naive.keys()
    for key, value in naive.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)
        assert found[key].dtype == (np.float32 if key == "weights" else np.int32)
    # Any order, and any one row alone, gives the same rows.
    order = np.random.default_rng(0).permutation(len(rows))
    for key, value in rows.gather(order).items():
        np.testing.assert_array_equal(value, naive[key][order])
    for key, value in rows.gather(np.array([len(rows) // 2])).items():
        np.testing.assert_array_equal(value[0], naive[key][len(rows) // 2])


def test_by_hand(stream):
    """Documents "alpha beta", "x", ...: the third window of 6 begins inside a document."""
    rows = StreamRows(stream, 6, "packed", 0, 0).gather(np.array([1]))
    a, e, t, x, g = (ord(c) + 2 for c in "aetxg")
    assert rows["targets"][0].tolist() == [ord("b") + 2, e, t, a, 1, x]
    assert rows["tokens"][0].tolist() == [ord(" ") + 2, ord("b") + 2, e, t, a, 0]
    assert rows["segments"][0].tolist() == [1, 1, 1, 1, 1, 2]
    assert rows["positions"][0].tolist() == [0, 1, 2, 3, 4, 0]
    following = StreamRows(stream, 6, "packed", 0, 0).gather(np.array([2]))
    assert following["tokens"][0, :3].tolist() == [x, 0, g]
    assert following["segments"][0].tolist() == [1, 2, 2, 2, 2, 2]


def test_every_token_is_a_target_once(stream):
    rows = StreamRows(stream, 7, "packed", 0, 0)
    batch = rows.gather(np.arange(len(rows)))
    scored = batch["targets"][batch["weights"] > 0]
    np.testing.assert_array_equal(scored, stream.tokens(0, stream.num_tokens))
    assert ((batch["segments"] == 0) == (batch["weights"] == 0)).all()
