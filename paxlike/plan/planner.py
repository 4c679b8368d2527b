"""Compiles the training step of an experiment for devices that need not exist, and says what it would take.

The program is the one that a run compiles (`paxlike.train.program.jit_step`), on the mesh of the config. No array is
made and no data is read: the step is traced on shapes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import resource
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax

from paxlike import compat, parallel
from paxlike.log.flops import traced_flops
from paxlike.ops import platform
from paxlike.plan import fp8, hlo, target
from paxlike.plan.chips import ASSUMED, USABLE_MEMORY, Chip, Efficiency
from paxlike.plan.timeline import Estimate, estimate
from paxlike.train.program import batch_spec, jit_step, model_flops, state_factory
from paxlike.train.state import num_parameters

if TYPE_CHECKING:
    from paxlike.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
      parameters, moments, other_state, batch: what the step is given; `moments` is the state of the optimizer and the
        averaged parameters.
      gradients: of the trained parameters in float32, sharded as they are; not an amount that the compiler reports, but
        part of `temporaries`.
      temporaries: everything that lives inside the step only: gradients, activations, gathered weights.
      peak: the most that is alive at a time, as the compiler says.
      trusted: whether `temporaries` and `peak` are those of the chip.
    """

    parameters: int
    moments: int
    other_state: int
    batch: int
    gradients: int
    temporaries: int
    peak: int
    trusted: bool

    @property
    def state(self) -> int:
        """Bytes that stay from step to step."""
        return self.parameters + self.moments + self.other_state

    @property
    def activations(self) -> int:
        """Peak less what is known by arithmetic: activations, gathered weights and what else is alive then."""
        return max(0, self.peak - self.state - self.batch - self.gradients)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one step of an experiment would take on a mesh of a chip.

    Attributes:
      mesh: size of each axis; `num_nodes` x `per_node` devices.
      flops: that the model needs, of all devices; the executed ones of a device are in `estimate`.
      traced_flops: of the products in the traced step, of all devices: with what is recomputed.
      attention: the form of attention that was compiled.
      fp8: 8-bit products that were asked for and found, None where none were.
    """

    name: str
    chip: Chip
    mesh: dict[str, int]
    ici: tuple[int, ...]
    dcn: tuple[int, ...]
    num_nodes: int
    per_node: int
    rows: int
    tokens: int
    num_parameters: int
    num_trained: int
    num_microbatches: int
    compute_dtype: str
    memory: Memory
    flops: int
    traced_flops: int
    estimate: Estimate
    efficiency: Efficiency
    attention: str
    fp8: fp8.Products | None
    notices: tuple[str, ...]
    trace_seconds: float
    compile_seconds: float
    host_memory_peak: int

    @property
    def num_devices(self) -> int:
        """Devices of the mesh."""
        return math.prod(self.mesh.values())

    @property
    def usable_memory(self) -> int:
        """Bytes of a device that a program may take."""
        return int(self.chip.memory_bytes * USABLE_MEMORY)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the usable memory."""
        return self.memory.peak <= self.usable_memory

    @property
    def tokens_per_second(self) -> float:
        """Of all devices."""
        return self.tokens / self.estimate.step_seconds

    @property
    def rows_per_second(self) -> float:
        """Of all devices."""
        return self.rows / self.estimate.step_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs per second over the peak rate; the convention is `paxlike.log.throughput.MFU_CONVENTION`."""
        peak = self.chip.peak_flops(self.compute_dtype) * self.num_devices
        return self.flops / self.estimate.step_seconds / peak


def plan(
    experiment: Experiment,
    chip: Chip,
    *,
    num_devices: int | None = None,
    efficiency: Efficiency = ASSUMED,
) -> Plan:
    """The plan for `experiment` on its mesh.

    Args:
      num_devices: of the mesh; needed where one of its sizes is -1, and otherwise checked.

    Raises:
      ValueError: in one line, for what cannot work, before anything is compiled.
    """
    program = lower(experiment, chip, num_devices=num_devices)
    return program.compile(efficiency=efficiency)


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced step, and the shapes of what it takes."""

    experiment: Experiment
    chip: Chip
    mesh: jax.sharding.Mesh
    nodes: list[int]
    abstract: Any
    spec: Any
    traced: Any
    lowered: Any
    flops: int
    traced_flops: int
    notices: tuple[str, ...]
    seconds: float

    def compile(self, *, efficiency: Efficiency = ASSUMED) -> Plan:
        """Compiles it and reads what the compiler made of it."""
        started = time.monotonic()
        try:
            compiled = self.lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(_compile_error(error, self.chip)) from error
        return self.read(compiled, time.monotonic() - started, efficiency=efficiency)

    def read(self, compiled: Any, seconds: float, *, efficiency: Efficiency = ASSUMED) -> Plan:
        """The plan of the program as it was compiled, which took so many seconds."""
        module = hlo.parse(compiled.as_text())
        estimated = estimate(
            module,
            chip=self.chip,
            mesh_shape=dict(self.mesh.shape),
            nodes=self.nodes,
            efficiency=efficiency,
        )
        fused = any("fmha" in op.attributes for op, *_ in module.executed())
        notices = list(self.notices)
        if self.chip.platform == "tpu":
            estimated = self._with_traced_products(estimated, efficiency)
            notices.append(
                "a TPU program folds products and collectives into loops and fusions that are not read here: the "
                "FLOPs are the traced ones, collectives are missing, and the time is a lower bound"
            )
        elif module.unknown_loops:
            notices.append(
                f"{len(module.unknown_loops)} loops have no known number of turns and are counted once: the estimate "
                "of the time is too low"
            )
        experiment = self.experiment
        mesh = experiment.mesh
        return Plan(
            name=experiment.name,
            chip=self.chip,
            mesh=dict(self.mesh.shape),
            ici=mesh.ici,
            dcn=mesh.dcn,
            num_nodes=len(set(self.nodes)),
            per_node=target.devices_per_node(mesh, self.chip),
            rows=experiment.global_batch_size,
            tokens=math.prod(self.spec["tokens"].shape),
            num_parameters=num_parameters(self.abstract.params),
            num_trained=num_parameters(experiment.optimizer.select(self.abstract.params)),
            num_microbatches=experiment.num_microbatches,
            compute_dtype=experiment.compute_dtype,
            memory=self._memory(compiled),
            flops=self.flops,
            traced_flops=self.traced_flops,
            estimate=estimated,
            efficiency=efficiency,
            attention="cuDNN, fused" if fused else "XLA, not fused",
            fp8=fp8.count(self.traced, module) if self.chip.platform == "cuda" else None,
            notices=tuple(notices),
            trace_seconds=self.seconds,
            compile_seconds=seconds,
            host_memory_peak=_host_memory_peak(),
        )

    def _with_traced_products(self, estimated: Estimate, efficiency: Efficiency) -> Estimate:
        """The estimate with the products of the trace, evenly spread, in place of those of the program."""
        flops = self.traced_flops // self.mesh.size
        peak = self.chip.peak_flops(self.experiment.compute_dtype) * efficiency.matmul
        seconds = flops / peak - estimated.product_seconds
        return dataclasses.replace(
            estimated,
            flops=flops,
            product_seconds=flops / peak,
            compute_seconds=estimated.compute_seconds + seconds,
            step_seconds=estimated.step_seconds + seconds,
        )

    def _memory(self, compiled) -> Memory:
        analysis = compiled.memory_analysis()
        fixed = fixed_memory(self.experiment, self.abstract, self.spec)
        peak = int(getattr(analysis, "peak_memory_in_bytes", 0))
        temporaries = int(analysis.temp_size_in_bytes)
        if self.chip.platform == "cpu" or peak == 0:
            peak = int(analysis.argument_size_in_bytes) + temporaries
        return dataclasses.replace(
            fixed, temporaries=temporaries, peak=peak, trusted=self.chip.platform != "cpu"
        )


