"""Saving and restoring the state of a run with Orbax.

A save copies the arrays to the host and returns; a thread writes them into a folder with an
unfinished name, adds the list of checksums, and gives it its final name in one atomic rename.
A kill at any moment therefore loses only what came after the last complete checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding

from paxlike.checkpoint import arrays, changes, integrity, layout, quiet, upkeep
from paxlike.checkpoint.follow import clear_finished
from paxlike.checkpoint.options import CheckpointOptions
from paxlike.checkpoint.reading import ModelMismatch, log, read_newest
from paxlike.cluster import processes

# With several processes the clock is asked every n-th step: it costs a message between hosts.
_CLOCK_EVERY_N_STEPS = 10
# For all hosts to have written; a host that failed makes the others wait this long at most.
_COMMIT_TIMEOUT_SECONDS = 3600


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint holds: the state on its devices, and what was saved beside it."""

    state: Any
    step: int
    data: dict[str, Any]
    config: str
    config_text: str
    metadata: dict[str, Any]


class Checkpointer:
    """The checkpoints of one run in `<job_log_dir>/checkpoints`: a context, alike in all processes.

    A writer claims the folder (a second running writer is refused) and clears away what an
    interrupted save left; with `read_only` nothing is claimed or changed. Raises `OSError` in one
    line when the folder cannot be written.
    """

    def __init__(
        self,
        job_log_dir: Path,
        options: CheckpointOptions | None = None,
        *,
        read_only: bool = False,
    ):
        self.options = options or CheckpointOptions()
        self.folder = layout.checkpoints_folder(job_log_dir)
        self.last_stall_seconds = 0.0
        self.last_save_seconds = 0.0  # until the newest complete one was on disk
        self._save_began = 0.0
        self._read_only = read_only
        self._claim = None if read_only else upkeep.open_for_writing(self.folder)
        # Steps saved or restored here; all others belong to an earlier start of the run.
        self._known: set[int] = set()
        self.protected: frozenset[int] = frozenset()  # steps that are kept whatever the options say
        self._damaged: dict[int, str] = {}
        self._due: tuple[int, bool] | None = None
        self._last_save_time = time.monotonic()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saving: int | None = None
        self._failed = False
        quiet.quiet_orbax()
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(),
            async_options=ocp.AsyncOptions(
                timeout_secs=_COMMIT_TIMEOUT_SECONDS, post_finalization_callback=self._add_manifest
            ),
        )

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self.close()
            return
        try:
            self.close()
        except OSError as failure:  # The error on its way out says more than this one.
            log.warning("%s", failure)

    def close(self) -> None:
        """Waits for the save under way and gives the folder back."""
        try:
            self.wait()
        finally:
            try:
                self._orbax.close()
            except Exception:
                if not self._failed:  # else it is said again, and has been raised already
                    raise
            finally:
                if self._claim is not None:
                    upkeep.release(self._claim)
                    self._claim = None

    def all_steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return layout.list_steps(self.folder)

    def latest_step(self) -> int | None:
        """The newest step, or None."""
        return max(self.all_steps(), default=None)

    def newest_before(self, step: int) -> int | None:
        """The newest step before `step` that was saved, or restored, in this start of the run."""
        return max((each for each in self._known if each < step), default=None)

    def due(self, step: int) -> bool:
        """Whether the options ask for a checkpoint after `step`; the same answer on all processes.

        Call it (or `save`) once a step on every process. The clock of process 0 decides on minutes.
        """
        if self._due is None or self._due[0] != step:
            self._due = (step, self._is_due(step))
        return self._due[1] and step not in self._known

    def save(
        self,
        step: int,
        state: Any,
        *,
        data: dict[str, Any],
        config: str,
        config_text: str = "",
        wait: bool = False,
        force: bool = False,
    ) -> bool:
        """Saves if it is due (or `force`), and says whether it did; no step is saved twice.

        When it returns, the arrays are copied and their buffers may be donated;
        `last_stall_seconds` says how long that took, waiting for the save before it included.
        With `wait` it returns when the checkpoint is complete. Raises `OSError` in one line when
        this save, or an asynchronous one before it, failed.
        """
        if self._read_only:
            raise ValueError(f"step {step} cannot be saved: {self.folder} was opened read_only")
        if not (self.due(step) or force) or step in self._known:
            if wait:
                self.wait()
            return False
        start = time.perf_counter()
        self.wait()
        items = _items(step, state, data, {"json": config, "text": config_text})
        if processes.is_first():
            clear_finished(self.folder.parent)
            upkeep.move_aside(self.folder, step, known=self._known, damaged=self._damaged)
        self._known.add(step)
        self._saving, self._save_began = step, start
        self._last_save_time = time.monotonic()
        try:
            # Nothing lies there; `force` spares other hosts a look at what they may see late.
            self._orbax.save(layout.step_folder(self.folder, step), args=items, force=True)
        except Exception as error:
            raise self._failure(error) from error
        self._thread = threading.Thread(target=self._finish, name=f"checkpoint_{step}")
        self._thread.start()
        if wait or not self.options.asynchronous:
            self.wait()
        self.last_stall_seconds = time.perf_counter() - start
        return True

    def wait(self) -> None:
        """Returns when no save is under way; raises `OSError` in one line if the last failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise self._failure(error) from error

    def restore(
        self, abstract_state: Any, *, step: int | None = None, config_text: str = ""
    ) -> Restored | None:
        """The newest whole checkpoint, or that of `step`; None when there is none at all.

        `abstract_state` is a tree of `jax.ShapeDtypeStruct` with shardings, on any mesh: each array
        is born in the one asked for. A damaged checkpoint is named and the one before it taken.
        Raises `ValueError` when `step` is missing or damaged, when all are damaged, and when the
        model has changed, in its arrays or from what the checkpoint's text says to `config_text`:
        before any array is read.
        """
        self.wait()
        wanted = arrays.named_leaves(abstract_state)
        # Other hosts may see a shared folder late: process 0 says what there is.
        steps = json.loads(processes.from_first("steps", json.dumps(self.all_steps())))
        if step is not None and step not in steps:
            there = layout.name_steps(steps)
            raise ValueError(f"no checkpoint of step {step} in {self.folder}; there are {there}")
        if self._read_only:
            upkeep.name_unfinished(self.folder, "ignored")
        candidates = list(reversed(steps)) if step is None else [step]
        if not candidates:
            return None
        restored = read_newest(
            [layout.step_folder(self.folder, each) for each in candidates],
            lambda folder: _read(folder, abstract_state, wanted, config_text),
            checksums=self.options.checksums,
            damaged=self._damaged,
        )
        self._known.add(restored.step)
        return restored

    def _is_due(self, step: int) -> bool:
        every, minutes = self.options.every_n_steps, self.options.every_minutes
        by_steps = bool(every and step > 0 and step % every == 0)
        if not minutes:
            return by_steps
        late = "1" if time.monotonic() - self._last_save_time >= minutes * 60 else ""
        if not processes.alone():
            if step % _CLOCK_EVERY_N_STEPS:
                return by_steps
            late = processes.from_first("due", late)
        return by_steps or bool(late)

    def _add_manifest(self) -> None:
        """Runs in the saving thread of process 0: all is written, the folder not yet renamed."""
        assert self._saving is not None  # set by `save`
        prefix = layout.step_folder(self.folder, self._saving).name + "."
        unfinished = layout.unfinished_folders(self.folder)
        (folder,) = [each for each in unfinished if each.name.startswith(prefix)]
        integrity.write_manifest(folder, checksums=self.options.checksums)

    def _finish(self) -> None:
        """Waits for the save under way and then drops old checkpoints; in a thread of its own."""
        try:
            self._orbax.wait_until_finished()
            self.last_save_seconds = time.perf_counter() - self._save_began
            if processes.is_first():
                last, every = self.options.keep_last, self.options.keep_every_n_steps
                upkeep.drop_old(
                    self.folder,
                    keep_last=last,
                    keep_every_n_steps=every,
                    protected=self.protected,
                )
        except BaseException as error:  # Raised by `wait`, in the thread of the loop.
            self._error = error

    def _failure(self, error: BaseException) -> OSError:
        step, self._saving, self._failed = self._saving, None, True
        self._known.discard(step)
        if processes.is_first():
            upkeep.remove_unfinished(self.folder)
        return OSError(
            f"checkpoint of step {step} could not be saved: {upkeep.problem(self.folder, error)}; "
            f"complete checkpoints: {layout.name_steps(self.all_steps())}"
        )


def _items(step: int, state: Any, data: dict, config: dict[str, str]) -> ocp.args.Composite:
    """What goes into a checkpoint; raises `ValueError` on what could not be restored from it."""
    named = arrays.named_leaves(state)
    for name, leaf in named.items():
        if not isinstance(leaf, jax.Array):
            raise ValueError(
                f"{name} of the state is a {type(leaf).__name__}: it must be a jax.Array"
            )
        if not processes.alone() and leaf.sharding.is_fully_addressable:
            raise ValueError(
                f"{name} of the state is on the devices of process {jax.process_index()} only: "
                "give it a sharding over the mesh of all processes"
            )
    try:
        json.dumps(data)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the data position {data!r} is not JSON: {error}") from error
    return ocp.args.Composite(
        state=ocp.args.PyTreeSave(arrays.nested(named)),
        data=ocp.args.JsonSave(data),
        config=ocp.args.JsonSave(config),
        metadata=ocp.args.JsonSave(_metadata(step, named)),
    )


def _metadata(step: int, named: dict[str, Any]) -> dict[str, Any]:
    shardings = (leaf.sharding for leaf in named.values())
    mesh = next(
        (dict(each.mesh.shape) for each in shardings if isinstance(each, NamedSharding)), {}
    )
    return {
        "step": step,
        "versions": {name: _version(name) for name in ("paxlike", "jax", "orbax-checkpoint")},
        "mesh": {"axes": list(mesh), "shape": list(mesh.values())},
        "num_processes": jax.process_count(),
        "arrays": arrays.description(named),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # Run from a checkout that is not installed.
        return "not installed"


def _read(folder: Path, abstract_state: Any, wanted: dict[str, Any], config_text: str) -> Restored:
    metadata = arrays.read_item(folder, "metadata")
    stored = metadata["arrays"]
    if problem := arrays.difference(stored, wanted):
        raise ModelMismatch(
            f"checkpoint {folder} is of another model or optimizer: {problem}; "
            "take another job_log_dir, or start from its weights only"
        )
    config = arrays.read_item(folder, "config")
    if problem := changes.refused(config["text"], config_text):
        raise ModelMismatch(
            f"checkpoint {folder} was made with other settings: {problem}; go on with the same, or "
            f"start another job_log_dir from these weights with CHECKPOINT_RESTORE_PATH={folder}"
        )
    cast = [name for name, leaf in wanted.items() if str(leaf.dtype) != stored[name]["dtype"]]
    if cast and processes.is_first():
        change = f"{cast[0]} from {stored[cast[0]]['dtype']} to {wanted[cast[0]].dtype}"
        log.warning("%d arrays of %s are converted: %s first", len(cast), folder, change)
    return Restored(
        state=arrays.with_leaves(abstract_state, arrays.read_arrays(folder, wanted)),
        step=int(metadata["step"]),
        data=arrays.read_item(folder, "data"),
        config=config["json"],
        config_text=config["text"],
        metadata=metadata,
    )
