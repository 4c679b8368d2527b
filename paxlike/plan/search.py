"""Looks for the mesh, the number of microbatches and the remat policy with which a step is fastest and fits.

Three sieves, each dearer than the one before: what the sizes forbid; what cannot fit even if every activation were
spread over all devices; and, of the rest, the few that a rough formula puts first are compiled and ranked by their
estimates. The formula only orders the candidates: what is printed was compiled.
"""

from __future__ import annotations

import dataclasses
import fractions
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from paxlike import parallel
from paxlike.log.flops import traced_flops
from paxlike.ops import platform
from paxlike.plan import planner, target
from paxlike.plan.chips import ASSUMED, USABLE_MEMORY, Chip
from paxlike.plan.hlo import Collective
from paxlike.plan.planner import Plan
from paxlike.plan.timeline import collective_seconds
from paxlike.train.matrices import is_box
from paxlike.train.program import batch_spec, state_factory

if TYPE_CHECKING:
    from paxlike.experiment import Experiment

GIB = 2**30
SEARCHED_AXES = (parallel.PIPELINE_AXIS, "data", "fsdp", "tensor")  # the others stay as they are
POLICIES = (
    "SAVE_NOTHING",
    "SAVE_DOT_FOR_MLPERF_200B",
    "SAVE_DOT_WITH_NO_BATCH_DIM",
    "SAVE_EVERYTHING",
)

