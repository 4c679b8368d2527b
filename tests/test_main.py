"""main.py as people use it: train, evaluate, decode, go on, be killed, run on several processes."""

import json
import pathlib
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import runs


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def straight(text, tmp_path_factory):
    """A run of 12 steps that nothing interrupts."""
    directory = tmp_path_factory.mktemp("straight")
    done = runs.run(directory, text)
    return directory, done


@pytest.fixture
def directory(straight, tmp_path):
    """A copy of its folder, for what writes into it: metrics of the run are read by other tests."""
    return pathlib.Path(shutil.copytree(straight[0], tmp_path / "run"))


def test_a_run_leaves_what_it_should(straight):
    directory, done = straight
    there = {path.name for path in directory.iterdir()}
    assert {"checkpoints", "summaries", "config.txt", "config.json", "metrics.jsonl"} <= there
    assert {p.name for p in (directory / "checkpoints").iterdir()} >= {
        "checkpoint_00000010",
        "checkpoint_00000012",
    }
    assert {p.name for p in (directory / "summaries").iterdir()} >= {"train", "eval_test_HeldOut"}
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["event"] == "environment" and lines[0]["num_parameters"] > 0
    train = [line for line in lines if line.get("split") == "train"]
    assert [line["step"] for line in train] == list(range(1, 13))
    assert {"loss", "learning_rate", "grad_norm", "param_norm", "skipped_steps"} <= set(train[-1])
    assert {"tokens_per_second", "step_time", "data_wait_share", "tflops_per_second"} <= set(
        train[-1]
    )
    heldout = [line for line in lines if line.get("split") == "HeldOut"]
    assert [line["step"] for line in heldout] == [5, 10, 12]
    assert {"loss", "log_pplx", "bits_per_byte", "accuracy"} <= set(heldout[-1])
    assert train[-1]["loss"] < train[0]["loss"]
    assert "step 12/12" in done.stdout + done.stderr
    assert "NUM_LAYERS" in (directory / "config.txt").read_text()


def test_run_again_says_it_is_complete(directory, text):
    before = (directory / "metrics.jsonl").read_text().count('"split": "train"')
    done = runs.run(directory, text)
    assert "training is complete: step 12 of 12" in done.stdout + done.stderr
    assert (directory / "metrics.jsonl").read_text().count('"split": "train"') == before


def test_eval_mode_gives_the_numbers_of_training_and_ends(directory, text):
    during = runs.losses(directory, "HeldOut")
    # The same rows on another mesh.
    two = {**text, "PERCORE_BATCH_SIZE": 2, "ICI_MESH_SHAPE": "[1,1,2]"}
    done = runs.run(directory, two, "--mode=eval", "--checkpoint_step=10", devices=2)
    result = json.loads((directory / "eval_out" / "HeldOut" / "eval_out_00000010.json").read_text())
    assert result["metrics"]["loss"]["value"] == pytest.approx(during[10], rel=1e-5)
    assert "eval HeldOut: step 10" in done.stdout + done.stderr
    entropy = result["metrics"]["unigram_entropy"]["value"]
    assert 3 < entropy < np.log(512)


def test_follow_ends_when_the_run_has_finished(directory, text):
    done = runs.run(directory, text, "--mode=eval", "--follow", "--fdl.FPROP_DTYPE=bfloat16")
    other = "not the model that was trained to step 12: FPROP_DTYPE was 'float32' and is 'bfloat16'"
    assert done.stderr.count(other) == 1
    assert (directory / "eval_out" / "HeldOut" / "eval_out_00000012.json").exists()


def test_decode_mode_continues_prompts(directory, text):
    done = runs.run(
        directory,
        text,
        "--mode=decode",
        "--prompt=def ",
        "--prompt=import",
        "--fdl.DECODE_MAX_TOKENS=5",
        "--fdl.LAYERNORM_EPSILON=1e-4",
    )
    assert "warning: this is not the model that was trained to step 12: LAYERNORM" in done.stderr
    (output,) = (directory / "decoder_out").rglob("*.jsonl")
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["def ", "import"]
    assert all(len(line["tokens"]) <= 5 for line in lines)
    assert lines[0]["text"] in done.stdout


