"""Changes to the folder of a run's checkpoints: claiming and clearing it, and saying what failed.

Only the process that writes a run's checkpoints calls these; nothing that is complete is ever
overwritten, and a folder changes its name before its contents are deleted.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Collection
from pathlib import Path

import jax

from paxlike.checkpoint import layout
from paxlike.cluster import processes

log = logging.getLogger("paxlike.checkpoint")
_claimed: dict[Path, int] = {}
_OWN_WORDS = (
    "No space left on device",
    "Read-only file system",
    "Permission denied",
    "Disk quota exceeded",
)


def open_for_writing(checkpoints: Path) -> int | None:
    """Creates and claims the folder in process 0, and sees that all processes can write there.

    Returns the claim, for `release`. Raises the same `OSError`, in one line, everywhere.
    """
    claim = None
    for turn in (processes.is_first(), not processes.is_first()):
        complaint = None
        if turn:
            try:
                claim = _prepare(checkpoints)
            except OSError as error:
                complaint = problem(checkpoints, error)
        if complaints := processes.share("open", complaint):
            raise OSError(f"checkpoints cannot be written: {complaints[0]}")
    return claim


def release(claim: int) -> None:
    """Gives the folder back."""
    for path in [path for path, handle in _claimed.items() if handle == claim]:
        del _claimed[path]
    os.close(claim)


def name_unfinished(checkpoints: Path, then: str) -> None:
    """Warns of what an interrupted save has left, and says what is done about it."""
    unfinished = layout.unfinished_folders(checkpoints)
    if unfinished and processes.is_first():
        names = ", ".join(folder.name for folder in unfinished)
        log.warning("half-written checkpoint %s in %s: %s", names, checkpoints, then)


def remove_unfinished(checkpoints: Path) -> None:
    """Deletes what an interrupted save or deletion has left; only for the holder of the claim."""
    for folder in layout.unfinished_folders(checkpoints):
        shutil.rmtree(folder, ignore_errors=True)


def move_aside(
    checkpoints: Path, step: int, *, known: Collection[int], damaged: Collection[int]
) -> None:
    """Renames what an earlier start left at `step` or later: damaged, or of another course."""
    for later in layout.list_steps(checkpoints):
        if later < step or later in known:
            continue
        folder = layout.step_folder(checkpoints, later)
        kind = "damaged" if later in damaged else "superseded"
        aside = folder.with_name(f"{folder.name}.{kind}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        log.warning("%s is %s: kept as %s", folder, kind, aside.name)


def drop_old(
    checkpoints: Path,
    *,
    keep_last: int | None,
    keep_every_n_steps: int | None,
    protected: Collection[int] = (),
) -> None:
    """Deletes all checkpoints but the newest ones and the multiples of `keep_every_n_steps`."""
    if keep_last is None:
        return
    for step in layout.list_steps(checkpoints)[:-keep_last]:
        if step in protected or (keep_every_n_steps and step % keep_every_n_steps == 0):
            continue
        folder = layout.step_folder(checkpoints, step)
        try:
            # Renamed first: a kill while deleting must not leave what looks like a damaged one.
            shutil.rmtree(folder.rename(folder.with_name(f"{folder.name}.deleting")))
        except OSError as error:
            log.warning("old checkpoint %s is not deleted: %s", folder, error)


def problem(checkpoints: Path, error: BaseException) -> str:
    """Folder, cause and free bytes, in one clause; an `OSError` of our own already says it all."""
    if isinstance(error, OSError) and error.errno is None and str(checkpoints) in str(error):
        return str(error)
    there = checkpoints
    while not there.exists():
        there = there.parent
    return f"{checkpoints}: {_cause(error)} ({shutil.disk_usage(there).free} bytes free)"


def _prepare(checkpoints: Path) -> int | None:
    if processes.is_first():
        checkpoints.mkdir(parents=True, exist_ok=True)
    elif not checkpoints.is_dir():
        raise OSError(
            f"process {jax.process_index()} does not see {checkpoints}, which process 0 has made: "
            "the job_log_dir must be on a file system that all processes share"
        )
    probe = checkpoints / f".probe_{jax.process_index()}"
    probe.write_bytes(b"0")
    probe.unlink()
    if not processes.is_first():
        return None
    claim = _claim(checkpoints / ".writer")
    name_unfinished(checkpoints, "removed")
    remove_unfinished(checkpoints)
    return claim


def _claim(path: Path) -> int | None:
    """Locks `path` for as long as this process lives; None where the file system has no locks."""
    # A record lock: not inherited by forked workers, which may outlive a killed parent. It does not
    # hold against this very process, and closing any other handle of the file would drop it.
    if path in _claimed:
        raise _busy(path, "this one")
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
    except OSError as error:
        owner = os.pread(handle, 200, 0).decode(errors="replace").strip()
        os.close(handle)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise _busy(path, owner) from None
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return None
        raise
    _claimed[path] = handle
    return handle


def _busy(path: Path, owner: str) -> OSError:
    return OSError(
        f"{path.parent} is being written by another run ({owner}): "
        "stop it, or take another job_log_dir"
    )


def _cause(error: BaseException) -> str:
    """What the operating system said, wherever in the chain of causes; else the first line."""
    chain: BaseException | None = error
    texts = []
    while chain is not None:
        if isinstance(chain, OSError) and chain.strerror:
            return chain.strerror
        texts.append(str(chain))
        chain = chain.__cause__ or chain.__context__
    everything = " ".join(texts).lower()
    found = next((words for words in _OWN_WORDS if words.lower() in everything), None)
    return found or first_line(error)


def first_line(error: BaseException) -> str:
    """The first line of an error, at most 200 characters of it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
