"""An estimate of the time of a step, from the compiled program in the order in which the compiler scheduled it.

Two things go on at a time: operations one after the other, each bound by its products or by its memory traffic
(the roofline of Williams et al. 2009), and collectives one after the other. A collective that ends at a `done` of its
own runs beside what the compiler put in between; all others stop the operations. Nothing overlaps beyond that order,
and a turn of a loop ends before the next begins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from paxlike.plan.chips import ASSUMED, Chip, Efficiency
from paxlike.plan.cost import products, traffic
from paxlike.plan.hlo import Collective, Computation, Module


@dataclasses.dataclass
class Total:
    """What all runs of one kind of collective along one set of axes come to, on one device.

    Attributes:
      count: how often it runs in a step.
      bytes: of the arrays that are gathered, reduced, scattered or exchanged.
      sent_bytes: that a device sends, by a ring.
      seconds: estimated.
      across_nodes: whether its groups reach over several nodes.
    """

    kind: str
    axes: tuple[str, ...]
    across_nodes: bool
    count: int = 0
    bytes: int = 0
    sent_bytes: int = 0
    seconds: float = 0.0


@dataclasses.dataclass
class Estimate:
    """Seconds of one step on one device, and what they are made of.

    Attributes:
      step_seconds: collectives beside operations where the compiler scheduled them so.
      compute_seconds: of all operations; `product_seconds` of those bound by matrix products, `memory_seconds` of
        those bound by memory traffic, the rest is starting them.
      collective_seconds: of all collectives; `exposed_seconds` of them nothing ran beside.
      flops: of the matrix products that a device executes, recomputation included.
      memory_bytes: read and written.
    """

    step_seconds: float = 0.0
    compute_seconds: float = 0.0
    product_seconds: float = 0.0
    memory_seconds: float = 0.0
    collective_seconds: float = 0.0
    flops: int = 0
    memory_bytes: int = 0
    num_operations: int = 0
    collectives: dict[tuple, Total] = dataclasses.field(default_factory=dict)

    @property
    def exposed_seconds(self) -> float:
        """Seconds in which the operations wait for collectives."""
        return self.step_seconds - self.compute_seconds

    @property
    def seconds_without_overlap(self) -> float:
        """All collectives after all operations."""
        return self.compute_seconds + self.collective_seconds

    @property
    def seconds_with_full_overlap(self) -> float:
        """As if everything could run beside everything: the lower bound."""
        return max(self.compute_seconds, self.collective_seconds)


def estimate(
    module: Module,
    *,
    chip: Chip,
    mesh_shape: Mapping[str, int],
    nodes: Sequence[int],
    efficiency: Efficiency = ASSUMED,
) -> Estimate:
    """The estimate for a compiled program.

    Args:
      mesh_shape: size of each mesh axis.
      nodes: the node that each device of the mesh is in, in the order of the mesh.
    """
    clock = _Clock(module, chip, mesh_shape, nodes, efficiency)
    clock.result.step_seconds = clock.run(module.computations[module.entry], 1)
    return clock.result


class _Clock:
    def __init__(self, module, chip, mesh_shape, nodes, efficiency):
        self.module, self.chip, self.mesh_shape = module, chip, mesh_shape
        self.nodes, self.efficiency = nodes, efficiency
        self.result = Estimate()

    def run(self, computation: Computation, times: int) -> float:
        """Seconds of one run; what it does is added to the result `times` times."""
        now = free = 0.0  # of the operations, and when the last collective ends
        ends: dict[str, float] = {}  # of the collectives under way
        for instruction in computation.instructions.values():
            calls = instruction.calls
            if instruction.opcode == "while":
                turns = instruction.trip_count
                turns = 1 if turns is None else turns
                body = self.module.computations[calls["body"]]
                now += turns * self.run(body, times * turns) if turns else 0.0
            elif instruction.opcode in ("call", "conditional"):
                inner = [self.run(self.module.computations[n], times) for n in calls.values()]
                now += max(inner, default=0.0)
            elif instruction.opcode.endswith("-done"):
                now = max([now, *(ends.pop(name) for name in instruction.operands if name in ends)])
            elif (found := self.module.collective(instruction, computation)) is not None:
                if found.group_size > 1:
                    free = max(now, free) + self._collective(found, times)
                    if found.is_async:
                        ends[instruction.name] = free
                    else:
                        now = free
            else:
                now += self._operation(instruction, computation, times)
        return max([now, *ends.values()])

    def _operation(self, instruction, computation, times: int) -> float:
        moved = traffic(self.module, instruction, computation)
        found = products(self.module, instruction, computation)
        if not moved and not found:
            return 0.0
        product_seconds = sum(
            product.flops
            / self.chip.peak_flops(product.dtype)
            / (self.efficiency.attention if product.fused else self.efficiency.matmul)
            for product in found
        )
        memory_seconds = moved / (self.chip.memory_bandwidth * self.efficiency.memory)
        seconds = max(product_seconds, memory_seconds) + self.chip.operation_seconds
        result = self.result
        result.num_operations += times
        result.flops += times * sum(product.flops for product in found)
        result.memory_bytes += times * moved
        result.compute_seconds += times * seconds
        if product_seconds >= memory_seconds:
            result.product_seconds += times * product_seconds
        else:
            result.memory_seconds += times * memory_seconds
        return seconds

    def _collective(self, collective: Collective, times: int) -> float:
        axes = collective.axes(self.mesh_shape)
        seconds, across = collective_seconds(
            collective, chip=self.chip, nodes=self.nodes, efficiency=self.efficiency.links
        )
        key = (collective.kind, axes, across)
        total = self.result.collectives.setdefault(key, Total(collective.kind, axes, across))
        total.count += times
        total.bytes += times * collective.bytes
        total.sent_bytes += times * collective.sent_bytes
        total.seconds += times * seconds
        self.result.collective_seconds += times * seconds
        return seconds


def collective_seconds(
    collective: Collective, *, chip: Chip, nodes: Sequence[int], efficiency: float
) -> tuple[float, bool]:
    """Seconds of one collective, and whether its groups reach over several nodes.

    Every byte passes the links of a device, and the network adapters that a group has in each node together carry what
    comes from other nodes; the slower of the two counts. Of n devices each receives (n-1)/n of the array, twice for an
    all-reduce.
    """
    group = collective.groups[0]
    if collective.kind == "collective-permute":
        across = any(len({nodes[place] for place in pair}) > 1 for pair in collective.groups)
        rate, wait = (
            (chip.network_bandwidth, chip.network_seconds)
            if across
            else (chip.link_bandwidth, chip.link_seconds)
        )
        return wait + collective.bytes / (rate * efficiency), across
    num_nodes = max(len({nodes[place] for place in group}) for group in collective.groups)
    n, across = len(group), num_nodes > 1
    seconds = collective.sent_bytes / (chip.link_bandwidth * efficiency)
    if across:
        passes = 2 if collective.kind == "all-reduce" else 1
        adapters = n / num_nodes
        wanted = passes * collective.bytes * (num_nodes - 1) / num_nodes
        if collective.kind.endswith("all-to-all"):  # each device sends to every node
            wanted, adapters = collective.bytes * (num_nodes - 1) / num_nodes, 1
        seconds = max(seconds, wanted / (adapters * chip.network_bandwidth * efficiency))
    return seconds + (chip.network_seconds if across else chip.link_seconds), across