def test_two_processes_evaluate_and_decode_as_one(directory, text):
    greedy = {**text, "DECODE_TEMPERATURE": 0.0, "DECODE_MAX_TOKENS": 8}
    apart = {**greedy, "DCN_MESH_SHAPE": "[1,1,2]", "ICI_MESH_SHAPE": "[1,1,1]"}
    prompts = ["--mode=decode", "--prompt=def ", "--prompt=import"]

    def decoded():
        (output,) = (directory / "decoder_out").rglob("*.jsonl")
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        output.unlink()
        return [line.pop("logprobs") for line in lines], lines

    runs.run(directory, greedy, *prompts)
    scores, alone = decoded()
    runs.run_processes(directory, apart, *prompts, processes=2)
    others, found = decoded()
    assert found == alone and len(alone) == 2
    np.testing.assert_allclose(others, scores, rtol=1e-5)
    runs.run_processes(directory, {**apart, "PERCORE_BATCH_SIZE": 2}, "--mode=eval", processes=2)
    result = json.loads((directory / "eval_out" / "HeldOut" / "eval_out_00000012.json").read_text())
    during = runs.losses(directory, "HeldOut")
    assert result["metrics"]["loss"]["value"] == pytest.approx(during[12], rel=1e-5)


def assert_same(directory, expected):
    """Every array of the last checkpoint is equal to the bit."""
    ours, theirs = runs.final_state(directory), runs.final_state(expected)
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def wait_for_step(process, step):
    """Reads what a run prints until it has taken `step` steps."""
    for line in process.stderr:
        if f"step {step}/" in line:
            return
    raise AssertionError(f"the run ended before step {step}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_a_run_that_is_stopped_goes_on_to_the_same_bits(number, straight, text, tmp_path):
    process = subprocess.Popen(
        runs.command(tmp_path, {**text, "CHECKPOINT_EVERY_N_STEPS": 2, "MAX_STEPS": 12}),
        env=runs.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=runs.ROOT,
    )
    # The lines of metrics.jsonl are flushed one by one: a clock that both processes see.
    deadline = time.monotonic() + 300
    while len(runs_so_far(tmp_path)) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    code = process.wait(timeout=120)
    reached = max(runs_so_far(tmp_path))
    if number == signal.SIGTERM and reached < 12:
        from paxlike.checkpoint import EXIT_PREEMPTED

        assert code == EXIT_PREEMPTED
        assert (tmp_path / "checkpoints" / f"checkpoint_{reached:08d}").is_dir(), (
            "nothing may be lost"
        )
    runs.run(tmp_path, {**text, "CHECKPOINT_EVERY_N_STEPS": 5})
    assert_same(tmp_path, straight[0])
    assert runs.losses(tmp_path) == runs.losses(straight[0])


def runs_so_far(directory):
    """Steps that a run has logged."""
    path = pathlib.Path(directory) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return [line["step"] for line in lines if line.get("split") == "train"]


def test_four_processes_become_two_and_one_and_every_axis_crosses_them(straight, text, tmp_path):
    """Each start takes the checkpoint of the one before, on another mesh of another number of processes."""
    axes = "[pipeline,data,fsdp,context,tensor]"
    starts = [  # processes, devices of each, the mesh inside a process and across, last step
        (4, 1, "[1,1,1,1,1]", "[2,1,2,1,1]", 3),
        (2, 2, "[1,1,1,1,2]", "[1,1,1,2,1]", 6),
        (2, 1, "[1,1,1,1,1]", "[1,1,1,1,2]", 9),
    ]
    for processes, devices, ici, dcn, last in starts:
        knobs = {
            **text,
            "MESH_AXES": axes,
            "ICI_MESH_SHAPE": ici,
            "DCN_MESH_SHAPE": dcn,
            "PERCORE_BATCH_SIZE": 4 / (processes * devices),
            "NUM_MICROBATCHES": 2 if dcn[1] == "2" else 1,
            "MAX_STEPS": last,
        }
        runs.run_processes(tmp_path, knobs, processes=processes, devices=devices)
    last = {"ICI_MESH_SHAPE": "[1,1,2]", "PERCORE_BATCH_SIZE": 2, "MAX_STEPS": 12}
    runs.run(tmp_path, {**text, **last}, devices=2)
    ours, single = runs.losses(tmp_path), runs.losses(straight[0])
    assert list(ours) == list(single)
    np.testing.assert_allclose(list(ours.values()), list(single.values()), rtol=1e-5)
    # The last step of every start is evaluated as well.
    ours, single = (runs.losses(run, "HeldOut") for run in (tmp_path, straight[0]))
    assert list(ours) == [3, 5, 6, 9, 10, 12]
    np.testing.assert_allclose([ours[n] for n in single], list(single.values()), rtol=1e-5)


def test_going_on_with_another_model_or_other_data_is_refused(directory, text):
    relu = runs.run(directory, {**text, "ACTIVATION": "relu", "MAX_STEPS": 20}, expect=2).stderr
    assert "error:" in relu and "other settings: ACTIVATION was 'gelu' and is 'relu'" in relu
    other = runs.run(
        directory, {**text, "TRAIN_INPUT_RANDOM_SEED": 7, "MAX_STEPS": 20}, expect=2
    ).stderr
    assert "error: the training data is not that of the checkpoint" in other
    assert sum(line.startswith("error:") for line in other.splitlines()) == 1
