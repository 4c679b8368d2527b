"""A run as stages in order, where it shall run, and what is wrong with that: before anything is submitted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
STAGES = ("prepare", "train", "evaluate", "export")
DATA_SETS = ("the_pile", "boolq", "lambada")  # scripts/download_*.py
SECRET = re.compile(r"KEY|TOKEN|PASS|SECRET|CREDENTIAL|AUTH", re.IGNORECASE)
_WORD = re.compile(r"[\w.,:/@%+=\[\]-]+")
_NAME = re.compile(r"[A-Za-z_]\w*")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of a job.

    Attributes:
      name: one of `STAGES`.
      command: `main.py` and its arguments, or a program.
      parallel: every process of the job takes part; else one process.
      key: changes with this command and those before it. The stage is done where `stages/NAME.done` holds it.
    """

    name: str
    command: tuple[str, ...]
    parallel: bool
    key: str

    def is_done(self, job_log_dir: str) -> bool:
        """Whether it ran to its end, by the mark that scripts/run_stage.sh leaves."""
        mark = Path(job_log_dir) / "stages" / f"{self.name}.done"
        return mark.is_file() and mark.read_text() == self.key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What a person asks of `python -m paxlike.launch`; see its --help.

    Raises ValueError, in one line, for what cannot be written into a job file, or fits nowhere.
    """

    config: str
    job_log_dir: str
    arguments: tuple[str, ...] = ()  # of main.py: --fdl.*, --fiddler, ...
    stages: tuple[str, ...] = ("train",)
    prepare: str | None = None
    eval_config: str | None = None
    export: str | None = None
    name: str | None = None
    nodes: int = 1
    gpus_per_node: int = 8
    processes_per_node: int | None = None
    request_gpus: str = "gpus-per-node"
    time: str = "04:00:00"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    sbatch: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    chain: int = 1
    container: str | None = None
    mounts: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    python: str = "python3"
    signal_seconds: int = 300
    max_restarts: int = 3

    def __post_init__(self):
        for name in self.stages:
            if name not in STAGES:
                raise ValueError(
                    f"--stages: there is no stage {name!r}; there are {', '.join(STAGES)}"
                )
        if not self.stages:
            raise ValueError(f"--stages is empty; there are {', '.join(STAGES)}")
        if list(self.stages) != sorted(set(self.stages), key=STAGES.index):
            raise ValueError(
                f"--stages={','.join(self.stages)}: their order is {', '.join(STAGES)}"
            )
        for stage, flag, value in (
            ("prepare", "--prepare=COMMAND", self.prepare),
            ("export", "--export=FOLDER", self.export),
        ):
            if stage in self.stages and value is None:
                raise ValueError(f"stage {stage} needs {flag}")
            if stage not in self.stages and value is not None:
                raise ValueError(f"{flag} has no effect without the stage {stage} in --stages")
        if self.eval_config is not None and "evaluate" not in self.stages:
            raise ValueError("--eval_config has no effect without the stage evaluate in --stages")
        for flag in ("nodes", "gpus_per_node", "chain", "max_restarts", "signal_seconds"):
            if getattr(self, flag) < (0 if flag == "max_restarts" else 1):
                raise ValueError(f"--{flag}={getattr(self, flag)} is too small")
        if self.processes_per_node is not None and (
            self.processes_per_node < 1 or self.gpus_per_node % self.processes_per_node
        ):
            raise ValueError(
                f"--processes_per_node={self.processes_per_node} does not divide --gpus_per_node={self.gpus_per_node}: "
                f"take {self.gpus_per_node} (one for each GPU) or 1 (for all of a node)"
            )
        if "\n" in self.job_log_dir or not self.job_log_dir:
            raise ValueError(f"--job_log_dir={self.job_log_dir!r}: not a folder's name")
        if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", self.time):
            raise ValueError(
                f"--time={self.time} is no time of Slurm: minutes, H:MM:SS or D-HH:MM:SS"
            )
        words = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "name": self.name,
            "sbatch": self.sbatch,
            "after": self.after,
        }
        for flag, value in words.items():
            for word in (value,) if isinstance(value, str) else value or ():
                # These go into #SBATCH lines, which no shell reads and no quoting protects.
                if not _WORD.fullmatch(word):
                    raise ValueError(
                        f"--{flag}={word!r} has characters that a job file cannot hold: letters, digits and "
                        "._,:/@%+=[]- are possible"
                    )
        for option in self.sbatch:
            if not re.match(r"--[a-z]", option):
                raise ValueError(f"--sbatch={option} is no option of sbatch: --sbatch=--NAME=VALUE")
        for pair in self.env:
            name, equals, _ = pair.partition("=")
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"--env={pair!r}: write NAME=VALUE, or NAME to hand on what is set here"
                )
            if equals and SECRET.search(name):
                raise ValueError(
                    f"--env={name}=...: that looks like a secret, which would be written into the job file; "
                    f"export {name} and write --env={name}"
                )
        for mount in self.mounts:
            parts = mount.split(":")
            if len(parts) not in (1, 2, 3) or not all(parts) or "," in mount or "\n" in mount:
                raise ValueError(f"--mount={mount!r}: write SOURCE:TARGET, without a comma")
        if self.mounts and self.container is None:
            raise ValueError("--mount has no effect without --container")

    @property
    def title(self) -> str:
        """Name of the job."""
        last = self.config.split("(")[0].split(".")[-1]
        return self.name or re.sub(r"[^\w.+=-]+", "_", f"{last}-{Path(self.job_log_dir).name}")

    @property
    def num_devices(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def tasks_per_node(self) -> int:
        """Processes of a node: one for each GPU unless something else was asked for."""
        return self.processes_per_node or self.gpus_per_node

    @property
    def code(self) -> str:
        """Where paxlike lies, as the processes see it."""
        return "/opt/paxlike" if self.container else str(ROOT)

    @property
    def environment(self) -> dict[str, str | None]:
        """Of the processes; None: what is set where the job is submitted."""
        pairs = (pair.partition("=") for pair in self.env)
        return {name: value if equals else None for name, equals, value in pairs}

    def list_stages(self) -> list[Stage]:
        """The stages in order, with their commands."""
        folder = str(Path(self.job_log_dir).absolute())
        main = (
            "main.py",
            f"--fdl_config={self.config}",
            f"--job_log_dir={folder}",
            *self.arguments,
        )
        python = "python" if self.container else self.python
        knobs = [word for word in self.arguments if word.startswith(("--fdl", "--fiddler"))]
        evaluate = main
        if self.eval_config is not None:
            evaluate = ("main.py", f"--fdl_config={self.eval_config}", *main[2:])
        commands = {
            "prepare": (python, f"scripts/download_{self.prepare}.py")
            if self.prepare in DATA_SETS
            else ("bash", "-c", self.prepare or ""),
            "train": (*main, "--mode=train"),
            "evaluate": (*[w for w in evaluate if "eval_on_test" not in w], "--mode=eval"),
            "export": (
                *(python, "scripts/convert.py", f"--fdl_config={self.config}", *knobs),
                *(f"--input={folder}", f"--output={self.export}", "--to=huggingface"),
            ),
        }
        stages, past = [], hashlib.sha256()
        for name in self.stages:
            command = tuple(commands[name])
            past.update(json.dumps([name, command]).encode())
            parallel = name in ("train", "evaluate")
            stages.append(Stage(name, command, parallel, past.hexdigest()[:16]))
        return stages

    def command(self, stage: Stage) -> list[str]:
        """What every process of a stage runs."""
        folder = str(Path(self.job_log_dir).absolute())
        script = f"{self.code}/scripts/run_stage.sh"
        return ["bash", script, stage.name, stage.key, folder, *stage.command]


def check_mesh(job: Job, found: dict) -> None:
    """Raises ValueError where the mesh of the config does not lie on the nodes of the job.

    `found` is what `main.py --mode=check` printed; that has compared the number of devices.
    """
    across = 1
    for size in found["dcn"]:
        across *= size
    if across not in (1, job.nodes):
        raise ValueError(
            f"DCN_MESH_SHAPE={found['dcn']} spans {across} nodes, but --nodes={job.nodes}; it is the part of the mesh "
            f"across nodes, and ICI_MESH_SHAPE={found['ici']} that inside a node of {job.gpus_per_node} GPUs"
        )


def shell(words: Sequence[str]) -> str:
    """The words as one command that a shell takes apart into the same words."""
    return shlex.join(words)
