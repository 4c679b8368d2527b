"""Spikes are told from noise, and recorded with what is needed to look at them."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from paxlike.log.history import read_history
from paxlike.log.metric import Metric
from paxlike.log.run_log import RunLog
from paxlike.train.recorder import Origin, Recorder, RecorderOptions, Watch
from tests.train.odd_run import experiment, one_device


def fired(losses, norms=None, **options):
    """The steps, from 0, that are called spikes."""
    watch = Watch(RecorderOptions(**options))
    norms = np.ones(len(losses)) if norms is None else norms
    return [i for i, (a, b) in enumerate(zip(losses, norms)) if watch.look(float(a), float(b))]


def curve(steps=10_000, noise=0.05, seed=0):
    """A loss that falls as a power of the step, with normal noise."""
    rng = np.random.default_rng(seed)
    return 2.0 + 9.0 * (1.0 + np.arange(steps)) ** -0.3 + noise * rng.standard_normal(steps)


@pytest.mark.parametrize("noise", [0.0, 0.005, 0.1, 0.5])
def test_ordinary_noise_is_no_spike(noise):
    assert fired(curve(noise=noise)) == []


def test_noise_with_heavy_tails_fires_rarely():
    rng = np.random.default_rng(1)
    noise = 0.05 * rng.standard_t(5, 10_000)
    assert len(fired(curve(noise=0.0) + noise)) <= 10


def test_spikes_are_seen_beside_each_other():
    losses = curve()
    losses[[5000, 5003, 5010, 9000]] += 1.0  # 20 standard deviations
    assert fired(losses) == [5000, 5003, 5010, 9000]
    # With mean and standard deviation the first would hide the others.
    window = losses[4910:5010]
    assert losses[5010] < window.mean() + 8 * window.std()


def test_nothing_is_judged_before_the_window_is_full_but_what_is_not_finite():
    losses = [1.0] * 10 + [9.0] + [float("nan")] + [1.0] * 100
    assert fired(losses) == [11]
    norms = np.ones(len(losses))
    norms[40] = np.inf
    assert fired([1.0] * len(losses), norms) == [40]


def test_sigmas_0_leaves_only_what_is_not_finite():
    losses = curve()
    losses[5000], losses[6000] = 100.0, np.inf
    assert fired(losses, sigmas=0.0) == [6000]


def test_a_loss_near_0_may_jitter():
    losses = 1e-7 * np.random.default_rng(0).random(1000)
    assert fired(losses) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigmas": -1.0}, "SPIKE_SIGMAS=-1.0 must be 0"),
        ({"sigmas": float("nan")}, "SPIKE_SIGMAS=nan"),
        ({"window": 3}, "SPIKE_WINDOW=3 must be at least 4"),
        ({"max_recordings": -1}, "SPIKE_MAX=-1 must be 0"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message) as error:
        RecorderOptions(**options)
    assert "\n" not in str(error.value)


def test_an_odd_batch_is_recorded(tmp_path, capfd):
    run = experiment(18)
    with one_device():
        assert run.train(str(tmp_path)) == 0
    (place,) = (tmp_path / "spikes").iterdir()
    assert place.name == "step_00000018"
    spike = json.loads((place / "spike.json").read_text())
    assert (spike["step"], spike["checkpoint"], spike["first_row"], spike["rows"]) == (
        18,
        16,
        68,
        4,
    )
    assert (spike["config"], spike["seed"]) == ("Synthetic126M", 1234)
    assert [each["step"] for each in spike["history"]] == list(range(10, 18))
    assert "standard deviations" in spike["why"]
    recorded = np.load(place / "batch.npz")
    with run.train_data.batches(global_batch=4, first_row=68) as batches:
        expected = next(batches)
    assert recorded.files and recorded["tokens"].min() >= 16
    for name in expected:
        np.testing.assert_array_equal(recorded[name], expected[name])
    # One line, one event, and its checkpoint outlives newer ones.
    assert capfd.readouterr().err.count("step 18 is a spike: its loss") == 1
    (event,) = [each for each in read_history(tmp_path).events if each["event"] == "spike"]
    assert event["step"] == 18 and event["loss"] == spike["loss"]
    steps = sorted(int(p.name[-8:]) for p in (tmp_path / "checkpoints").glob("checkpoint_*"))
    assert steps == [16, 24]
    # A later start keeps it too.
    longer = dataclasses.replace(run, num_steps=32)
    with one_device():
        assert longer.train(str(tmp_path)) == 0
    steps = sorted(int(p.name[-8:]) for p in (tmp_path / "checkpoints").glob("checkpoint_*"))
    assert steps == [16, 32]


def test_recordings_are_bounded_and_can_be_off(tmp_path, capfd):
    def look(directory, steps, **options):
        """Every loss is lost: the steps that are recorded, by a recorder of its own."""
        with RunLog(directory, num_steps=None) as log:
            recorder = Recorder(
                directory,
                RecorderOptions(window=8, **options),
                config="C",
                seed=1,
                data=None,
                log=log,
            )
            batch = {"tokens": jax.numpy.zeros((2, 3), "int32")}
            metrics = {"loss": Metric(np.nan, 1.0), "grad_norm": 1.0}
            return [
                step
                for step in steps
                if recorder.look(step, metrics, Origin(step, batch), checkpoint=None)
            ]

    assert look(tmp_path / "off", range(30), max_recordings=0) == []
    assert not (tmp_path / "off" / "spikes").exists()
    # What goes on is recorded once; three in all, an earlier start's included; then one line says so.
    here = tmp_path / "here"
    assert look(here, [*range(1, 6), 12, 13, 21, 50], max_recordings=3) == [1, 21, 50]
    assert "nor are later ones" not in capfd.readouterr().err
    assert look(here, range(60, 90, 9), max_recordings=3) == []
    assert capfd.readouterr().err.count("nor are later ones: there are SPIKE_MAX=3") == 1
    assert look(here, range(21, 22), max_recordings=3) == [21]  # the same step again
    names = sorted(path.name for path in (here / "spikes").iterdir())
    assert names == ["step_00000001", "step_00000021", "step_00000050"]
    first = json.loads((here / "spikes/step_00000001/spike.json").read_text())
    assert (
        first["checkpoint"] is None and first["loss"] is None and first["why"] == "its loss is nan"
    )


def test_a_full_disk_does_not_end_the_run(tmp_path, capfd):
    (tmp_path / "spikes").write_text("no folder")
    with RunLog(tmp_path, num_steps=None) as log:
        recorder = Recorder(tmp_path, RecorderOptions(), config="C", seed=1, data=None, log=log)
        batch = {"tokens": jax.numpy.zeros((2, 3), "int32")}
        metrics = {"loss": Metric(np.nan, 1.0), "grad_norm": 1.0}
        assert recorder.look(1, metrics, Origin(0, batch), checkpoint=None)
    assert "step_00000001 cannot be written: Not a directory" in capfd.readouterr().err
