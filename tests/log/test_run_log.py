"""The log of a run: what is written, when, and what survives a restart and a full disk."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxlike.log.history import read_history, read_lines, read_metrics
from paxlike.log.metric import Metric
from paxlike.log.run_log import RunLog
from paxlike.log.throughput import MFU_CONVENTION


def open_log(folder, **options):
    return RunLog(
        folder, **{"num_steps": 10, "summary_interval_steps": 5, "progress": False} | options
    )


def train(log, first, last, *, loss=lambda step: Metric(float(step), 1.0), seconds=0.0, **numbers):
    for step in range(first, last + 1):
        time.sleep(seconds)
        log.train(step, {"loss": loss(step)}, **numbers)


def test_summaries_come_at_the_interval_and_at_the_last_step(tmp_path):
    with open_log(tmp_path, num_steps=12) as log:
        train(log, 1, 12)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [5, 10, 12]
    assert [line["loss"] for line in lines] == [3.0, 8.0, 11.5]
    assert all(line["split"] == "train" and line["time"] > 1e9 for line in lines)


def test_what_was_counted_is_written_when_a_run_ends_early(tmp_path):
    def interrupted(log):
        train(log, 1, 7)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), open_log(tmp_path) as log:
        interrupted(log)
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(5, 3.0), (7, 6.5)]


@pytest.mark.parametrize("interval", [5, 150])  # 150: more steps than wait at a time
def test_metrics_are_averaged_by_weight_and_numbers_are_the_last(tmp_path, interval):
    rng = np.random.default_rng(0)
    sums, weights = rng.uniform(1e3, 1e5, interval), rng.integers(0, 1000, interval)
    step_metrics = jax.jit(lambda s, w: {"loss": Metric(s, w), "lr": s * 0 + w})
    with open_log(tmp_path, num_steps=interval, summary_interval_steps=interval) as log:
        for i in range(interval):
            device = step_metrics(jnp.float32(sums[i]), jnp.float32(weights[i]))
            log.train(i + 1, device | {"skipped_steps": i})
    (line,) = read_metrics(tmp_path)
    assert line["loss"] == pytest.approx(np.float32(sums).sum(dtype=np.float64) / weights.sum())
    assert line["lr"] == weights[-1]
    assert line["skipped_steps"] == interval - 1
    assert list(line)[3:6] == ["loss", "lr", "skipped_steps"]  # in the order that they were given


def test_rates_follow_from_the_time_of_the_steps(tmp_path):
    devices = jax.device_count()
    with open_log(tmp_path, peak_flops_per_device=1e6) as log:
        train(log, 1, 10, seconds=0.02, tokens=100, flops=1e4 * devices, data_wait_seconds=0.005)
    first, second = read_metrics(tmp_path)
    for line in (first, second):
        assert line["step_time"] >= 0.02
        assert line["steps_per_second"] == pytest.approx(1 / line["step_time"])
        assert line["tokens_per_second"] == pytest.approx(100 / line["step_time"])
        assert line["tflops_per_second"] == pytest.approx(1e4 / line["step_time"] / 1e12)
        assert line["mfu"] == pytest.approx(1e4 / line["step_time"] / 1e6)
        assert line["data_wait_share"] == pytest.approx(0.005 / line["step_time"])
        assert line["host_memory_peak_bytes"] > 1e6
    assert (first["tokens"], second["tokens"]) == (500, 1000)
    assert first["eta_seconds"] >= 5 * 0.02
    assert second["eta_seconds"] == 0.0


def test_the_first_step_holds_the_compilation_and_is_not_timed(tmp_path):
    with open_log(tmp_path, summary_interval_steps=1) as log:
        train(log, 1, 2, tokens=100)
    first, second = read_metrics(tmp_path)
    assert "step_time" not in first
    assert "tokens_per_second" not in first
    assert second["step_time"] > 0


def test_pauses_are_no_step_time(tmp_path):
    start = time.monotonic()
    with open_log(tmp_path) as log:
        train(log, 1, 3, seconds=0.01)
        with log.pause("evaluation"):
            time.sleep(0.2)
            with log.pause("checkpoint"):  # inside another: part of it
                time.sleep(0.1)
        with log.pause("checkpoint"):
            time.sleep(0.2)
        train(log, 4, 5, seconds=0.01)
        elapsed = time.monotonic() - start
        train(log, 6, 10)
    first, second = read_metrics(tmp_path)
    assert first["evaluation_seconds"] >= 0.3
    assert first["checkpoint_seconds"] >= 0.2
    paused = first["evaluation_seconds"] + first["checkpoint_seconds"]
    assert (
        4 * 0.01 <= 4 * first["step_time"] <= elapsed - paused + 0.002
    )  # milliseconds are written
    assert "evaluation_seconds" not in second


def test_without_a_known_peak_there_is_no_mfu(tmp_path):
    with open_log(tmp_path) as log:
        train(log, 1, 5, flops=1e6, seconds=0.001)
    (line,) = read_metrics(tmp_path)
    assert "mfu" not in line
    assert line["tflops_per_second"] > 0


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path, read_scalars):
    def reject(constant):
        raise AssertionError(f"{constant} is not JSON")

    with open_log(tmp_path) as log:
        train(log, 1, 5, loss=lambda step: Metric(float("nan"), 1.0))
        log.evaluate("heldout", 5, {"acc": float("inf"), "empty": Metric(0.0, 0.0), "ok": 1.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    line, evaluation = (json.loads(row, parse_constant=reject) for row in text.splitlines())
    assert line["loss"] is None
    assert line["non_finite"] == ["loss"]
    assert evaluation["non_finite"] == ["acc", "empty"]
    assert evaluation["ok"] == 1.0
    assert np.isnan(read_scalars(tmp_path / "summaries" / "train")[5, "loss"])


def test_tensorboard_has_the_same_numbers_under_the_tags_of_pax(tmp_path, read_scalars):
    with open_log(tmp_path) as log:
        for step in range(1, 6):
            metrics = {"loss": Metric(6.0, 4.0), "learning_rate": 0.5, "fraction_correct": 0.25}
            log.train(step, metrics, tokens=10)
        log.evaluate("lambada", 5, {"loss": Metric(2.0, 4.0), "acc_strict": Metric(3.0, 4.0)})
    scalars = read_scalars(tmp_path / "summaries" / "train")
    (line,) = read_history(tmp_path).train
    assert scalars[5, "loss"] == 1.5
    assert scalars[5, "Metrics/loss-weight"] == 20.0
    assert scalars[5, "learning/lr"] == 0.5
    assert scalars[5, "Metrics/fraction_correct"] == 0.25
    assert scalars[5, "Steps/sec"] == pytest.approx(line["steps_per_second"])
    assert scalars[5, "throughput/tokens_per_second"] == pytest.approx(line["tokens_per_second"])
    scalars = read_scalars(tmp_path / "summaries" / "eval_test_lambada")
    assert scalars[5, "Metrics/acc_strict"] == 0.75
    assert scalars[5, "Metrics/acc_strict-weight"] == 4.0
    assert scalars[5, "loss"] == 0.5


def test_tensorboard_can_be_left_out(tmp_path):
    with open_log(tmp_path, tensorboard=False) as log:
        log.environment()
        train(log, 1, 5)
    assert not (tmp_path / "summaries").exists()
    assert len(read_metrics(tmp_path)) == 1


def test_environment_and_texts(tmp_path, read_events):
    with open_log(tmp_path) as log:
        log.environment(mesh={"data": 2, "fsdp": 2}, dtype=jnp.bfloat16)
        log.text("config", "NUM_LAYERS = 2\nNUM_HEADS = 4")
    environment = read_history(tmp_path).environment
    assert environment["versions"]["jax"] == jax.__version__
    assert environment["num_devices"] == jax.device_count()
    assert environment["device_kind"] == "cpu"
    assert environment["num_processes"] == 1
    assert environment["mesh"] == {"data": 2, "fsdp": 2}
    assert environment["mfu_convention"] == MFU_CONVENTION
    assert environment["command_line"]
    assert environment["hostname"]
    assert "xla_flags" in environment
    (path,) = (tmp_path / "summaries" / "train").iterdir()
    texts = {
        value.tag: value.tensor.string_val[0].decode()
        for event in read_events(path)
        for value in event.summary.value
    }
    assert texts["config/text_summary"] == "    NUM_LAYERS = 2\n    NUM_HEADS = 4"
    assert texts["mfu_convention/text_summary"] == MFU_CONVENTION


def test_a_resumed_run_is_read_as_one(tmp_path, read_scalars):
    with open_log(tmp_path, num_steps=20) as log:
        train(log, 1, 13, tokens=7)
        log.evaluate("heldout", 10, {"loss": 9.0})
    with open_log(tmp_path, num_steps=20) as log:
        log.resumed(8, checkpoint="checkpoint_00000008")
        train(log, 9, 20, loss=lambda step: Metric(100.0 + step, 1.0), tokens=7)
    history = read_history(tmp_path)
    # Steps 9 and 10 were done twice; only the second time counts. 6 to 8 were in no summary.
    assert history.series("loss") == ([5, 10, 15, 20], [3.0, 109.5, 113.0, 118.0])
    assert history.series("tokens") == ([5, 10, 15, 20], [35, 70, 105, 140])
    assert history.evaluations == {}
    assert history.events[-1]["checkpoint"] == "checkpoint_00000008"
    assert len(read_lines(tmp_path)) == 3 + 1 + 1 + 3
    scalars = read_scalars(tmp_path / "summaries" / "train")
    losses = {step: value for (step, tag), value in scalars.items() if tag == "loss"}
    assert losses == {5: 3.0, 10: 109.5, 15: 113.0, 20: 118.0}


def test_a_line_torn_by_a_power_cut_does_not_swallow_the_next(tmp_path):
    with open_log(tmp_path) as log:
        train(log, 1, 5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1, "st')
    with open_log(tmp_path) as log:
        with pytest.warns(UserWarning, match="line 2 is torn"):
            log.resumed(5)
        train(log, 6, 10)
    with pytest.warns(UserWarning, match="line 2 is torn"):
        before, event, after = read_lines(tmp_path)
    assert (before["step"], event["event"], after["step"]) == (5, "resumed", 10)


def test_every_line_is_on_disk_at_once(tmp_path):
    log = open_log(tmp_path)
    log.event("checkpoint_saved", step=3, seconds=0.5)
    (line,) = read_lines(tmp_path)
    assert line["event"] == "checkpoint_saved"
    assert line["step"] == 3
    assert line["seconds"] == 0.5
    train(log, 1, 5)
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [5]
    log.close()


def test_training_outlives_a_full_disk(tmp_path, capsys, largest_file, read_scalars):
    with open_log(tmp_path, num_steps=20, progress=True) as log:
        train(log, 1, 5)
        before = (tmp_path / "metrics.jsonl").read_bytes()
        capsys.readouterr()
        with largest_file(100):
            train(log, 6, 15)
        assert (tmp_path / "metrics.jsonl").read_bytes() == before
        warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
        train(log, 16, 20)
    # One line for each file, although two summaries were lost in each.
    assert len(warnings) == 2
    assert str(tmp_path / "metrics.jsonl") in warnings[0]
    assert "File too large" in warnings[0]
    assert [line["step"] for line in read_metrics(tmp_path)] == [5, 20]
    after = capsys.readouterr().err
    assert f"{tmp_path / 'metrics.jsonl'} is written again; 2 records are lost" in after
    steps = {step for step, _ in read_scalars(tmp_path / "summaries" / "train")}
    assert steps == {5, 20}


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write to the log folder"):
        open_log(tmp_path / "file")


def test_other_processes_write_and_show_nothing(tmp_path, capsys):
    with open_log(tmp_path / "run", is_main=False, progress=True) as log:
        log.environment()
        log.resumed(0)
        log.text("config", "x")
        log.warning("x")
        with log.busy("compiling"), log.pause("evaluation"):
            train(log, 1, 10)
        log.evaluate("heldout", 5, {"loss": 1.0})
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().err == ""


def test_progress_shows_loss_speed_and_evaluations(tmp_path, capsys):
    with open_log(tmp_path, progress=True) as log:
        with log.busy("compiling the train step"):
            pass
        train(log, 1, 10, tokens=1000, seconds=0.001)
        log.evaluate("heldout", 10, {"loss": 1.25})
        log.warning("the loader is slow", share=0.5)
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == "compiling the train step ..."
    assert shown[2].startswith("train: step 1/10 (10%) | loss 1.0000")
    assert shown[3].startswith("train: step 10/10 (100%) | loss 10.0000 | ")
    assert "tokens/s | took" in shown[3]
    assert shown[4] == "eval heldout: step 10 | loss 1.25"
    assert shown[5] == "warning: the loader is slow"
    phase, *_, warning = read_history(tmp_path).events
    assert phase["message"] == "compiling the train step"
    assert phase["seconds"] >= 0
    assert warning["event"] == "warning"
    assert warning["share"] == 0.5


def test_misuse_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="summary_interval_steps must be at least 1, not 0"):
        open_log(tmp_path, summary_interval_steps=0)
    with open_log(tmp_path) as log:
        with pytest.raises(ValueError, match="cannot be called 'train'"):
            log.evaluate("train", 1, {})
        with pytest.raises(ValueError, match=r"call RunLog.resumed\(...\)"):
            log.event("resumed", from_step=3)


def test_a_skipped_step_does_not_hide_the_loss_of_its_interval(tmp_path):
    from paxlike.log.history import read_metrics

    with RunLog(
        tmp_path, num_steps=8, summary_interval_steps=4, tensorboard=False, progress=False
    ) as log:
        for step, loss in enumerate([3.0, float("nan"), 5.0, 4.0, *[float("nan")] * 4], start=1):
            log.train(step, {"loss": Metric.of(loss)})
    first, second = read_metrics(tmp_path)
    assert first["loss"] == 4.0
    assert second["loss"] is None and second["non_finite"] == ["loss"]
