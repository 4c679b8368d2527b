"""A real Slurm on this machine, and jobs on it. Skipped, with the reason, where there is none."""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest
import runs

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
DAEMONS = ("munged", "slurmctld", "slurmd")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
SMALL = {
    **runs.ONE_LAYER,
    "SUMMARY_INTERVAL_STEPS": 50,
    "CHECKPOINT_EVERY_N_STEPS": 100,
    "LR_COS_WARMUP": 2,
    "LR_COS_DECAY_START": 3,
    "LR_COS_DECAY_END": 500,
    "MAX_STEPS": 500,
}
TWO_NODES = {"ICI_MESH_SHAPE": "[1,1,1]", "DCN_MESH_SHAPE": "[2,1,1]"}


def knobs(**changes) -> str:
    """Flags of a small config, as one word."""
    return " ".join(f"--fdl.{name}={value}" for name, value in (SMALL | changes).items())


class Slurm:
    """The Slurm in `folder`; its nodes are all this machine."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.environ = {
            name: text for name, text in os.environ.items() if not name.startswith("SLURM")
        }
        self.environ |= {
            "XLA_FLAGS": runs.QUICK_COMPILE,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": PATH,
            "PYTHON": sys.executable,
            "JAX_PLATFORMS": "cpu",
        }

    def call(self, *words, check=True, env=()) -> str:
        done = subprocess.run(
            words,
            env=self.environ | dict(env),
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=60,
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, script: str, workspace: pathlib.Path, *options, **env) -> str:
        """sbatch of a job file of scripts/; returns the number of the job."""
        env = {"BASE_WORKSPACE_DIR": str(workspace), **env}
        words = ["sbatch", "--parsable", f"--output={workspace}/job-%j.out", *options]
        return self.call(*words, f"scripts/{script}", env=env).strip()

    def field(self, job: str, name: str) -> str:
        match = re.search(rf"\b{name}=(\S+)", self.call("scontrol", "show", "job", job))
        return match[1] if match else ""

    def wait(self, job: str, *states: str, seconds: float = 200) -> str:
        """Waits for a state; other final ones fail, with the output of the job."""
        deadline = time.monotonic() + seconds
        final = {"COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT"}
        while (state := self.field(job, "JobState")) not in states:
            assert state not in final and time.monotonic() < deadline, self.story(job, state)
            time.sleep(0.2)
        return state

    def wait_for(self, job: str, condition, *, seconds: float = 200) -> None:
        """Waits until something is the case while the job waits or runs."""
        deadline, looked = time.monotonic() + seconds, 0.0
        while not condition():
            if time.monotonic() - looked > 1:
                looked, state = time.monotonic(), self.field(job, "JobState")
                running = state in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")
                assert running and looked < deadline, self.story(job, state)
            time.sleep(0.01)

    def wait_for_file(self, job: str, file: pathlib.Path) -> None:
        self.wait_for(job, file.exists)

    def wait_for_requeue(self, job: str, restarts: int = 1, seconds: float = 200) -> None:
        """Waits until the job is in the queue again."""
        deadline = time.monotonic() + seconds
        while (state := self.field(job, "JobState")) != "PENDING" or (
            int(self.field(job, "Restarts")) < restarts
        ):
            final = state in ("COMPLETED", "FAILED", "CANCELLED")
            assert not final and time.monotonic() < deadline, self.story(job, state)
            time.sleep(0.2)

    def release(self, job: str, restarts: int = 1) -> None:
        """A job that was sent back to the queue starts at once, not after Slurm's two minutes."""
        self.wait_for_requeue(job, restarts)
        time.sleep(2)  # the nodes refuse what was revoked in the same second
        self.call("scontrol", "update", f"JobId={job}", "StartTime=now")

    def story(self, job: str, state: str) -> str:
        """What to read when a job went wrong."""
        parts = [f"job {job} is {state}"]
        shown = re.search(r"StdOut=(.*)", self.call("scontrol", "show", "job", job))
        folder = pathlib.Path(shown[1]).parent
        for file in sorted([*folder.glob("*.out"), *folder.glob("**/output-*.txt")]):
            parts.append(f"== {file}\n" + file.read_text(errors="replace")[-2500:])
        for file in self.folder.glob("log/slurm*.log"):
            lines = file.read_text(errors="replace").splitlines()
            parts.append(f"== {file}\n" + "\n".join(lines[-12:]))
        return "\n".join(parts)

    def ranks(self, job: str) -> dict[int, int]:
        """rank -> process of main.py of a running job."""
        found = {}
        for folder in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (folder / "cmdline").read_bytes().split(b"\0")
                if not any(word.endswith(b"/main.py") for word in words) or b"bash" in words[0]:
                    continue
                pairs = (
                    pair.partition(b"=") for pair in (folder / "environ").read_bytes().split(b"\0")
                )
                variables = {name: value for name, _, value in pairs}
                if (
                    variables.get(b"SLURM_JOB_ID") == job.encode()
                    and variables.get(b"SLURM_CONF") == self.environ["SLURM_CONF"].encode()
                ):
                    found[int(variables[b"SLURM_PROCID"])] = int(folder.name)
        return found


@pytest.fixture
def slurm():
    """A Slurm of two nodes; it and all its jobs are gone afterwards."""
    missing = [name for name in DAEMONS if not shutil.which(name, path=PATH)]
    if missing:
        pytest.skip(f"{missing[0]} is not installed (scripts/slurm_loopback.sh --install)")
    if os.getuid() != 0:
        pytest.skip("only root can start the daemons of Slurm")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="sl-"))  # short: it holds a socket
    script = str(ROOT / "scripts/slurm_loopback.sh")
    words = ["bash", script, "start", str(folder), f"--owner={os.getpid()}"]
    started = subprocess.run(words, capture_output=True, text=True)
    try:
        assert started.returncode == 0, started.stderr
        yield Slurm(folder)
    finally:
        stopped = subprocess.run(
            ["bash", script, "stop", str(folder)], capture_output=True, text=True
        )
        deadline = time.monotonic() + 5
        while (left := _processes_of(folder)) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
        assert stopped.returncode == 0 and not left, f"left processes {left}: {stopped.stderr}"


def _processes_of(folder: pathlib.Path) -> list[int]:
    """Processes that know this Slurm, by command or environment, after it was stopped."""
    found, mark = [], str(folder).encode()
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            text = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
            if mark in text and int(process.name) != os.getpid():
                found.append(int(process.name))
    return found
