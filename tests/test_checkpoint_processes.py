"""Two real processes on this machine: saving together, agreeing, and changing their number."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from paxlike.checkpoint import EXIT_PREEMPTED, Checkpointer, CheckpointOptions, read_metadata
from tests.checkpoint_worker import CONFIG, abstract, assert_same_bits, host_state, mesh_of, put

WORKER = Path(__file__).with_name("checkpoint_worker.py")
pytestmark = pytest.mark.slow


def start(program, folder, report):
    """The program in two processes of two devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [
                sys.executable,
                "-u",
                WORKER,
                program,
                "2",
                f"127.0.0.1:{port},2,{index}",
                folder,
                report,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(WORKER.parent.parent)},
        )
        for index in range(2)
    ]


def test_two_processes_save_agree_and_restore(tmp_path):
    options = CheckpointOptions(every_n_steps=1)
    with Checkpointer(tmp_path / "theirs", options) as checkpointer:
        state = put(host_state(5), mesh_of(2, 2))
        checkpointer.save(5, state, data={"step": 5}, config=CONFIG)
    (tmp_path / "file").write_text("")
    report = tmp_path / "report"
    workers = start("several_processes", tmp_path, report)
    outputs = [worker.communicate(timeout=150) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    seen = [json.loads(Path(f"{report}.{index}").read_text()) for index in range(2)]
    assert seen[0]["shared"] == seen[1]["shared"] == ["0", "1"]
    assert seen[0]["partly"] == seen[1]["partly"] == ["only 1"]
    assert seen[0]["first"] == seen[1]["first"] == ["", "x"]
    assert seen[0]["followed"] == seen[1]["followed"] == [5]
    # The clock of process 0 decides, and is asked every tenth step only.
    assert seen[0]["due"] == seen[1]["due"] == [10, 20, 30]
    for index, each in enumerate(seen):
        assert each["after_damage"] == 10
        assert each["local"].startswith(
            f"ValueError: step of the state is on the devices of process {index} only"
        )
        assert "is of another model or optimizer: params/decoder/b has shape" in each["model"]
        assert each["unwritable"].startswith("OSError: checkpoints cannot be written: ")
    assert seen[0]["unwritable"] == seen[1]["unwritable"]
    warnings = [error.count("is damaged (state/") for _, error in outputs]
    assert warnings == [3, 0], outputs  # Three restores, each of them said by process 0 only.

    # What two processes saved, one restores.
    ours = tmp_path / "ours"
    metadata = read_metadata(ours, step=10)
    assert metadata["num_processes"] == 2
    with Checkpointer(ours, read_only=True) as checkpointer:
        restored = checkpointer.restore(abstract(host_state(0), mesh_of(4, 1)), step=10)
    assert_same_bits(restored.state, host_state(10))
    assert restored.data == {"step": 10}


def test_a_signal_to_one_stops_both_at_the_same_step(tmp_path):
    report = tmp_path / "report"
    workers = start("train_until_asked", tmp_path / "run", report)
    for worker in workers:
        assert worker.stdout.readline() == "running\n", worker.stderr.read()
    workers[1].terminate()
    outputs = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [EXIT_PREEMPTED] * 2, outputs
    reports = [Path(f"{report}.{index}").read_text().split() for index in range(2)]
    step = int(reports[0][0])
    assert reports == [[str(step), "SIGTERM"]] * 2
    with Checkpointer(tmp_path / "run", read_only=True) as checkpointer:
        assert checkpointer.all_steps() == [step]
        restored = checkpointer.restore(abstract(host_state(1), mesh_of(1, 1)))
    assert_same_bits(restored.state, host_state(1))
    assert jax.process_count() == 1
