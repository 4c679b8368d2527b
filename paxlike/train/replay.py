"""Takes one recorded step again, with every module watched: which of them is the first to go wrong.

From the newest checkpoint before it the run is repeated up to that step, by the same program, without writing what a
run writes. Then each output of each module and layer is measured, and each gradient and update. With a pipeline the
watched pass takes the layers in turn, on whole batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from paxlike import parallel
from paxlike.checkpoint import Checkpointer
from paxlike.log.progress import Progress
from paxlike.train import program, recorder, saved
from paxlike.train.findings import Result, Seen, module_rows, parameter_rows
from paxlike.train.ramp import Feed
from paxlike.train.state import StateFactory, TrainState
from paxlike.train.watch import Watch

if TYPE_CHECKING:
    from paxlike.experiment import Experiment

FILE = "replay.json"


def replay(experiment: Experiment, job_log_dir: str, *, step: int | None = None) -> int:
    """Replays `step` (default: the newest recorded spike) of the run in `job_log_dir`; returns the exit code.

    Prints a table and writes `replay.json` into the folder of the spike. Raises a one-line `ValueError` where the step
    cannot be replayed.
    """
    directory = Path(job_log_dir)
    spike = _recorded(directory, step)
    number = spike["step"]
    if spike.get("seed", experiment.seed) != experiment.seed:
        raise ValueError(
            f"step {number} was recorded with SEED={spike['seed']}, and here it is {experiment.seed}: give the run's"
        )
    experiment.check_data([experiment.train_data])
    with contextlib.ExitStack() as stack:
        mesh = experiment.mesh.build()
        stack.enter_context(parallel.activate(mesh, experiment.training_rules))
        options = experiment.checkpoints
        checkpoints = stack.enter_context(Checkpointer(directory, options, read_only=True))
        start = max((each for each in checkpoints.all_steps() if each < number), default=None)
        if start is None:
            raise ValueError(
                f"step {number} cannot be replayed: {checkpoints.folder} has no checkpoint of an earlier step"
            )
        spec = experiment.train_data.spec(experiment.global_batch_size)
        factory = program.state_factory(experiment, spec, mesh)
        abstract = factory.abstract()
        restored = checkpoints.restore(saved.saved_part(experiment, abstract), step=start)
        assert restored is not None  # it is there, or is said to be damaged
        state = saved.with_frozen(experiment, abstract, restored.state)
        first_row = saved.data_position(experiment, directory, restored.data)
        _check_rows(experiment, spike, start, first_row)
        batches = Feed(
            experiment.train_data,
            whole=experiment.global_batch_size,
            ramp=experiment.ramp,
            first_row=first_row,
            sharding=parallel.named_sharding(mesh, ("batch", "length")),
        )
        stack.callback(batches.close)
        recorded = recorder.folder_of(directory, number) / recorder.BATCH_FILE
        seen = _steps(experiment, factory, state, batches, range(start + 1, number + 1), recorded)
    modules = module_rows(seen)
    parameters = parameter_rows(seen, modules)
    result = Result(spike, start, seen.metrics, modules, parameters, seen.before is not None)
    if jax.process_index() == 0:
        place = recorder.folder_of(directory, number)
        place.mkdir(parents=True, exist_ok=True)
        recorder.write_json(place / FILE, result.as_json())
        print(result.text())
        print(f"all modules and parameters: {place / FILE}")
    return 0


def _recorded(directory: Path, step: int | None) -> dict[str, Any]:
    """What the recorder wrote about the step; of one that was not recorded, its number alone."""
    spikes = recorder.read_all(directory)
    if step is None:
        if not spikes:
            raise ValueError(
                f"no spike is recorded in {directory / recorder.FOLDER}: name the step with --replay_step"
            )
        return spikes[-1]
    if step < 1:
        raise ValueError(f"--replay_step={step} must be at least 1, the first step of a run")
    return next((each for each in spikes if each["step"] == step), {"step": step})


def _check_rows(
    experiment: Experiment, spike: Mapping[str, Any], start: int, first_row: int
) -> None:
    """Refuses a batch that is not the recorded one: another size or mesh cuts the data in other places."""
    whole, ramp = experiment.global_batch_size, experiment.ramp
    size = lambda: whole if ramp is None else ramp.size(first_row, whole)
    for _ in range(start + 1, spike["step"]):
        first_row += size()
    here = (first_row, size())
    there = (spike.get("first_row", here[0]), spike.get("rows", here[1]))
    if here != there:
        raise ValueError(
            f"step {spike['step']} was recorded with {there[1]} rows from row {there[0]} on, and here it would have "
            f"{here[1]} from row {here[0]} on: replay on as many devices, with the same PERCORE_BATCH_SIZE"
        )


def _check_batch(batch: Mapping[str, jax.Array], path: Path) -> None:
    if not path.is_file() or not all(array.is_fully_addressable for array in batch.values()):
        return
    with np.load(path) as recorded:
        for name, array in batch.items():
            if name not in recorded or not np.array_equal(recorded[name], np.asarray(array)):
                raise ValueError(
                    f"the data gives other {name} than {path}: it was changed since, and the step cannot be replayed"
                )


def _steps(
    experiment: Experiment,
    factory: StateFactory,
    state: TrainState,
    batches: Feed,
    numbers: range,
    recorded: Path,
) -> Seen:
    """Takes the steps `numbers`, and measures the last two of them."""
    abstract, number = factory.abstract(), numbers[-1]
    programs: dict[int, Any] = {}  # by rows: a batch may grow
    watches: dict[int, Watch] = {}
    now = before = watch = None
    bar = Progress(len(numbers), description="replay", enabled=jax.process_index() == 0)
    for done in numbers:
        rows = batches.size
        spec = program.batch_spec(experiment.train_data.spec(rows), factory.mesh)
        batch = next(batches)
        if done == number:
            _check_batch(batch, recorded)
        if done >= number - 1:
            if rows not in watches:
                watches[rows] = Watch(experiment, factory, abstract, spec)
            watch = watches[rows]
            before, now = now, watch(state, batch)
        if rows not in programs:
            programs[rows] = program.jit_step(experiment, factory).lower(abstract, spec).compile()
        state, metrics = programs[rows](state, batch)
        jax.block_until_ready(metrics)
        bar.update(done - numbers[0] + 1)
    bar.close()
    assert now is not None and watch is not None  # there is a last step
    return Seen(now, before, watch.order, jax.device_get(metrics))
