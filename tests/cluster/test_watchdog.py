"""When a run counts as hung, and how one that is alone ends."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paxlike.cluster import EXIT_HUNG, HangOptions, Watchdog

ROOT = Path(__file__).resolve().parents[2]


def test_limits_follow_the_usual_step_and_what_is_done(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    dog = Watchdog(HangOptions(factor=10, min_seconds=60, busy_minutes=30), tmp_path, None)
    assert dog.limit_seconds() == 1800  # the start, with its first step
    for step, at in enumerate((100, 120, 140, 160, 161), start=1):
        now[0] = at
        dog.step(step)
    assert dog.usual_step_seconds() == 20  # neither the first step nor the odd one
    assert dog.limit_seconds() == 200
    with dog.busy("evaluation"):
        assert dog.limit_seconds() == 1800
        now[0] = 5000
    now[0] = 5001
    dog.step(6)
    assert dog.usual_step_seconds() == 20  # the evaluation is no part of a step


def test_min_seconds_for_short_steps(tmp_path):
    dog = Watchdog(HangOptions(factor=10, min_seconds=60), tmp_path, None)
    for step in range(6):
        dog.step(step)
    assert dog.limit_seconds() == 60


@pytest.mark.parametrize("wrong", [{"factor": -1}, {"min_seconds": 0}, {"busy_minutes": 0}])
def test_limits_that_cannot_be(wrong, tmp_path):
    with pytest.raises(ValueError, match="HANG_FACTOR=.*HANG_MIN_SECONDS=.*HANG_BUSY_MINUTES="):
        Watchdog(HangOptions(**wrong), tmp_path, None)


def test_a_process_alone_writes_its_stacks_and_ends(tmp_path):
    program = f"""
import time
from paxlike.cluster import HangOptions, Watchdog
def stuck_here():
    time.sleep(100)
with Watchdog(HangOptions(factor=1, min_seconds=0.4), {str(tmp_path)!r}, None) as dog:
    dog.step(1)
    dog.step(2)
    stuck_here()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == EXIT_HUNG, done.stderr
    text = (tmp_path / "processes" / "failure.txt").read_text()
    assert "nothing has moved for" in text and "in stuck_here" in text
    assert "after step 2" in done.stderr and str(tmp_path) in done.stderr


def test_switched_off_it_has_no_thread(tmp_path):
    with Watchdog(HangOptions(factor=0), tmp_path, None) as dog:
        assert dog._thread is None
