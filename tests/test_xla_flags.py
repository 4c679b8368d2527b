"""The check of XLA_FLAGS, against the XLA that is installed."""

import os
import subprocess
import sys

import numpy as np
import pytest
import runs

from paxlike.log.history import read_history
from paxlike.xla_flags import DETERMINISTIC, check_xla_flags, make_deterministic, nearest_flag


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--xla_force_host_platform_device_count=2",
        DETERMINISTIC,
        # GPU flags on a machine without a GPU, and quotes that XLA takes off itself.
        "--xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_enable_command_buffer=''",
    ],
)
def test_accepts_what_xla_accepts(flags):
    check_xla_flags(flags)


def test_names_the_unknown_flag_and_the_nearest_known_one():
    with pytest.raises(ValueError, match="not in jaxlib") as error:
        check_xla_flags("--xla_gpu_enable_latency_hiding_schedulr=true --xla_no_such_thing=1")
    message = str(error.value)
    assert (
        "--xla_gpu_enable_latency_hiding_schedulr"
        " (did you mean --xla_gpu_enable_latency_hiding_scheduler?)" in message
    )
    assert "--xla_no_such_thing (remove it)" in message
    assert "\n" not in message


def test_nearest_flag_suggests_nothing_far():
    assert nearest_flag("xla_gpu_graph_level") is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--xla_force_host_platform_device_count=two", "interpret value two"),
        ("--xla_gpu_enable_command_buffer=FUSIN", "Illegal value .* 'FUSIN'"),
        ("xla_gpu_enable_triton_gemm=false", "did not start with"),
    ],
)
def test_refuses_in_one_line_what_xla_cannot_read(flags, message):
    with pytest.raises(ValueError, match=message) as error:
        check_xla_flags(flags)
    assert "\n" not in str(error.value)


def test_command_ends_with_one_line_and_status_2():
    run = subprocess.run(
        [sys.executable, "-m", "paxlike.xla_flags"],
        env=os.environ | {"XLA_FLAGS": "--xla_no_such_thing=1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert run.stdout == ""
    assert len(run.stderr.splitlines()) == 1
    assert "--xla_no_such_thing" in run.stderr


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, DETERMINISTIC),
        ("--xla_a=1", f"--xla_a=1 {DETERMINISTIC}"),
        ("--xla_gpu_deterministic_ops", "--xla_gpu_deterministic_ops"),
        ("--xla_gpu_autotune_level=0", f"--xla_gpu_autotune_level=0 {DETERMINISTIC}"),
    ],
)
def test_deterministic_flags_are_added_once(given, expected):
    environ = {} if given is None else {"XLA_FLAGS": given}
    make_deterministic(environ)
    assert environ["XLA_FLAGS"] == expected
    make_deterministic(environ)
    others = {"NCCL_ALGO": "Ring", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
    assert environ == {"XLA_FLAGS": expected, **others}
    with pytest.raises(ValueError, match="DETERMINISTIC=True, but NVTE_ALLOW_NONDETERMINISTIC_A"):
        make_deterministic({"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1"})


def test_a_given_algorithm_of_collectives_stands():
    environ = {"NCCL_ALGO": "Tree"}
    make_deterministic(environ)
    assert environ["NCCL_ALGO"] == "Tree"


@pytest.mark.parametrize(
    "contrary",
    [
        "--xla_gpu_deterministic_ops=false",
        "--xla_gpu_exclude_nondeterministic_ops=0",
        "--xla_gpu_autotune_level=4",
    ],
)
def test_deterministic_and_the_contrary_is_refused(contrary):
    with pytest.raises(ValueError, match=f"DETERMINISTIC=True, but XLA_FLAGS has {contrary}") as no:
        make_deterministic({"XLA_FLAGS": f"{contrary} --xla_a=1"})
    assert "\n" not in str(no.value)


def test_two_deterministic_runs_are_the_same_to_the_bit(tmp_path):
    knobs = {"SYNTHETIC_RANDOM": True, "DETERMINISTIC": True, "ICI_MESH_SHAPE": "[1,1,1]"}
    knobs |= {"DCN_MESH_SHAPE": "[1,1,1]"}
    knobs |= {"DROPOUT_PROB": 0.1, "MAX_STEPS": 6, "FPROP_DTYPE": "bfloat16"}
    directories = [tmp_path / "one", tmp_path / "two"]
    for directory in directories:
        done = runs.run(directory, knobs, config="Synthetic126M")
        assert "tokens a step, deterministic" in done.stderr
        environment = read_history(directory).environment
        assert environment["deterministic"] is True
        assert DETERMINISTIC in environment["xla_flags"].split()
    one, two = map(runs.losses, directories)
    assert one == two and len(one) == 6 and len(set(one.values())) == 6
    ours, theirs = (runs.final_state(directory, step=6) for directory in directories)
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_a_deterministic_config_comes_too_late_where_jax_runs_already(tmp_path, monkeypatch):
    import jax
    from absl.testing import flagsaver

    import main

    jax.devices()
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    argv = ["main.py", "--fdl_config=Synthetic126M", "--fdl.DETERMINISTIC=True"]
    with (
        flagsaver.flagsaver(),
        pytest.raises(ValueError, match="DETERMINISTIC=True comes too late"),
    ):
        main.main([*argv, f"--job_log_dir={tmp_path}/run"])
    assert not (tmp_path / "run").exists()


def test_an_experiment_without_the_flags_is_refused_on_a_gpu(monkeypatch):
    import fiddle as fdl
    import jax

    from configs.gpt import Synthetic126M

    experiment = fdl.build(Synthetic126M(DETERMINISTIC=True).experiment())
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    with pytest.raises(ValueError, match=f"DETERMINISTIC=True needs XLA_FLAGS={DETERMINISTIC}"):
        experiment.on_these_devices()
