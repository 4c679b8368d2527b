"""The picture of experts and the warning of a collapsed router."""

import struct
import zlib

import numpy as np
import pytest

from paxlike.log.experts import TABLE, ExpertWatch, WatchOptions
from paxlike.log.heat_map import MAX_COLUMNS, heat_map
from paxlike.log.history import read_metrics
from paxlike.log.metric import Metric
from paxlike.log.run_log import RunLog


def pixels(png):
    """(height, width, 3) of a PNG whose lines have no filter."""
    width, height = struct.unpack(">II", png[16:24])
    start = png.index(b"IDAT") + 4
    (length,) = struct.unpack(">I", png[start - 8 : start - 4])
    lines = np.frombuffer(zlib.decompress(png[start : start + length]), np.uint8)
    return lines.reshape(height, 1 + 3 * width)[:, 1:].reshape(height, width, 3)


def test_a_picture_has_a_column_for_each_summary_and_a_row_for_each_expert():
    first, second = np.array([[0.0, 1.0], [0.5, 0.5]]), np.array([[1.0, 0.0], [0.5, 0.5]])
    image = pixels(heat_map([first, second], largest=1.0))
    assert image.shape == (2 * 2 * 3 + 1, 2 * 3, 3)  # three pixels each, and a line between layers
    dark, bright = image[0, 0].tolist(), image[3, 0].tolist()
    assert (dark, bright) == ([68, 1, 84], [253, 231, 37])
    assert image[0, 3].tolist() == bright and image[3, 3].tolist() == dark
    assert pixels(heat_map([first] * 1000, largest=1.0)).shape[1] == MAX_COLUMNS * 3


def test_an_expert_that_takes_nearly_all_for_long_is_told_once():
    watch = ExpertWatch(WatchOptions(share=0.75, summaries=3))
    even, fallen = np.full((2, 4), 0.25), np.array([[0.25] * 4, [0.0, 0.5, 0.5, 0.0]])
    two = {"moe/choices": 2.0}  # each token has two experts: half of the choices is all tokens
    assert watch.add(even, two) == []
    found = [watch.add(fallen, two) for _ in range(5)]
    assert [len(each) for each in found] == [0, 0, 2, 0, 0]
    assert "layer 1 of experts sends 100% of the tokens to expert 1" in found[2][0]
    watch.add(even, two)
    assert [len(watch.add(fallen, two)) for _ in range(3)] == [0, 0, 2]  # it fell again
    assert [ExpertWatch(WatchOptions(share=0.0)).add(fallen, two) for _ in range(9)] == [[]] * 9


@pytest.mark.parametrize("options", [{"share": 1.5}, {"summaries": 0}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match="ROUTER_COLLAPSE"):
        WatchOptions(**options)


def test_the_log_has_table_picture_and_warning(tmp_path):
    table = np.array([[0.9, 0.1]])
    options = WatchOptions(share=0.5, summaries=2)
    with RunLog(tmp_path, num_steps=4, summary_interval_steps=2, experts=options) as log:
        for step in range(1, 5):
            log.train(step, {"loss": Metric(2.0, 1.0), TABLE: Metric(table * 3.0, 3.0)})
    lines = read_metrics(tmp_path)
    assert [line[TABLE] for line in lines] == [[[0.9, 0.1]]] * 2
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.count("it may have collapsed") == 1
    (events,) = (tmp_path / "summaries" / "train").iterdir()
    assert events.read_bytes().count(b"\x89PNG") == 2
