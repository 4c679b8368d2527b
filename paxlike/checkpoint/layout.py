"""Where checkpoints lie: `<job_log_dir>/checkpoints/checkpoint_00000100/{state,data,...}/`.

A folder of that exact name is complete, because it gets its name by one atomic rename. Any other
name is something unfinished or put aside, and is never read.
"""

from __future__ import annotations

import re
from pathlib import Path

_STEP = re.compile(r"checkpoint_(\d{8,})")
_UNFINISHED = re.compile(r"checkpoint_\d{8,}\.(orbax-checkpoint-tmp.*|deleting)")


def checkpoints_folder(job_log_dir: Path) -> Path:
    """The folder that holds the checkpoints of a run."""
    return Path(job_log_dir).absolute() / "checkpoints"


def step_folder(checkpoints: Path, step: int) -> Path:
    """The folder of one step."""
    return checkpoints / f"checkpoint_{step:08d}"


def list_steps(checkpoints: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    names = (entry.name for entry in _entries(checkpoints))
    return sorted(int(match[1]) for match in map(_STEP.fullmatch, names) if match)


def unfinished_folders(checkpoints: Path) -> list[Path]:
    """Folders that an interrupted save or deletion left (or that a running one works on)."""
    return sorted(entry for entry in _entries(checkpoints) if _UNFINISHED.fullmatch(entry.name))


def locate(path: Path, *, step: int | None = None) -> list[Path]:
    """Folders of the checkpoints meant by `path`, newest first.

    `path` is a job_log_dir, its checkpoints/ folder or one checkpoint. Raises `ValueError` when
    there is none, or none of `step`.
    """
    path = Path(path).absolute()
    match = _STEP.fullmatch(path.name)
    if match and path.is_dir():
        if step not in (None, int(match[1])):
            raise ValueError(
                f"step {step} was asked of {path}, which is the checkpoint of step {int(match[1])}"
            )
        return [path]
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = list_steps(folder)
    if not steps:
        raise ValueError(
            f"no checkpoint in {path}: give a job_log_dir, its checkpoints/ folder "
            "or one checkpoint_NNNNNNNN"
        )
    if step is None:
        return [step_folder(folder, each) for each in reversed(steps)]
    if step not in steps:
        raise ValueError(f"no checkpoint of step {step} in {folder}; there are {name_steps(steps)}")
    return [step_folder(folder, step)]


def name_steps(steps: list[int]) -> str:
    """`steps 10, 20, 30`, or `none`."""
    return "steps " + ", ".join(map(str, steps)) if steps else "none"


def _entries(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []
