"""Makes and submits a job from a config: python -m paxlike.launch --help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from paxlike.arguments import ArgumentParser
from paxlike.launch import kubernetes, local, slurm
from paxlike.launch.job import DATA_SETS, ROOT, STAGES, Job, Stage, check_mesh, shell

_PASSED_ON = ("fdl.", "fiddler", "tfds_data_dir", "eval_on_test")


def parser() -> ArgumentParser:
    """The command line; what it does not know goes to main.py, if main.py knows it."""
    made = ArgumentParser(
        prog="python -m paxlike.launch",
        description="Runs the stages of a config in order, as jobs of Slurm that wait for one another, on this "
        "machine, or as a JobSet of Kubernetes. A stage that is done is left out, so the same command goes on where "
        "it was. --fdl.NAME=VALUE, --fiddler, --tfds_data_dir and --eval_on_test are those of main.py.",
    )
    add = made.add_argument
    add("--fdl_config", required=True, metavar="NAME", help="the config")
    add("--job_log_dir", required=True, metavar="DIR", help="of the run; all nodes see it")
    add("--where", choices=["slurm", "local", "kubernetes"], default="slurm")
    add("--stages", default="train", help=f"some of {','.join(STAGES)} (train)")
    add(
        "--prepare",
        metavar="COMMAND",
        help=f"stage prepare: {', '.join(DATA_SETS)}, or a command of bash",
    )
    add("--eval_config", metavar="NAME", help="stage evaluate: another config, as Lambada126M")
    add("--export", metavar="FOLDER", help="stage export: a new folder of Hugging Face")
    add("--nodes", type=int, default=1)
    add("--gpus_per_node", type=int, default=8)
    add("--processes_per_node", type=int, help="gpus_per_node, or 1 (default: gpus_per_node)")
    add(
        "--request_gpus",
        choices=["gpus-per-node", "gres", "none"],
        default="gpus-per-node",
        help="how a cluster counts GPUs; none where whole nodes are given out",
    )
    add("--time", default="04:00:00", help="time limit of one job; the run goes on in the next")
    add("--partition")
    add("--account")
    add("--qos")
    add("--name", help="of the job (CONFIG-DIR)")
    add(
        "--sbatch",
        action="append",
        default=[],
        metavar="--NAME=VALUE",
        help="another option of sbatch",
    )
    add("--after", action="append", default=[], metavar="afterok:JOB", help="wait for another job")
    add(
        "--chain",
        type=int,
        default=1,
        help="training as so many jobs, where jobs may not be requeued",
    )
    add("--container", metavar="IMAGE", help="for pyxis, or Kubernetes; without it: this Python")
    add("--mount", action="append", default=[], metavar="SOURCE:TARGET", help="in the container")
    add(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="NAME alone: as it is set here",
    )
    add("--signal_seconds", type=int, default=300, help="before the time limit: the run saves")
    add("--max_restarts", type=int, default=3, help="starts that bring no new checkpoint")
    add("--dry_run", action="store_true", help="print what would be submitted")
    add(
        "--no_check",
        action="store_true",
        help="do not ask main.py whether config and mesh are right",
    )
    return made


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code of the process."""
    flags, rest = parser().parse_known_args(arguments)
    for word in rest:
        _check_passed_on(word)
    job = Job(
        config=flags.fdl_config,
        job_log_dir=flags.job_log_dir,
        arguments=tuple(rest),
        stages=tuple(name.strip() for name in flags.stages.split(",") if name.strip()),
        prepare=flags.prepare,
        eval_config=flags.eval_config,
        export=None if flags.export is None else os.path.abspath(flags.export),
        name=flags.name,
        nodes=flags.nodes,
        gpus_per_node=flags.gpus_per_node,
        processes_per_node=flags.processes_per_node,
        request_gpus=flags.request_gpus,
        time=flags.time,
        partition=flags.partition,
        account=flags.account,
        qos=flags.qos,
        sbatch=tuple(flags.sbatch),
        after=tuple(flags.after),
        chain=flags.chain,
        container=flags.container,
        mounts=tuple(flags.mount),
        env=tuple(flags.env),
        python=sys.executable,
        signal_seconds=flags.signal_seconds,
        max_restarts=flags.max_restarts,
    )
    if flags.where == "local" and job.nodes > 1:
        raise ValueError(f"--where=local is one machine, not --nodes={job.nodes}")
    if flags.where == "local" and job.container:
        raise ValueError("--container has no effect with --where=local")
    if not flags.no_check:
        devices = None if flags.where == "local" else job.num_devices
        check(job, devices)
    stages = job.list_stages()
    waiting = [stage for stage in stages if not stage.is_done(job.job_log_dir)]
    for stage in stages:
        if stage not in waiting:
            print(f"{stage.name}: done before")
    if flags.where == "kubernetes":  # its pods see what is done
        print(json.dumps(kubernetes.manifest(job, stages), indent=2))
        return 0
    if flags.where == "local":
        if flags.dry_run:
            print("\n".join(shell(job.command(stage)) for stage in waiting))
            return 0
        return local.run(job, waiting)
    if flags.dry_run:
        _show(job, waiting)
        return 0
    for name, number in slurm.submit(job, waiting).items():
        print(f"{name}: job {number}")
    return 0


def check(job: Job, num_devices: int | None) -> None:
    """Asks main.py whether the configs are right and fit so many devices; raises its line as ValueError."""
    knobs = [word for word in job.arguments if word.startswith(("--fdl", "--fiddler"))]
    last = job.eval_config or job.config
    given = {name: value for name, value in job.environment.items() if value is not None}
    environ = dict(os.environ) | given | {"JAX_PLATFORMS": "cpu"}  # it takes no device
    for config in dict.fromkeys([job.config, last]):
        words = [
            job.python,
            str(ROOT / "main.py"),
            f"--fdl_config={config}",
            *knobs,
            "--mode=check",
        ]
        if num_devices is not None:
            words.append(f"--devices={num_devices}")
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environ)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            raise ValueError(lines[-1][len("error: ") :] if lines else done.stderr.strip())
        found = json.loads(done.stdout.splitlines()[-1])
        if num_devices is not None:
            check_mesh(job, found)
        if config == job.config and "train" in job.stages and not found["trains"]:
            raise ValueError(f"{config} has no training data: leave train out of --stages")
        if config == last and "evaluate" in job.stages and not found["eval_sets"]:
            raise ValueError(
                f"{config} has no held-out set for the stage evaluate: name some with --fdl.EVAL_SETS, or another "
                "config with --eval_config"
            )


def _show(job: Job, stages: list[Stage]) -> None:
    for name, stage, kind in slurm.submissions(job, stages):
        file = Path(job.job_log_dir).absolute() / "launch" / f"{stage.name}.sub"
        first = stage is stages[0] and kind == "afterok"
        before = list(job.after) if first else [f"{kind}:JOB_BEFORE"]
        before += ["singleton"] if kind == "afterok" else []
        print(f"# {name}: {shell(slurm.command(job, file, before))}")
        if kind == "afterok":
            print(slurm.script(job, stage))


def _check_passed_on(word: str) -> None:
    name = word.lstrip("-").partition("=")[0]
    if word.startswith("--") and (name.startswith(_PASSED_ON) or name == "noeval_on_test"):
        if "=" not in word and name.startswith("fdl."):
            raise ValueError(f"{word} needs a value: {word}=...")
        return
    raise ValueError(parser().unknown(word))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
