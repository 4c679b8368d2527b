"""The best checkpoint is kept, and a run that gets no better stops."""

import dataclasses
import json
import shutil

import fiddle as fdl
import pytest

from paxlike.log.history import read_metrics
from paxlike.log.metric import Metric
from paxlike.train.best import Best, BestOptions
from tests.configs.test_gpt import shrink


def history(tmp_path, values, *, mode="min", patience=0):
    best = Best(tmp_path, BestOptions("dev/loss", mode, patience), step=0)
    better = [best.add(step, {"dev": {"loss": Metric(v, 1.0)}}) for step, v in values.items()]
    return best, better


@pytest.mark.parametrize(("mode", "expected"), [("min", (20, 1.0)), ("max", (10, 3.0))])
def test_best(tmp_path, mode, expected):
    best, better = history(tmp_path, {10: 3.0, 20: 1.0, 30: 1.0, 40: 2.0}, mode=mode)
    assert (best.step, best.value) == expected
    assert better == [step <= expected[0] for step in (10, 20, 30, 40)]


def test_not_a_number_is_never_best(tmp_path):
    best, better = history(tmp_path, {1: float("nan"), 2: 5.0, 3: float("nan")})
    assert better == [False, True, False] and best.step == 2


def test_patience(tmp_path):
    assert not history(tmp_path, {1: 1.0, 2: 2.0}, patience=2)[0].exhausted
    assert history(tmp_path, {1: 1.0, 2: 2.0, 3: 1.0}, patience=2)[0].exhausted
    assert not history(tmp_path, {1: 1.0, 2: 2.0, 3: 0.5}, patience=2)[0].exhausted
    assert not history(tmp_path, {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0})[0].exhausted


def test_a_start_from_an_older_step_forgets_what_came_after(tmp_path):
    best, _ = history(tmp_path, {10: 3.0, 20: 1.0})
    best.write()
    assert Best(tmp_path, BestOptions("dev/loss"), step=20).step == 20
    assert Best(tmp_path, BestOptions("dev/loss"), step=15).step == 10
    assert Best(tmp_path, BestOptions("dev/accuracy"), step=20).step is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "dev/loss", "mode": "most"}, "BEST_MODE='most' is none of min, max"),
        ({"patience": 3}, "EARLY_STOPPING_PATIENCE=3 needs BEST_METRIC"),
        ({"metric": "dev/loss", "patience": -1}, "EARLY_STOPPING_PATIENCE=-1 must be 0"),
        ({"metric": "test/loss"}, "BEST_METRIC='test/loss' must be one of dev/<metric>"),
        ({"metric": "dev"}, "BEST_METRIC='dev' must be one of dev/<metric>"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BestOptions(**options).check(["dev"], evaluates=True)
    with pytest.raises(ValueError, match="needs evaluation while training: EVAL_ON_TEST=True"):
        BestOptions("dev/loss").check(["dev"], evaluates=False)


def test_unknown_metric_names_those_that_are_there(tmp_path):
    with pytest.raises(ValueError, match="BEST_METRIC='dev/loss': dev has accuracy, f1"):
        Best(tmp_path, BestOptions("dev/loss"), step=0).add(
            1, {"dev": {"f1": Metric(1.0, 1.0), "accuracy": Metric(1.0, 1.0)}}
        )


def experiment(metric="made_up/loss", **changes):
    config = shrink(
        "Synthetic126M",
        VOCAB_SIZE=64,
        SYNTHETIC_RANDOM=True,
        CHECKPOINT_MAX_TO_KEEP=1,
        CHECKPOINT_EVERY_N_STEPS=1,
        MAX_STEPS=9,
        BEST_METRIC=metric,
        **changes,
    )
    tree = config.experiment()
    tree.eval_data = {"made_up": tree.train_data}
    tree.evaluation.every_n_steps, tree.evaluation.max_batches = 1, 1
    return fdl.build(tree)


def test_a_run_that_gets_no_better_stops_and_keeps_its_best(tmp_path, capfd):
    stuck = experiment(LEARNING_RATE=0.0, EARLY_STOPPING_PATIENCE=3)
    assert stuck.train(str(tmp_path)) == 0
    steps = sorted(int(p.name[-8:]) for p in (tmp_path / "checkpoints").glob("checkpoint_*"))
    assert steps == [1, 4]  # the best, and the last
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 1
    assert "stopped early at step 4: made_up/loss was best at step 1" in capfd.readouterr().err
    assert max(line["step"] for line in read_metrics(tmp_path)) == 4
    # The same command again has nothing to do.
    assert stuck.train(str(tmp_path)) == 0
    assert "training is complete: step 4 of 9; nothing to do" in capfd.readouterr().err
    assert dataclasses.replace(stuck, num_steps=3).train(str(tmp_path)) == 0
    assert "the checkpoint is at step 4, and MAX_STEPS is 3; nothing" in capfd.readouterr().err
    assert max(line["step"] for line in read_metrics(tmp_path)) == 4


def test_patience_goes_on_counting_after_a_restart(tmp_path):
    stuck = experiment(LEARNING_RATE=0.0, EARLY_STOPPING_PATIENCE=3)
    stuck.train(str(tmp_path))
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint_00000004")
    stuck.train(str(tmp_path))  # from step 1 on: three more
    assert max(line["step"] for line in read_metrics(tmp_path)) == 4


def test_an_unknown_metric_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match="'made_up/los': made_up has accuracy, .*, loss$"):
        experiment("made_up/los").train(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
