"""The effective history of a run that was interrupted."""

import json

import pytest

from paxlike.log.history import read_history, read_lines, read_metrics


def train(step, loss=0.0):
    return {"step": step, "split": "train", "loss": loss}


def evaluation(step, split="lambada", **metrics):
    return {"step": step, "split": split, **metrics}


def write(folder, *lines):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def test_lines_beyond_the_checkpoint_are_dropped(tmp_path):
    write(
        tmp_path,
        {"event": "environment", "hostname": "a"},
        train(10, 5.0),
        train(20, 4.0),
        evaluation(20, loss=4.1),
        train(30, 3.0),
        evaluation(30, loss=3.1),
        {"event": "environment", "hostname": "b"},
        {"event": "resumed", "from_step": 20},
        evaluation(20, loss=4.2),
        train(30, 3.5),
    )
    history = read_history(tmp_path)
    assert history.series("loss") == ([10, 20, 30], [5.0, 4.0, 3.5])
    assert history.series("loss", split="lambada") == ([20], [4.2])
    assert history.environment["hostname"] == "b"
    assert [event["event"] for event in history.events] == ["environment", "environment", "resumed"]
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [10, 20, 20, 30]
    assert len(read_lines(tmp_path)) == 10


def test_a_run_started_again_from_the_beginning_counts_alone(tmp_path):
    write(tmp_path, train(10, 5.0), train(20, 4.0), train(30, 3.0), train(10, 5.5), train(20, 4.5))
    assert read_history(tmp_path).series("loss") == ([10, 20], [5.5, 4.5])


def test_evaluating_an_older_checkpoint_drops_nothing(tmp_path):
    write(tmp_path, train(10), evaluation(10, acc=0.1), train(20), evaluation(20, acc=0.2))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(evaluation(10, acc=0.15)) + "\n")
    history = read_history(tmp_path)
    assert history.series("acc", split="lambada") == ([10, 20], [0.15, 0.2])
    assert [line["step"] for line in history.train] == [10, 20]


def test_values_that_are_missing_or_not_finite_are_left_out(tmp_path):
    write(tmp_path, train(10, None), {"step": 20, "split": "train"}, train(30, 1.0))
    history = read_history(tmp_path)
    assert history.series("loss") == ([30], [1.0])
    assert history.last("loss") == 1.0
    assert history.last("loss", split="nothing") is None
    assert history.environment == {}


def test_a_torn_line_is_named_and_left_out(tmp_path):
    write(tmp_path, train(10, 5.0))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "spl\n' + json.dumps(train(30, 3.0)) + "\n" + '{"st')
    with pytest.warns(UserWarning, match="is torn") as warned:
        assert [line["step"] for line in read_metrics(tmp_path)] == [10, 30]
    assert [str(w.message).split(": ")[1] for w in warned] == [
        "line 2 is torn and left out",
        "line 4 is torn and left out",
    ]


def test_no_metrics_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match=r"no metrics at '.*': give the folder") as error:
        read_history(tmp_path)
    assert str(tmp_path) in str(error.value)
