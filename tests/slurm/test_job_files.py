"""The job files on a real Slurm of two "nodes": to the end, signalled, killed, on fewer nodes."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from runs import QUICK_COMPILE, final_state, losses

from .conftest import ROOT, TWO_NODES, knobs

pytestmark = pytest.mark.slow
LAST = 500


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> pathlib.Path:
    """The run in one process of two devices."""
    folder = tmp_path_factory.mktemp("one_process")
    environ = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    environ["XLA_FLAGS"] = QUICK_COMPILE
    flags = knobs(ICI_MESH_SHAPE="[2,1,1]", DCN_MESH_SHAPE="[1,1,1]", FPROP_DTYPE="float32").split()
    words = [sys.executable, "main.py", "--fdl_config=Synthetic126M", f"--job_log_dir={folder}"]
    subprocess.run([*words, *flags], env=environ, cwd=ROOT, check=True, capture_output=True)
    return folder


def assert_same(run: pathlib.Path, reference: pathlib.Path) -> None:
    """The same losses, and the same bits at the end."""
    assert losses(run)[LAST] == losses(reference)[LAST]
    found, wanted = final_state(run, LAST), final_state(reference, LAST)
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


def submit_base(slurm, workspace, *options, **env) -> str:
    env = {"PREC": "float32", "ADDITIONAL_ARGS": knobs(**TWO_NODES), "LOG_DIR_LOCAL": "run"} | env
    options = ("--nodes=2", "--ntasks-per-node=1", *options)
    return slurm.submit("launch_base_script.sub", workspace, *options, **env)


def test_a_signal_saves_and_the_job_goes_on_in_the_queue(slurm, tmp_path, reference):
    workspace = tmp_path / "it's a workspace"
    workspace.mkdir()
    job = submit_base(slurm, workspace)
    slurm.wait_for_file(job, workspace / "run/checkpoints/checkpoint_00000100")
    slurm.call("scancel", "--signal=TERM", job)
    slurm.release(job)
    assert slurm.field(job, "Restarts") == "1"
    slurm.wait(job, "COMPLETED")
    output = (workspace / f"output/output-{job}-0-0.txt").read_text()
    assert "stopped at step" in output
    assert "process 0 of 2 on 2 nodes (Slurm)" in output
    # Both "nodes" have one name.
    assert "check: 1 node, 2 processes" in output and "axis data (2) crosses processes" in output
    assert not (workspace / "run/restarts.txt").exists()
    assert_same(workspace / "run", reference)


def test_a_job_that_is_killed_at_the_worst_moments_loses_nothing(slurm, tmp_path, reference):
    """Before the first checkpoint, while one is written, while it is read; then on one node, to the same bits."""
    run, job = tmp_path / "run", submit_base(slurm, tmp_path)
    output = tmp_path / f"output/output-{job}-0-0.txt"

    def kill(rank: int, restarts: int, moment) -> None:
        slurm.wait_for(job, moment)
        os.kill(slurm.ranks(job)[rank], signal.SIGKILL)
        slurm.wait_for_requeue(job, restarts, seconds=90)
        assert slurm.ranks(job) == {}

    kill(1, 1, lambda: output.exists() and "compiling" in output.read_text())
    assert not list(run.glob("checkpoints/checkpoint_*"))
    slurm.release(job)
    kill(0, 2, lambda: any(run.glob("checkpoints/checkpoint_00000200*")))
    slurm.release(job, 2)
    kill(1, 3, lambda: "reading the newest checkpoint" in output.read_text())
    slurm.call("scancel", job)
    slurm.wait(job, "CANCELLED")
    more = knobs(ICI_MESH_SHAPE="[2,1,1]", DCN_MESH_SHAPE="[1,1,1]")
    job = submit_base(slurm, tmp_path, "--nodes=1", ADDITIONAL_ARGS=more, JAX_NUM_CPU_DEVICES="2")
    slurm.wait(job, "COMPLETED")
    told = (tmp_path / f"output/output-{job}-0-0.txt").read_text()
    assert re.search(r"going on from the checkpoint of step [12]00\b", told)
    assert_same(run, reference)


def test_a_frozen_process_is_found_and_the_job_goes_back_to_the_queue(slurm, tmp_path):
    job = submit_base(
        slurm, tmp_path, ADDITIONAL_ARGS=knobs(**TWO_NODES, HANG_MIN_SECONDS=10, MAX_STEPS=100000)
    )
    slurm.wait_for_file(job, tmp_path / "run/checkpoints/checkpoint_00000100")
    os.kill(slurm.ranks(job)[1], signal.SIGSTOP)
    slurm.wait_for_requeue(job)
    assert slurm.ranks(job) == {}
    failure = (tmp_path / "run/processes/failure.txt").read_text()
    assert "process 1" in failure
    # 84 or 85 of those that found it; 137 where it was killed for it, which srun puts first.
    assert re.search(r"status (84|85|137) at checkpoint \d+: back", slurm.story(job, ""))
    slurm.call("scancel", job)


def script_that(tmp_path, text: str) -> dict[str, str]:
    (tmp_path / "script.sh").write_text(text)
    return {"BASE_SCRIPT": "script.sh"}


def test_a_job_that_makes_no_progress_is_not_started_for_ever(slurm, tmp_path):
    env = script_that(tmp_path, f"echo start >> '{tmp_path}/starts'\nexit 5\n")
    job = submit_base(slurm, tmp_path, MAX_RESTARTS="1", **env)
    slurm.release(job)
    slurm.wait(job, "FAILED")
    assert (tmp_path / "starts").read_text().count("start") == 4  # two tasks, two starts
    story = (tmp_path / f"job-{job}.out").read_text()
    assert "not started again: 1 restarts brought no checkpoint beyond step -1" in story
    assert slurm.field(job, "ExitCode") == "5:0"


def test_a_mistake_and_a_cancelled_job_end_for_good(slurm, tmp_path):
    env = script_that(tmp_path, f"touch '{tmp_path}/started'\nsleep ${{1#--}}; exit 2\n")
    mistake = submit_base(slurm, tmp_path, "--job-name=a", CONFIG="0.1", **env)
    slurm.wait(mistake, "FAILED")
    assert slurm.field(mistake, "Restarts") == "0"
    (tmp_path / "started").unlink()
    cancelled = submit_base(slurm, tmp_path, "--job-name=b", CONFIG="50", **env)
    slurm.wait_for_file(cancelled, tmp_path / "started")
    slurm.call("scancel", cancelled)
    slurm.wait(cancelled, "CANCELLED")
    time.sleep(1)
    assert slurm.field(cancelled, "JobState") == "CANCELLED"
    assert slurm.field(cancelled, "Restarts") == "0"