def lower(experiment: Experiment, chip: Chip, *, num_devices: int | None = None) -> Program:
    """Traces the step of `experiment` for its mesh of `chip`; see `plan`."""
    if experiment.train_data is None:
        raise ValueError(
            f"{experiment.name} has no training data: there is no training step to plan"
        )
    if num_devices is None:
        if -1 in experiment.mesh.ici:
            raise ValueError(
                f"ICI_MESH_SHAPE={list(experiment.mesh.ici)} takes what devices there are: say how many with "
                "--devices=N"
            )
        num_devices = experiment.mesh.num_devices
    experiment = experiment.on_devices(num_devices)
    rows = experiment.global_batch_size
    started = time.monotonic()
    devices = target.make_devices(experiment.mesh, chip)
    mesh = experiment.mesh.build(devices)
    shapes = experiment.train_data.spec(rows)
    notices: list[str] = []
    with tracing(mesh, experiment, chip):
        spec = batch_spec(shapes, mesh)
        factory = state_factory(experiment, shapes, mesh)
        abstract = factory.abstract()
        jitted = jit_step(experiment, factory)
        traced = jitted.trace(abstract, spec)
        lowered = traced.lower(lowering_platforms=(chip.platform,))
        flops = model_flops(experiment, abstract, spec)
        executed = traced_flops(traced.jaxpr)
    if chip.platform == "cpu":
        notices.append(
            "compiled for a CPU: its temporary memory and so the peak are not those of an accelerator, and neither is "
            "the time; the state, the FLOPs and the kinds of collectives are"
        )
    return Program(
        experiment,
        chip,
        mesh,
        target.node_numbers(list(mesh.devices.flat), experiment.mesh, chip),
        abstract,
        spec,
        traced,
        lowered,
        flops,
        executed,
        tuple(notices),
        time.monotonic() - started,
    )


