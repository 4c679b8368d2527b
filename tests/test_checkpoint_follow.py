"""Following a running job, and being asked to stop."""

import os
import signal
import threading

import jax.numpy as jnp
import pytest

from paxlike.checkpoint import (
    EXIT_PREEMPTED,
    Checkpointer,
    CheckpointOptions,
    TerminationSignal,
    finished_step,
    mark_finished,
    wait_for_new_checkpoint,
)

STATE = {"w": jnp.zeros(3)}


def train(folder, *steps):
    with Checkpointer(folder, CheckpointOptions(every_n_steps=1)) as checkpointer:
        for step in steps:
            checkpointer.save(step, STATE, data={}, config="{}", wait=True)


def test_follows_a_run_to_its_end(tmp_path):
    lines, may_save = [], {step: threading.Event() for step in (1, 2, 3)}

    def run():
        with Checkpointer(tmp_path, CheckpointOptions(every_n_steps=1)) as checkpointer:
            for step, event in may_save.items():
                assert event.wait(60)
                checkpointer.save(step, STATE, data={}, config="{}", wait=True)
        mark_finished(tmp_path, 3)

    thread = threading.Thread(target=run)
    thread.start()
    steps = wait_for_new_checkpoint(
        tmp_path, timeout_seconds=60, poll_seconds=0.01, say=lines.append
    )
    for step, event in may_save.items():
        event.set()
        assert next(steps) == step
    thread.join()
    assert list(steps) == []
    assert lines[-1] == f"{tmp_path} finished at step 3: no more checkpoints to wait for"


def test_the_newest_is_next_and_after_step_is_heeded(tmp_path):
    train(tmp_path, 1, 2, 3)
    mark_finished(tmp_path, 3)
    every = {"timeout_seconds": 0, "poll_seconds": 0.01, "say": lambda line: None}
    assert list(wait_for_new_checkpoint(tmp_path, **every)) == [3]
    assert list(wait_for_new_checkpoint(tmp_path, after_step=2, **every)) == [3]
    assert list(wait_for_new_checkpoint(tmp_path, after_step=3, **every)) == []


def test_says_that_it_waits_and_gives_up(tmp_path):
    train(tmp_path, 1)
    lines = []
    steps = wait_for_new_checkpoint(
        tmp_path, after_step=1, timeout_seconds=0.05, poll_seconds=0.01, say=lines.append
    )
    assert list(steps) == []
    folder = tmp_path / "checkpoints"
    assert lines == [
        f"waiting for a new checkpoint after step 1 in {folder} (at most 0.05 s)",
        f"no new checkpoint after step 1 in {folder} for 0.05 s: waiting no longer",
    ]
    steps = wait_for_new_checkpoint(tmp_path / "typo", timeout_seconds=0, say=lines.append)
    assert list(steps) == []
    assert lines[-1].startswith("no new checkpoint in ")


def test_finished_is_taken_back_when_the_run_goes_on(tmp_path):
    assert finished_step(tmp_path) is None
    train(tmp_path, 1)
    mark_finished(tmp_path, 1)
    assert finished_step(tmp_path) == 1
    train(tmp_path, 2)
    assert finished_step(tmp_path) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_sets_a_flag(number, capfd):
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with TerminationSignal() as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.agreed()
        assert stop.received == signal.Signals(number).name
        assert stop.agreed()
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    assert capfd.readouterr().err.startswith(f"{stop.received}: saving a checkpoint and stopping")


def test_a_second_interrupt_stops_at_once():
    with TerminationSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_termination_options():
    assert EXIT_PREEMPTED == 83
    with pytest.raises(ValueError, match="every_n_steps is 0: it must be at least 1"):
        TerminationSignal(every_n_steps=0)
