"""Choosing the newest checkpoint that is whole, by one rule for everyone who reads one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax

from paxlike.checkpoint import integrity, layout
from paxlike.checkpoint.upkeep import first_line, log
from paxlike.cluster import processes

T = TypeVar("T")


class ModelMismatch(ValueError):
    """The arrays of the checkpoint are not those asked for; an older checkpoint would not help."""


def read_newest(
    folders: list[Path],
    read: Callable[[Path], T],
    *,
    checksums: bool = True,
    damaged: dict[int, str] | None = None,
) -> T:
    """`read(folder)` of the first whole one of `folders`; damaged ones are named in warnings.

    Every process must call it; all take the same. `damaged` receives step -> reason. Raises
    `ValueError` when none is whole: a run never starts anew over what could perhaps be mended.
    """
    damaged = {} if damaged is None else damaged
    for folder in folders:
        reason = _damage_anywhere(folder, checksums)
        if reason is None:
            certain = checksums and integrity.has_checksums(folder)
            result, reason = _try(read, folder, certain=certain)
        if reason is None:
            assert result is not None  # it was read
            return result
        damaged[_step(folder)] = reason
        if folder != folders[-1] and processes.is_first():
            log.warning("checkpoint %s is damaged (%s): trying the one before it", folder, reason)
    others = [each for each in layout.list_steps(folders[0].parent) if each not in damaged]
    also = f", and so are {len(folders) - 1} before it" if len(folders) > 1 else ""
    raise ValueError(
        f"checkpoint {folders[0]} is damaged ({damaged[_step(folders[0])]}){also}; "
        f"others: {layout.name_steps(others)}; restore it from a copy, or move it away"
    )


def _damage_anywhere(folder: Path, checksums: bool) -> str | None:
    part = (jax.process_index(), jax.process_count())
    found = processes.share("damage", integrity.damage(folder, checksums=checksums, part=part))
    return found[0] if found else None


def _try(read: Callable[[Path], T], folder: Path, *, certain: bool) -> tuple[T | None, str | None]:
    """Result or reason of failure; when the contents are `certain`, a failure is raised instead."""
    result, problem, failure = None, None, None
    try:
        result = read(folder)
    except ModelMismatch:
        raise
    except (OSError, ValueError, KeyError) as error:
        problem, failure = f"cannot be read: {first_line(error)}", error
    # Before anything is raised: the other processes wait here.
    problems = processes.share("read", problem)
    if certain and failure is not None:
        raise failure
    if certain and problems:
        raise OSError(f"another process failed: {folder} {problems[0]}")
    return (None, problems[0]) if problems else (result, None)


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("_")[2])