@contextlib.contextmanager
def tracing(mesh: jax.sharding.Mesh, experiment: Experiment, chip: Chip) -> Iterator[None]:
    """What has to be in force while the step is traced and compiled."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            platform.traced_for(platform.Hardware(chip.platform, chip.compute_capability))
        )
        stack.enter_context(fused_attention(chip))
        stack.enter_context(parallel.activate(mesh, experiment.training_rules))
        yield


def fused_attention(chip: Chip) -> contextlib.AbstractContextManager:
    """In which fused attention may be traced for `chip`, whatever is installed."""
    if chip.platform != "cuda":
        return contextlib.nullcontext()
    return compat.without_cudnn(chip.compute_capability)


def fixed_memory(experiment: Experiment, abstract: Any, spec: Any) -> Memory:
    """What is known of a device's memory before anything is compiled: `temporaries` and `peak` are 0."""
    trained = experiment.optimizer.select(abstract.params)
    return Memory(
        parameters=device_bytes(abstract.params),
        moments=device_bytes(abstract.opt_state) + device_bytes(abstract.ema),
        other_state=device_bytes(abstract.collections),
        batch=device_bytes(spec),
        gradients=device_bytes(trained, itemsize=4),
        temporaries=0,
        peak=0,
        trusted=False,
    )


def device_bytes(tree: Any, *, itemsize: int | None = None) -> int:
    """Bytes of one device's shards of abstract arrays with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * (itemsize or leaf.dtype.itemsize)
        for leaf in jax.tree.leaves(tree)
    )


def _host_memory_peak() -> int:
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident * (1 if sys.platform == "darwin" else 1024)


def _compile_error(error: Exception, chip: Chip) -> str:
    text = " ".join(str(error).split())
    if "RESOURCE_EXHAUSTED" in text:
        return f"does not fit: the compiler for {chip.name} says {text[:300]}"
    return f"the compiler for {chip.name} refused the step: {text[:600]}"
