"""`--mode=plan`: prints the plan of an experiment, or the best that a search finds, and writes plan.json."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING

from paxlike.log.progress import Progress
from paxlike.plan import picture, planner, report, target
from paxlike.plan import search as searching
from paxlike.plan.chips import Chip, find_chip

if TYPE_CHECKING:
    from paxlike.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Options:
    """What a person may ask of a plan.

    Attributes:
      chip: a name in `paxlike.plan.chips.CHIPS`.
      num_devices: chips; None: what the mesh says.
      num_tokens, gpu_hours: a budget, see `report.budget`.
      directory: folder for plan.json, None for none.
      picture: file for the picture of who holds what, None for none.
      command: that was typed, to be kept.
    """

    chip: str = "h100"
    num_devices: int | None = None
    num_tokens: float | None = None
    gpu_hours: float | None = None
    directory: str | None = None
    picture: str | None = None
    command: str = ""


def prepare(
    experiment: Experiment, options: Options, environ: MutableMapping[str, str]
) -> tuple[Chip, int]:
    """The chip and the number of devices, once what the compiler needs is found and set in `environ`.

    Call it before jax makes its devices. Raises ValueError in one line.
    """
    for flag, value in (("devices", options.num_devices), ("plan_tokens", options.num_tokens)):
        if value is not None and value <= 0:
            raise ValueError(f"--{flag}={value} must be above 0")
    if options.gpu_hours is not None and options.gpu_hours <= 0:
        raise ValueError(f"--plan_gpu_hours={options.gpu_hours} must be above 0")
    chip = find_chip(options.chip)
    target.prepare_environment(chip, environ)
    mesh = experiment.mesh
    if options.num_devices is not None:
        return chip, options.num_devices
    if -1 in mesh.ici:
        raise ValueError(
            f"ICI_MESH_SHAPE={list(mesh.ici)} takes what devices there are: say how many with --devices=N"
        )
    return chip, mesh.num_devices


def plan(experiment: Experiment, options: Options) -> int:
    """Prints the plan for the mesh of the experiment; 0, whether it fits or not."""
    chip = find_chip(options.chip)
    progress = Progress(None)
    program = planner.lower(experiment, chip, num_devices=options.num_devices)
    if options.picture is not None:  # first: a mesh that it cannot show is refused
        with planner.tracing(program.mesh, program.experiment, chip):
            arrays = picture.arrays_of(
                program.abstract, program.spec, program.mesh, experiment.compute_dtype
            )
        sizes = " x ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items())
        picture.draw(arrays, program.mesh, f"{experiment.name}: {sizes}", Path(options.picture))
        progress.write(f"who holds what: {options.picture}")
    with progress.busy(f"compiling the training step for {program.mesh.size} x {chip.name}"):
        made = program.compile()
    print(report.text(made, num_tokens=options.num_tokens, gpu_hours=options.gpu_hours))
    if options.directory is not None:
        budget = report.budget(made, options.num_tokens, options.gpu_hours)
        _write(options.directory, report.as_json(made, command=options.command, budget=budget))
    return 0


def search(
    experiment: Experiment,
    change: Callable[[dict[str, str]], Experiment],
    options: Options,
    *,
    policy: str | None,
    max_compiles: int,
) -> int:
    """Prints the candidates that a search compiled, why others were refused, and the best as knobs and in full.

    `policy` is the remat policy of the config, which is tried beside the usual ones; None where it has no such knob.
    Returns 1 where nothing fits.
    """
    if max_compiles < 1:
        raise ValueError(f"--search_compiles={max_compiles} must be at least 1")
    chip = find_chip(options.chip)
    if options.num_devices is None and -1 in experiment.mesh.ici:
        raise ValueError(
            "a search needs --devices=N where ICI_MESH_SHAPE takes what devices there are"
        )
    num_devices = options.num_devices or experiment.mesh.num_devices
    policies = [None] if policy is None else list(dict.fromkeys([policy, *searching.POLICIES]))
    progress = Progress(None)
    started = time.monotonic()
    found = searching.search(
        experiment,
        change,
        chip,
        num_devices=num_devices,
        policies=policies,
        max_compiles=max_compiles,
        report=progress.write,
    )
    print(
        f"{experiment.name} on {num_devices} x {chip.name}: {len(found.compiled)} candidates compiled in "
        f"{time.monotonic() - started:.0f} s\n"
    )
    print(report.search_table(found))
    best = found.best
    if best is None:
        print("\nnothing fits; try more devices, or a smaller PERCORE_BATCH_SIZE")
    else:
        print(f"\nbest\n  {best[0].flags}\n")
        print(report.text(best[1], num_tokens=options.num_tokens, gpu_hours=options.gpu_hours))
    if options.directory is not None:
        _write(options.directory, report.search_json(found, command=options.command))
    return 1 if best is None else 0


def _write(directory: str, text: str) -> None:
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(text)
