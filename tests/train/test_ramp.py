"""A batch that grows: its sizes, the order of the rows, and a run that goes on in the middle of the ramp."""

import json
import re

import fiddle as fdl
import numpy as np
import pytest
import runs

from configs.gpt import Synthetic126M
from paxlike.data.loader import Loader
from paxlike.data.synthetic import SyntheticTokens
from paxlike.train.ramp import Feed, Ramp


def test_sizes_grow_at_equal_distances():
    ramp = Ramp(start=8, increment=8, rows=96)
    sizes = {0: 8, 31: 8, 32: 16, 63: 16, 64: 24, 95: 24, 96: 32, 10_000: 32}
    assert {seen: ramp.size(seen, whole=32) for seen in sizes} == sizes
    assert Ramp(8, 8, 0).size(0, 32) == 32


def test_rows_come_in_the_order_of_a_run_without_ramp():
    data = Loader(SyntheticTokens(vocab_size=100, seed=3), seq_len=4, packing="documents")
    feed = Feed(data, whole=4, ramp=Ramp(1, 1, 8), first_row=0, sharding=None)
    batches = [next(feed)["tokens"] for _ in range(7)]
    feed.close()
    # Three increments in 8 rows: after 2.7, 5.3 and 8.
    assert [len(batch) for batch in batches] == [1, 1, 1, 2, 2, 3, 4]
    assert feed.rows == 14 and feed.size == 4
    with data.batches(global_batch=14) as plain:
        np.testing.assert_array_equal(np.concatenate(batches), next(plain)["tokens"])
    later = Feed(data, whole=4, ramp=Ramp(1, 1, 8), first_row=5, sharding=None)
    np.testing.assert_array_equal(next(later)["tokens"], batches[4])
    later.close()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Ramp(0, 4, 8),
            "BATCH_RAMP=[0, 4, 8]: first batch and increment must be at least 1",
        ),
        (lambda: Ramp(4, 4, 8).check(14, 1), "14 - 4 must be a multiple of 4"),
        (
            lambda: Ramp(16, 4, 8).check(8, 1),
            "BATCH_RAMP=[16, 4, 8] never reaches the batch of 8 rows",
        ),
        (
            lambda: Ramp(4, 2, 8).check(8, 4),
            "the first batch and the increment must be multiples of 4, the batch shards times NUM_MICROBATCHES",
        ),
        (
            lambda: Synthetic126M(BATCH_RAMP=(4, 4)).experiment(),
            "BATCH_RAMP=[4, 4] must be [first batch, increment, rows]",
        ),
        (
            lambda: fdl.build(
                Synthetic126M(
                    BATCH_RAMP=(2, 2, 8), ICI_MESH_SHAPE=(4, 1, 1), DCN_MESH_SHAPE=(1, 1, 1)
                ).experiment()
            ).check(),
            "must be multiples of 4",
        ),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


SMALL = {**runs.TINY, "NUM_LAYERS": 1, "PERCORE_BATCH_SIZE": 2, "EVAL_INTERVAL_STEPS": 100}


def train(directory, steps):
    knobs = {
        **{name: value for name, value in SMALL.items() if not name.startswith("LR_")},
        "MAX_STEPS": steps,
        "LR_SCHEDULE": "linear_rampup_constant",
        "LR_CONST_WARMUP": 2,
        "ICI_MESH_SHAPE": (4, 1, 1),
        "DCN_MESH_SHAPE": (1, 1, 1),
        "BATCH_RAMP": (4, 4, 12),
        "SYNTHETIC_RANDOM": True,
    }
    assert fdl.build(Synthetic126M(**knobs).experiment()).train(str(directory)) == 0


def test_a_run_goes_on_in_the_middle_of_the_ramp(tmp_path):
    train(tmp_path / "straight", 5)
    train(tmp_path / "parts", 2)
    train(tmp_path / "parts", 5)
    states = [runs.final_state(tmp_path / name, step=5) for name in ("straight", "parts")]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 20
    for name, value in states[0].items():
        np.testing.assert_array_equal(value, states[1][name], err_msg=name)
    for name in ("straight", "parts"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        events = [json.loads(line) for line in lines]
        grown = [(e["step"], e["rows"]) for e in events if e.get("event") == "batch_size"]
        assert grown == [(4, 8)]  # 3 x 4 rows, then 8