Change = Callable[[dict[str, str]], "Experiment"]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One choice of the knobs that a search turns; `policy` is None where the config has no such knob."""

    mesh: parallel.Mesh
    num_microbatches: int
    policy: str | None

    @property
    def knobs(self) -> dict[str, str]:
        """The knobs by name, with values as they are typed."""
        found = {
            "ICI_MESH_SHAPE": _typed(self.mesh.ici),
            "DCN_MESH_SHAPE": _typed(self.mesh.dcn),
            "NUM_MICROBATCHES": str(self.num_microbatches),
        }
        if parallel.PIPELINE_AXIS in self.mesh.axes:
            found["NUM_STAGES"] = str(self.stages)
            if self.mesh.axes != (parallel.PIPELINE_AXIS, *parallel.AXES):
                found["MESH_AXES"] = _typed(self.mesh.axes)
        return found if self.policy is None else found | {"CHECKPOINT_POLICY": self.policy}

    @property
    def stages(self) -> int:
        """Of the pipeline; 1 where there is none."""
        return self.mesh.shape.get(parallel.PIPELINE_AXIS, 1)

    @property
    def flags(self) -> str:
        """To be pasted behind a command."""
        return " ".join(f"--fdl.{name}={value}" for name, value in self.knobs.items())


@dataclasses.dataclass(frozen=True)
class Activations:
    """Of one policy and one row: bytes that are kept for the backward pass, FLOPs of both passes."""

    bytes: float
    flops: float


@dataclasses.dataclass
class Result:
    """What a search found.

    Attributes:
      compiled: every candidate that was compiled with its plan, the fastest that fits first.
      refused: reason -> candidates; `later`: those that the formula put behind, not compiled.
    """

    compiled: list[tuple[Candidate, Plan]]
    refused: dict[str, list[Candidate]]
    later: list[Candidate]

    @property
    def best(self) -> tuple[Candidate, Plan] | None:
        """The fastest that fits."""
        return next(((c, p) for c, p in self.compiled if p.fits), None)


def candidates(
    mesh: parallel.Mesh,
    num_devices: int,
    rows: int,
    chip: Chip,
    policies: Sequence[str | None],
    repeats: int = 1,
) -> Iterator[Candidate | str]:
    """Every mesh x microbatches x policy for so many devices, and one line for each mesh that cannot be.

    `repeats`: of the blocks of the model, over which pipeline stages are tried where they divide.
    """
    given = mesh.shape
    if parallel.PIPELINE_AXIS not in given and repeats > 1:
        given = {parallel.PIPELINE_AXIS: 1, **given}
    refused_stages = set()
    fixed = [size for axis, size in given.items() if axis not in SEARCHED_AXES]
    free = [axis for axis in given if axis in SEARCHED_AXES]
    left, rest = divmod(num_devices, math.prod(fixed))
    if rest:
        raise ValueError(
            f"{num_devices} devices do not divide by {math.prod(fixed)}, the size of the axes that a search leaves as "
            "they are"
        )
    for sizes in _factorisations(left, len(free)):
        shape = given | dict(zip(free, sizes, strict=True))
        stages = shape.get(parallel.PIPELINE_AXIS, 1)
        if repeats % stages:
            if stages not in refused_stages:  # once for all meshes with so many
                yield f"{repeats} repeats of the blocks do not divide over {stages} pipeline stages"
            refused_stages.add(stages)
            continue
        if parallel.PIPELINE_AXIS not in mesh.axes and stages == 1:
            shape.pop(parallel.PIPELINE_AXIS, None)
        try:
            found = lay_out(shape, chip)
        except ValueError as error:
            yield str(error)
            continue
        shards = found.num_batch_shards
        if rows % shards:
            yield f"the {rows} rows of a step do not divide over {' x '.join(found.batch_axes)}"
            continue
        # At least one row of each shard in each microbatch; powers of two are enough to find the place.
        for power in range(rows.bit_length()):
            parts = stages * 2**power
            if rows * stages // shards % parts:
                break
            for policy in policies:
                yield Candidate(found, parts, policy)


def lay_out(shape: Mapping[str, int], chip: Chip) -> parallel.Mesh:
    """The mesh of this shape with its last axes inside the nodes, where the links are fast.

    Raises ValueError where the nodes of the chip cannot be filled so.
    """
    count = math.prod(shape.values())
    inside = min(chip.per_node, count)
    left, ici = inside, {}
    for axis in reversed(list(shape)):
        ici[axis] = math.gcd(shape[axis], left)
        left //= ici[axis]
    if left != 1 or count % inside:
        raise ValueError(f"the axes cannot fill nodes of {inside} {chip.name}")
    return parallel.Mesh(
        ici=tuple(ici[axis] for axis in shape),
        dcn=tuple(shape[axis] // ici[axis] for axis in shape),
        axes=tuple(shape),
    )


def search(
    experiment: Experiment,
    change: Change,
    chip: Chip,
    *,
    num_devices: int,
    policies: Sequence[str | None] = POLICIES,
    max_compiles: int = 8,
    report: Callable[[str], None] = lambda line: None,
) -> Result:
    """The fastest candidates for `num_devices` of `chip`, at the batch that PERCORE_BATCH_SIZE x devices gives.

    Args:
      experiment: the config as it is.
      change: makes it anew with other knobs (values as they are typed).
      policies: values of CHECKPOINT_POLICY to try, `[None]` where there is no such knob.
      report: is told what is going on.
    """
    rows = _rows(experiment, num_devices)
    refused: dict[str, list[Any]] = defaultdict(list)
    found: list[Candidate] = []
    repeats = _repeats(experiment)
    for item in candidates(experiment.mesh, num_devices, rows, chip, policies, repeats):
        if isinstance(item, str):
            refused[item].append(None)
        else:
            found.append(item)
    report(f"{len(found)} candidates on {len({c.mesh for c in found})} meshes")
    experiments = {
        policy: change({} if policy is None else {"CHECKPOINT_POLICY": policy})
        for policy in policies
    }
    kept = {policy: activations(experiments[policy], chip) for policy in policies}
    for policy, its in kept.items():
        report(f"{policy or 'activations'}: {its.bytes / GIB:.4f} GiB a row are kept")
    scored = _score(experiment, found, kept, rows, chip, refused)
    compiled: list[tuple[Candidate, Plan]] = []
    later: list[Candidate] = []
    too_large: list[Candidate] = []
    for candidate in scored:
        if _keeps_more(candidate, too_large, kept):
            refused[
                "needs more memory than one on the same mesh that was compiled and does not fit"
            ].append(candidate)
            continue
        if len(compiled) == max_compiles:
            later.append(candidate)
            continue
        report(f"compiling {len(compiled) + 1} of at most {max_compiles}: {describe(candidate)}")
        try:
            plan = planner.plan(change(candidate.knobs), chip, num_devices=num_devices)
        except ValueError as error:
            refused[_kind(str(error))].append(candidate)
            if str(error).startswith("does not fit"):
                too_large.append(candidate)
            continue
        compiled.append((candidate, plan))
        if not plan.fits:
            too_large.append(candidate)
    compiled.sort(key=lambda pair: (not pair[1].fits, pair[1].estimate.step_seconds))
    return Result(compiled, dict(refused), later)


def activations(experiment: Experiment, chip: Chip) -> Activations:
    """What the backward pass of one more row keeps and computes, from the traced step: nothing runs.

    Traced for one row and for two: the difference leaves out what does not depend on the batch, the weights.
    """
    hardware = platform.Hardware(chip.platform, chip.compute_capability)
    with platform.traced_for(hardware), planner.fused_attention(chip):
        found = [_traced(experiment, rows) for rows in (1, 2)]
    return Activations(*(two - one for one, two in zip(*found, strict=True)))


def _repeats(experiment: Experiment) -> int:
    """How often the blocks of the model come, over all its stacks; 1 where it has none."""
    spec = experiment.train_data.spec(1)
    mesh = _one_device(experiment)
    with parallel.activate(mesh, experiment.training_rules):
        boxed = state_factory(experiment, spec, mesh).boxed().params
    stacks = [
        box.value.shape[0]
        for box in jax.tree.leaves(boxed, is_leaf=is_box)
        if is_box(box) and box.names[:1] == ("layers",)
    ]
    return math.gcd(*stacks) or 1


def _one_device(experiment: Experiment) -> jax.sharding.Mesh:
    one = parallel.Mesh(ici=(1,) * len(experiment.mesh.axes), axes=experiment.mesh.axes)
    return one.build(jax.devices()[:1])


def _traced(experiment: Experiment, rows: int) -> tuple[float, float]:
    """Bytes of what is kept, and FLOPs of both passes, for so many rows on one device."""
    spec = experiment.train_data.spec(rows)
    mesh = _one_device(experiment)
    with parallel.activate(mesh, experiment.training_rules):
        state = state_factory(experiment, spec, mesh).abstract()
        rest = dict(state.collections)

        def loss(params, batch):
            key = {"dropout": jax.random.key(0)}
            variables = {"params": params, **rest_of(batch)}
            return experiment.task.loss(experiment.model, variables, batch["batch"], key).objective

        rest_of = lambda batch: batch["rest"]
        batch = {"batch": batch_spec(spec, mesh), "rest": rest}
        pull_back = jax.eval_shape(
            lambda p, b: jax.vjp(lambda q: loss(q, b), p)[1], state.params, batch
        )
        kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull_back))
        traced = jax.make_jaxpr(jax.grad(loss))(state.params, batch)
        return kept, traced_flops(traced)


def _score(
    experiment: Experiment,
    found: Sequence[Candidate],
    kept: Mapping[str | None, Activations],
    rows: int,
    chip: Chip,
    refused: dict[str, list[Any]],
) -> list[Candidate]:
    """The candidates that may fit, those that probably do first, each part by the time of the formula."""
    usable = chip.memory_bytes * USABLE_MEMORY
    spec = experiment.train_data.spec(rows)
    boxed = None
    scores: dict[Candidate, tuple[bool, float]] = {}
    for mesh, its in itertools.groupby(found, key=lambda candidate: candidate.mesh):
        group = list(its)
        built = mesh.build(target.make_devices(mesh, chip))
        with planner.tracing(built, experiment, chip):
            if boxed is None:
                boxed = state_factory(experiment, spec, built).boxed()
            try:
                parallel.check_axes(mesh.shape, experiment.rules)
                abstract = state_factory(experiment, spec, built).place(boxed)
            except ValueError as error:
                refused[_kind(str(error))] += group
                continue
            memory = planner.fixed_memory(experiment, abstract, batch_spec(spec, built))
        fixed = memory.state + memory.batch + memory.gradients
        if fixed > usable:
            refused[
                f"state and gradients alone are more than the {usable / GIB:.1f} GiB of one {chip.name}"
            ] += group
            continue
        links = _Links(mesh, chip, abstract.params, experiment.compute_dtype)
        for candidate in group:
            # Accumulated microbatches follow one another; a pipeline keeps all of its own till the backward pass.
            at_once = 1 if candidate.stages > 1 else candidate.num_microbatches
            per_shard = kept[candidate.policy].bytes * rows / at_once
            least = fixed + per_shard / mesh.num_devices
            if least > usable:
                reason = (
                    "state, gradients and kept activations, spread over all devices, are more than "
                )
                refused[f"{reason}{usable / GIB:.1f} GiB"].append(candidate)
                continue
            likely = fixed + 1.1 * per_shard / mesh.num_batch_shards <= usable
            seconds = links.seconds(candidate, kept, rows)
            scores[candidate] = (not likely, seconds)
    return sorted(scores, key=lambda candidate: scores[candidate])


class _Links:
    """A rough time of a step on one mesh: products beside the weights that are gathered, then the rest."""

    def __init__(self, mesh: parallel.Mesh, chip: Chip, params: Any, dtype: str):
        self.mesh, self.chip = mesh, chip
        self.dtype, itemsize = dtype, np.dtype(jax.numpy.dtype(dtype)).itemsize
        self.weight_bytes = itemsize * sum(leaf.size for leaf in jax.tree.leaves(params))
        self.positions = np.arange(mesh.num_devices).reshape(tuple(mesh.shape.values()))
        coordinates = np.indices(tuple(mesh.shape.values()))
        over = [place // ici for place, ici in zip(coordinates, mesh.ici, strict=True)]
        self.nodes = np.ravel_multi_index(tuple(over), mesh.dcn).reshape(-1).tolist()

    def seconds(
        self, candidate: Candidate, kept: Mapping[str | None, Activations], rows: int
    ) -> float:
        shape, parts, stages = self.mesh.shape, candidate.num_microbatches, candidate.stages
        rate = self.chip.peak_flops(self.dtype) * ASSUMED.matmul * self.mesh.num_devices
        products = kept[candidate.policy].flops * rows / rate
        share = self.weight_bytes / shape.get("tensor", 1) / stages
        if (
            stages > 1
        ):  # stages that wait; weights are gathered and reduced once for all microbatches
            products /= 1 - parallel.bubble(stages, parts)
            parts = 1
        gathered = parts * 2 * self._time("all-gather", "fsdp", share)
        reduced = parts * self._time("reduce-scatter", "fsdp", share)
        reduced += parts * self._time("all-reduce", "data", share / shape.get("fsdp", 1))
        # What the leanest policy keeps of a row are the inputs of the blocks: each is reduced about five times.
        residual = min(its.bytes for its in kept.values()) * rows / self.mesh.num_batch_shards
        summed = self._time("all-reduce", "tensor", 5 * residual)
        return max(products, gathered + reduced) + summed + parts * self.chip.operation_seconds

    def _time(self, kind: str, axis: str, size: float) -> float:
        if self.mesh.shape.get(axis, 1) == 1:
            return 0.0
        along = np.moveaxis(self.positions, self.mesh.axes.index(axis), -1)
        group = tuple(along.reshape(-1, along.shape[-1])[0].tolist())
        collective = Collective("", kind, int(size), (group,))
        return collective_seconds(
            collective, chip=self.chip, nodes=self.nodes, efficiency=ASSUMED.links
        )[0]


def describe(candidate: Candidate) -> str:
    """`data=1 fsdp=8 tensor=2, 4 microbatches, SAVE_NOTHING`."""
    mesh = " ".join(f"{axis}={size}" for axis, size in candidate.mesh.shape.items())
    parts = (
        f"{candidate.num_microbatches} microbatch{'es' if candidate.num_microbatches > 1 else ''}"
    )
    return ", ".join([mesh, parts, *([candidate.policy] if candidate.policy else [])])


def _keeps_more(
    candidate: Candidate, too_large: Sequence[Candidate], kept: Mapping[str | None, Activations]
) -> bool:
    return any(
        other.mesh == candidate.mesh
        and other.num_microbatches >= candidate.num_microbatches
        and kept[other.policy].bytes <= kept[candidate.policy].bytes
        for other in too_large
    )


def _rows(experiment: Experiment, num_devices: int) -> int:
    """Rows of a step, whatever the mesh."""
    given = experiment.percore_batch_size
    exact = fractions.Fraction(given).limit_denominator(1 << 20) * num_devices
    if exact.denominator != 1 or exact < 1:
        raise ValueError(
            f"PERCORE_BATCH_SIZE={given} x {num_devices} devices = {float(exact):g} rows is not a whole number of rows"
        )
    return exact.numerator


def _factorisations(n: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (n,)
        return
    for first in (d for d in range(1, n + 1) if n % d == 0):
        for rest in _factorisations(n // first, parts - 1):
            yield (first, *rest)


def _kind(message: str) -> str:
    """What a refusal is about, without the numbers that differ from mesh to mesh."""
    found = re.search(
        r"its dimension '(\w+)' = (\d+) does not divide over the mesh axis (\w+)", message
    )
    if found:
        return f"'{found[1]}' = {found[2]} does not divide over {found[3]}"
    return message.split(";")[0]


def _typed(values: Sequence[object]) -> str:
    return f"[{','.join(map(str, values))}]"
