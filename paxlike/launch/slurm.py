"""Job files for Slurm, one for each stage, and their submission as a chain."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

from paxlike.launch.job import ROOT, Job, Stage, shell


def script(job: Job, stage: Stage) -> str:
    """The job file of a stage; everything that a user gave is quoted, or was checked by `Job`."""
    folder = Path(job.job_log_dir).absolute()
    nodes = job.nodes if stage.parallel else 1
    tasks = job.tasks_per_node if stage.parallel else 1
    gpus = {
        "gpus-per-node": f"--gpus-per-node={job.gpus_per_node}",
        "gres": f"--gres=gpu:{job.gpus_per_node}",
        "none": None,
    }[job.request_gpus]
    options = [
        f"--job-name={job.title}-{stage.name}",
        f"--nodes={nodes}",
        f"--ntasks-per-node={tasks}",
        gpus if stage.parallel else None,
        f"--time={job.time}",
        job.partition and f"--partition={job.partition}",
        job.account and f"--account={job.account}",
        job.qos and f"--qos={job.qos}",
        "--exclusive" if stage.parallel else None,
        "--mem=0" if stage.parallel else None,
        "--overcommit",
        "--requeue",
        "--open-mode=append",
        f"--signal=TERM@{job.signal_seconds}",
        "--kill-on-invalid-dep=yes",
        *job.sbatch,
    ]
    lines = ["#!/usr/bin/env bash", f"# {stage.name} of {job.title}, by python -m paxlike.launch"]
    lines += [f"#SBATCH {option}" for option in options if option]
    lines += ["set -euo pipefail", f"source {shlex.quote(str(ROOT / 'scripts/lib/slurm.sh'))}", ""]
    for name, value in job.environment.items():
        if value is not None:
            lines.append(f"export {name}={shlex.quote(value)}")
    if not job.container:
        lines.append(f"export PYTHON={shlex.quote(job.python)}")
    lines.append(f"OUTPUT_DIR={shlex.quote(str(folder / 'output'))}")
    lines.append(f"MAX_RESTARTS={job.max_restarts}")
    if job.chain > 1 and stage.name == "train":
        lines.append("REQUEUE=0 # the next job of the chain goes on")
    if job.container:
        lines.append(f"CONTAINER={shlex.quote(job.container)}")
        mounts = [f"{folder}:{folder}", *job.mounts]
        lines.append(f"mounts=({shell(mounts)})")
    lines += [
        "",
        f'say "{stage.name} on ${{SLURM_JOB_NUM_NODES:-1}} nodes ($SLURM_JOB_NODELIST), restart '
        '${SLURM_RESTART_COUNT:-0}"',
        "status=0",
        f"run_step {shell(job.command(stage))} || status=$?",
        f'finish "$status" {shlex.quote(str(folder))}',
    ]
    return "\n".join(lines) + "\n"


def submissions(job: Job, stages: list[Stage]) -> Iterator[tuple[str, Stage, str]]:
    """(name, stage, dependency kind on the one before) of every job, in order.

    A chain is a number of training jobs, each of which starts when the one before has ended in any way: one that finds
    the run complete ends at once. A stage needs the one before it to have succeeded.
    """
    for stage in stages:
        count = job.chain if stage.name == "train" else 1
        for number in range(count):
            name = stage.name if count == 1 else f"{stage.name}_{number + 1}"
            yield name, stage, "afterok" if number == 0 else "afterany"


def command(job: Job, file: Path, dependencies: list[str]) -> list[str]:
    """The call of sbatch. Paths are arguments: a #SBATCH line cannot quote all of them."""
    folder = Path(job.job_log_dir).absolute()
    output = str(folder).replace("%", "%%") + "/output/%x-%j.out"
    return [
        "sbatch",
        "--parsable",
        f"--chdir={folder}",
        f"--output={output}",
        *([f"--dependency={','.join(dependencies)}"] if dependencies else []),
        str(file),
    ]


def submit(job: Job, stages: list[Stage]) -> dict[str, str]:
    """Writes the job files and submits them; returns name -> Slurm's number.

    Raises ValueError, in one line, where sbatch refuses. What was submitted before then stays.
    """
    folder = Path(job.job_log_dir).absolute() / "launch"
    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent / "output").mkdir(exist_ok=True)
    numbers: dict[str, str] = {}
    for name, stage, kind in submissions(job, stages):
        file = folder / f"{stage.name}.sub"
        file.write_text(script(job, stage))
        file.chmod(0o700)
        last = list(numbers.values())[-1:]
        dependencies = [f"{kind}:{number}" for number in last] if last else list(job.after)
        # Another job of this run would write into the same folder.
        dependencies += ["singleton"] if kind == "afterok" else []
        numbers[name] = _sbatch(command(job, file, dependencies))
        (folder / "jobs.json").write_text(json.dumps(numbers, indent=1) + "\n")
    return numbers


def _sbatch(words: list[str]) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise ValueError(
            "there is no sbatch here: submit from a login node of Slurm, or take --where=local"
        ) from None
    if done.returncode:
        raise ValueError(f"sbatch refused {words[-1]}: {' '.join(done.stderr.split())}")
    return done.stdout.strip().split(";")[0]
