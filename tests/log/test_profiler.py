"""The profiler captures the chosen steps and never ends a run."""

import jax
import jax.numpy as jnp
import pytest

from paxlike.log.history import read_history
from paxlike.log.profiler import Profiler
from paxlike.log.run_log import RunLog


def run_steps(profiler, num_steps, first=1):
    double = jax.jit(lambda x: x * 2)
    x = jnp.ones(3)
    for step in range(first, num_steps + 1):
        profiler.before_step(step)
        x = double(x)
        profiler.after_step(step, x)
    profiler.close()


def test_captures_the_chosen_steps(tmp_path):
    with RunLog(tmp_path, num_steps=6, progress=False) as log:
        run_steps(Profiler(tmp_path / "profile", 3, num_steps=2, log=log), 6)
    (event,) = read_history(tmp_path).events
    assert event["event"] == "profile"
    assert (event["first_step"], event["step"]) == (3, 4)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_captures_nothing_unless_asked(tmp_path):
    run_steps(Profiler(tmp_path / "profile"), 3)
    assert not (tmp_path / "profile").exists()


def test_a_run_that_ends_inside_still_has_its_trace(tmp_path):
    run_steps(Profiler(tmp_path / "profile", 2, num_steps=10), 3)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_profiler_that_fails_is_one_warning(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with RunLog(tmp_path, num_steps=4, progress=True) as log:
        run_steps(Profiler(tmp_path / "file" / "profile", 2, log=log), 4)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "profiler" in line]
    assert len(warnings) == 1
    assert "did not start at step 2: NotADirectoryError" in warnings[0]


def test_a_step_that_never_comes_is_told(tmp_path):
    with RunLog(tmp_path, num_steps=4, progress=False) as log:
        run_steps(Profiler(tmp_path / "profile", 2, log=log), 6, first=4)
    (event,) = read_history(tmp_path).events
    assert event["message"] == "nothing was profiled: step 2 was not among the steps of this start"


def test_steps_count_from_one(tmp_path):
    with pytest.raises(ValueError, match="cannot profile 2 steps from step 0: steps count from 1"):
        Profiler(tmp_path, 0)
    with pytest.raises(ValueError, match="cannot profile 0 steps"):
        Profiler(tmp_path, 3, num_steps=0)
