"""Runs of main.py that are killed at the worst moments: nothing is lost but the steps since the last checkpoint."""

import contextlib
import json
import pathlib
import signal
import subprocess
import time

import numpy as np
import pytest
import runs

from paxlike.checkpoint import EXIT_PREEMPTED
from paxlike.cluster import EXIT_LOST
from paxlike.log.goodput import read_goodput

pytestmark = pytest.mark.slow
# Evaluations long enough to be hit.
KNOBS = {"EVAL_INTERVAL_STEPS": 3, "EVAL_MAX_BATCHES": 400, "CHECKPOINT_EVERY_N_STEPS": 3}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return {**runs.write_text(tmp_path_factory.mktemp("text")), **KNOBS, "MAX_STEPS": 6}


@pytest.fixture(scope="module")
def straight(text, tmp_path_factory):
    """A run of 6 steps that nothing interrupts."""
    directory = tmp_path_factory.mktemp("straight")
    runs.run(directory, text)
    return directory


@contextlib.contextmanager
def started(*commands, output):
    """Processes whose output goes to files; none is left behind."""
    found = []
    for number, command in enumerate(commands):
        with open(f"{output}.{number}", "w") as file:
            found.append(
                subprocess.Popen(
                    command, env=runs.environment(), stdout=file, stderr=file, cwd=runs.ROOT
                )
            )
    try:
        yield found
    finally:
        for process in found:
            process.kill()
            process.wait()
    deadline = time.monotonic() + 10
    while (left := processes_of(output.parent)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left, f"processes {left} are left behind"


def processes_of(folder):
    """Processes of this machine whose command line names `folder`."""
    found = []
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


def wait_until(condition, process):
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


def lines(directory):
    path = pathlib.Path(directory) / "metrics.jsonl"
    texts = path.read_text().splitlines() if path.exists() else []
    return [json.loads(text) for text in texts if text.endswith("}")]


def steps(directory, split="train"):
    return [line["step"] for line in lines(directory) if line.get("split") == split]


def has_saved(directory, step):
    return (directory / f"checkpoints/checkpoint_{step:08d}").is_dir()


def num_starts(directory):
    return len({line["start"] for line in lines(directory) if line.get("event") == "goodput"})


def assert_same_losses(directory, expected, **tolerance):
    for split in ("train", "HeldOut"):
        ours, theirs = runs.losses(directory, split), runs.losses(expected, split)
        assert list(ours) == list(theirs)
        if tolerance:
            np.testing.assert_allclose(list(ours.values()), list(theirs.values()), **tolerance)
        else:
            assert ours == theirs


def assert_time_adds_up(directory, *, num_starts):
    found = read_goodput(directory)
    assert len(found.starts) == num_starts
    assert sum(found.seconds.values()) == pytest.approx(found.wall_seconds, abs=0.05)
    assert all(value > -0.05 for value in found.seconds.values()), found.seconds
    events = [line for line in lines(directory) if line.get("event") == "goodput"]
    assert found.starts[-1].until == pytest.approx(events[-1]["time"], abs=0.5)
    return found


def test_killed_before_a_checkpoint_in_an_evaluation_and_in_a_restore(straight, text, tmp_path):
    directory, output = tmp_path / "run", tmp_path / "output"
    command = runs.command(directory, text)

    def printed():
        return pathlib.Path(f"{output}.0").read_text()

    moments = {
        "before the first checkpoint": lambda: 1 in steps(directory),
        "while step 3 is evaluated": lambda: steps(directory).count(3) > 0,
        # Perhaps since the start before: this one has to have begun, too.
        "once there is a checkpoint": lambda: has_saved(directory, 3) and num_starts(directory) > 2,
        "while that is restored": lambda: "reading the newest checkpoint ..." in printed(),
    }
    for moment in moments.values():
        with started(command, output=output) as (process,):
            wait_until(moment, process)
            process.kill()
            assert process.wait() == -signal.SIGKILL
    runs.run(directory, text)
    assert_same_losses(directory, straight)
    ours, theirs = runs.final_state(directory, 6), runs.final_state(straight, 6)
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    found = assert_time_adds_up(directory, num_starts=5)
    assert found.seconds["lost"] > 0 and found.seconds["restore"] > 0


def test_a_signal_in_an_evaluation_stops_it_and_it_is_made_up_for(straight, text, tmp_path):
    directory, output = tmp_path / "run", tmp_path / "output"
    with started(runs.command(directory, text), output=output) as (process,):
        wait_until(lambda: 3 in steps(directory), process)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=100) == EXIT_PREEMPTED
    assert steps(directory, "HeldOut") == []  # it was given up, and nothing of it counts
    stopped = [line for line in lines(directory) if line.get("event") == "stopped"]
    assert [(line["step"], line["signal"]) for line in stopped] == [(3, "SIGUSR1")]
    runs.run(directory, text)
    assert_same_losses(directory, straight)
    assert assert_time_adds_up(directory, num_starts=2).seconds["lost"] == 0


def test_a_time_limit_saves_and_stops(text, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", "32503680000")  # far away: the knob comes first
    knobs = {**text, "MAX_STEPS": 10**6, "EVAL_INTERVAL_STEPS": 10**6, "TIME_LIMIT": 0.2}
    knobs |= {"CHECKPOINT_EVERY_N_STEPS": 10**6, "SUMMARY_INTERVAL_STEPS": 100}
    done = runs.run(tmp_path, knobs, expect=EXIT_PREEMPTED)
    last_line = (tmp_path / "config.txt").read_text().splitlines()[-1]
    assert last_line.startswith("# this job ends at 3000-01-01 00:00:00+00:00")
    assert "time limit: saving a checkpoint and stopping" in done.stderr
    (stopped,) = [line for line in lines(tmp_path) if line.get("event") == "stopped"]
    # On a machine so busy that it took no step in 12 seconds there is nothing to save.
    saved = tmp_path / "checkpoints" / f"checkpoint_{stopped['step']:08d}"
    assert saved.is_dir() or stopped["step"] == 0


def test_two_processes_one_killed_in_an_evaluation_go_on_as_one(straight, text, tmp_path):
    directory, output = tmp_path / "run", tmp_path / "output"
    knobs = {**text, "DCN_MESH_SHAPE": "[1,2,1]", "ICI_MESH_SHAPE": "[1,1,1]"}
    knobs |= {"PERCORE_BATCH_SIZE": 2}
    flags = ["--multiprocess_gpu", f"--server_addr=127.0.0.1:{runs.free_port()}", "--num_hosts=2"]
    commands = [runs.command(directory, knobs, *flags, f"--host_idx={n}") for n in (0, 1)]
    with started(*commands, output=output) as (first, second):
        wait_until(lambda: 6 in steps(directory) and has_saved(directory, 3), first)
        second.kill()
        assert first.wait(timeout=60) == EXIT_LOST
    assert steps(directory, "HeldOut") == [3]
    said = pathlib.Path(f"{output}.0").read_text()
    assert "check: 1 node, 2 processes, 1 x cpu each" in said
    assert "axis fsdp (2) crosses processes: sum right" in said
    assert f"pid {second.pid}) died; see " in said and "Traceback" not in said
    assert f"pid {second.pid}) died" in (directory / "processes/failure.txt").read_text()
    # The same rows in the same order: PERCORE_BATCH_SIZE x devices is what counts.
    done = runs.run(directory, text)
    assert "going on from the checkpoint of step 3" in done.stderr
    assert_same_losses(directory, straight, rtol=1e-5)
    assert_time_adds_up(directory, num_starts=2)
