"""Real processes on this machine: one dies, freezes, fails or sleeps, and all end with its name."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paxlike.cluster import EXIT_HUNG, EXIT_LOST

WORKER = Path(__file__).with_name("worker.py")
pytestmark = pytest.mark.slow


@contextlib.contextmanager
def started(program, folder, *, count=2):
    """The processes of a program; none is left behind."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    found = [
        subprocess.Popen(
            [sys.executable, "-u", WORKER, program, address, str(count), str(index), folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(WORKER.parents[2])},
        )
        for index in range(count)
    ]
    try:
        yield found
    finally:
        for process in found:
            process.kill()
            process.wait()
            process.stdout.close()


def wait_until_running(processes, folder):
    deadline = time.monotonic() + 120
    while not all((folder / f"running_{n}").exists() for n in range(len(processes))):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)


def ends(process):
    """(exit code, what it printed)."""
    output = process.communicate(timeout=100)[0]
    return process.returncode, output


def failure(folder):
    return (folder / "processes" / "failure.txt").read_text()


def test_a_killed_process_is_named_and_the_other_ends(tmp_path):
    with started("run", tmp_path) as both:
        wait_until_running(both, tmp_path)
        both[1].kill()
        code, output = ends(both[0])
    assert code == EXIT_LOST
    lines = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and f"pid {both[1].pid}) died; see " in lines[0]
    assert "Traceback" not in output
    text = failure(tmp_path)
    assert f"process 1 (host {socket.gethostname()}, pid {both[1].pid}) died" in text
    assert "process 1 says hello" in text.split("last lines of process 1:")[1]
    assert "process 1 says hello" in output  # its last words, on the terminal of process 0
    log = (tmp_path / "processes/rank_00000.log").read_text()
    assert "process 0 says hello" in log and "== stacks: roll call" in log


def test_process_0_takes_the_service_with_it(tmp_path):
    with started("run", tmp_path) as both:
        wait_until_running(both, tmp_path)
        both[0].kill()
        code, output = ends(both[1])
    assert code == EXIT_LOST
    line = [line for line in output.splitlines() if line.startswith("error:")][-1]
    assert f"process 0 (host {socket.gethostname()}, pid {both[0].pid}) died" in line
    assert "process 0 says hello" in failure(tmp_path)


def test_a_frozen_process_is_found_by_the_watchdog_named_and_ended(tmp_path):
    with started("run", tmp_path) as both:
        wait_until_running(both, tmp_path)
        both[1].send_signal(signal.SIGSTOP)
        code, output = ends(both[0])
        assert code == EXIT_HUNG
        assert ends(both[1])[0] == -signal.SIGKILL  # it would have stayed
    line = [line for line in output.splitlines() if line.startswith("error:")][-1]
    assert "nothing has moved for " in line
    assert "process 1" in line and "is frozen (stopped by a signal) and does not answer" in line
    assert "  1 (" in failure(tmp_path) and "): stopped" in failure(tmp_path)


@pytest.mark.parametrize("frozen", [0, 1])
def test_on_another_machine_silence_tells(tmp_path, frozen):
    with started("run_far_apart", tmp_path) as both:
        wait_until_running(both, tmp_path)
        both[frozen].send_signal(signal.SIGSTOP)
        code, output = ends(both[1 - frozen])
    assert code == EXIT_LOST
    line = [line for line in output.splitlines() if line.startswith("error:")][-1]
    how = "is dead or out of reach (no answer for 3 s)", "is dead or frozen: it does not answer"
    assert f"process {frozen} (host " in line and how[frozen] in line
    assert f"process {frozen} says hello" in failure(tmp_path)


def test_a_process_that_freezes_while_busy_is_left_to_the_library_below(tmp_path):
    with started("run_busy", tmp_path) as both:
        wait_until_running(both, tmp_path)
        time.sleep(1)
        both[1].send_signal(signal.SIGSTOP)
        code, output = ends(both[0])
    assert code == EXIT_LOST
    line = [line for line in output.splitlines() if line.startswith("error:")][-1]
    assert "process 1 (host " in line and "is frozen (stopped by a signal)" in line
    assert "process 1 says hello" in failure(tmp_path)


def test_an_error_of_one_process_ends_all_and_is_told_once(tmp_path):
    with started("fail", tmp_path, count=3) as three:
        codes, outputs = zip(*map(ends, three), strict=True)
    assert codes == (EXIT_LOST, EXIT_LOST, 1)
    assert "RuntimeError: the disk of the moon is full" in outputs[2] and "Traceback" in outputs[2]
    for output in outputs[:2]:
        assert "failed: RuntimeError: the disk of the moon is full; see " in output
        assert output.count("error: process 2") == 1
    assert "the disk of the moon is full" in failure(tmp_path)


def test_one_that_has_ended_well_waits_for_the_others(tmp_path):
    with started("late", tmp_path) as both:
        codes, outputs = zip(*map(ends, both), strict=True)
    assert codes == (EXIT_LOST, 1)
    assert "failed: RuntimeError: the last one fails; see " in outputs[0]


def test_a_hang_in_which_all_answer_shows_where_each_is(tmp_path):
    with started("sleep", tmp_path) as both:
        codes, outputs = zip(*map(ends, both), strict=True)
    assert codes == (EXIT_HUNG, EXIT_HUNG)
    assert "all 2 processes answer" in outputs[0]
    text = failure(tmp_path)
    assert "  0 (" in text and "share (processes.py:" in text
    for rank in (0, 1):
        assert "== stacks: " in (tmp_path / f"processes/rank_{rank:05d}.log").read_text()
    assert "loop" in (tmp_path / "processes/rank_00001.log").read_text().split("== stacks")[1]


def test_the_odd_process_is_named_in_all(tmp_path):
    (tmp_path / "file").write_text("")
    with started("compare", tmp_path) as both:
        for process in both:
            code, output = ends(process)
            assert code == 0, output
    first, second = (json.loads((tmp_path / f"seen_{n}.json").read_text()) for n in (0, 1))
    assert {**first, "folder": ""} == {**second, "folder": ""}
    assert first["alike"].startswith("1 node, 2 processes, ")
    assert "process 1 (host" in first["config"] and "config whose digest is" in first["config"]
    assert first["jaxlib"].startswith("the processes differ: process 0 (host ")
    assert first["jaxlib"].endswith("has 0.0.1") and " has jaxlib " in first["jaxlib"]
    for seen in (first, second):
        assert "is not the same folder in process 1 as in process 0" in seen["folder"]
    assert first["unwritable"].startswith("process 1 cannot write in ")
    assert first["left"] == []
