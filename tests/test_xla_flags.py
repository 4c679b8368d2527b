"""The check of XLA_FLAGS, against the XLA that is installed."""

import os
import subprocess
import sys

import pytest

from paxlike.xla_flags import check_xla_flags, nearest_flag


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--xla_force_host_platform_device_count=2",
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
