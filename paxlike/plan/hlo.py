"""Reads a compiled program as XLA prints it: what runs, how often, and what its collectives move.

Nothing here needs a device: the input is the text of `Compiled.as_text()`. A program is a set of computations; the
entry runs once, the body of a loop as often as its `known_trip_count` says, and what a fusion calls is one operation.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from paxlike.log.flops import turns

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "bf16": 16, "c64": 64, "c128": 128}
_BITS |= {f"{kind}{bits}": bits for kind in "suf" for bits in (8, 16, 32, 64)}

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\) -> .*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([^\s=]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([^\s,)}]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_OPERAND = re.compile(r"%([^\s,()]+)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array: the name of its type in XLA, and its dimensions."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes, without padding; types without values (tokens) have none."""
        bits = _BITS.get(self.dtype, 8 if self.dtype.startswith("f8") else 0)
        return -(-self.size * bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `%name = shapes opcode(operands), attributes`."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of the result; a tuple is flat
    operands: tuple[str, ...]
    arguments: str  # what stands between the parentheses
    attributes: str  # what stands behind them

    @property
    def bytes(self) -> int:
        """Bytes of the result."""
        return sum(shape.bytes for shape in self.shapes)

    @functools.cached_property
    def calls(self) -> dict[str, str]:
        """Role -> name of the computations that it calls."""
        found = dict(_CALLED.findall(self.attributes))
        if branches := _BRANCHES.search(self.attributes):
            names = [name.strip().lstrip("%") for name in branches[1].split(",")]
            found |= {f"branch{number}": name for number, name in enumerate(names)}
        return found

    @property
    def trip_count(self) -> int | None:
        """Turns of a while loop, or about how many by its name; None where nobody knows."""
        if found := _TRIPS.search(self.attributes):
            return int(found[1])
        return turns(self.op_name)

    @property
    def op_name(self) -> str:
        """The scopes that it was traced in, `jit(train_step)/.../while`; empty where it has none."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""

    @property
    def backend_config(self) -> dict:
        """The JSON behind `backend_config=`, `{}` where there is none."""
        at = self.attributes.find("backend_config={")
        if at < 0:
            return {}
        try:
            return json.JSONDecoder().raw_decode(self.attributes, at + len("backend_config="))[0]
        except json.JSONDecodeError:
            return {}


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order in which they run where the program is scheduled."""

    name: str
    instructions: Mapping[str, Instruction]
    root: str

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions whose results it reads."""
        return [self.instructions[n] for n in instruction.operands if n in self.instructions]

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Name -> instructions that read it."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for name in dict.fromkeys(instruction.operands):
                if name in found:
                    found[name].append(instruction)
        return found


@dataclasses.dataclass(frozen=True)
class Module:
    """A whole program."""

    computations: Mapping[str, Computation]
    entry: str
    num_devices: int

    def executed(
        self, whole: Callable[[Instruction], bool] | None = None
    ) -> Iterator[tuple[Instruction, Computation, int]]:
        """Every operation that runs, with how often; loops multiplied, the inside of a fusion left out.

        Of a conditional all branches are given, of a loop without a known number of turns one turn. Loops for which
        `whole` is true are given themselves, not what runs inside.
        """
        yield from self._executed(self.computations[self.entry], 1, whole)

    def _executed(self, computation: Computation, times: int, whole):
        for instruction in computation.instructions.values():
            calls = instruction.calls
            if instruction.opcode == "while" and not (whole is not None and whole(instruction)):
                turns = instruction.trip_count
                body = self.computations[calls["body"]]
                yield from self._executed(body, times * (1 if turns is None else turns), whole)
            elif instruction.opcode in ("call", "conditional"):
                for name in calls.values():
                    yield from self._executed(self.computations[name], times, whole)
            else:
                yield instruction, computation, times

    @property
    def unknown_loops(self) -> list[str]:
        """Loops whose number of turns the compiler did not know: they are counted once."""
        return [
            instruction.name
            for computation in self.computations.values()
            for instruction in computation.instructions.values()
            if instruction.opcode == "while" and instruction.trip_count is None
        ]

    def collective(self, instruction: Instruction, computation: Computation) -> Collective | None:
        """The collective that an operation is or begins, None for others and for the end of one."""
        opcode = instruction.opcode.removesuffix("-start")
        if opcode == "async" and "calls" in instruction.calls:
            inside = self.computations[instruction.calls["calls"]]
            for wrapped in inside.instructions.values():
                if wrapped.opcode in COLLECTIVES:
                    found = self.collective(wrapped, inside)
                    assert found is not None
                    return dataclasses.replace(found, name=instruction.name, is_async=True)
            return None
        if opcode not in COLLECTIVES:
            return None
        shapes = [
            shape for operand in computation.operands(instruction) for shape in operand.shapes
        ]
        if opcode == "collective-permute":
            groups = _pairs(instruction.attributes)
        else:
            groups = replica_groups(instruction.attributes, self.num_devices)
        size = len(groups[0]) if groups else 1
        operand = sum(shape.bytes for shape in shapes)
        if opcode == "ragged-all-to-all":
            # What is sent, what it is written into, and four lists of numbers; sizes are known at run time alone. The
            # smaller of the two is what devices send if all rows of it are real: a buffer has places to spare.
            operand = min(shape.bytes for shape in shapes[:2])
        return Collective(
            instruction.name,
            opcode,
            operand * size if opcode == "all-gather" else operand,
            groups,
            tuple(sorted({shape.dtype for shape in shapes})),
            instruction.opcode.endswith("-start"),
        )

    def collectives(self) -> Iterator[tuple[Collective, int]]:
        """All collectives with how often they run; a start and its done are one."""
        for instruction, computation, times in self.executed():
            found = self.collective(instruction, computation)
            if found is not None and found.group_size > 1:
                yield found, times


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation, as each device takes part in it.

    Attributes:
      bytes: of the whole array that a group gathers, reduces, scatters or exchanges, as one device sees it: an
        all-gather's result, the input of all others (of a ragged exchange: the most that it can be).
      groups: positions of the devices that work together, in the order of the mesh; for a permute (from, to).
      is_async: it ends at a `done` of its own, and other operations may run until then.
    """

    name: str
    kind: str
    bytes: int
    groups: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...] = ()
    is_async: bool = False

    @property
    def group_size(self) -> int:
        """Devices that work together."""
        return max((len(set(group)) for group in self.groups), default=1)

    @property
    def sent_bytes(self) -> int:
        """Bytes that each device sends with a ring algorithm."""
        n = self.group_size
        if self.kind == "collective-permute":
            return self.bytes
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.bytes * (n - 1) // n

    def axes(self, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
        """The mesh axes along which the devices of a group differ."""
        names, sizes = list(mesh_shape), tuple(mesh_shape.values())
        differ: set[int] = set()
        for group in self.groups:
            places = np.array(np.unravel_index(np.array(group), sizes))
            differ |= set(np.flatnonzero((places != places[:, :1]).any(axis=1)).tolist())
        return tuple(names[number] for number in sorted(differ))


def parse(text: str) -> Module:
    """The program of `Compiled.as_text()`; ValueError where it has no entry."""
    computations: dict[str, Computation] = {}
    entry = name = root = ""
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
        if not name:
            if header := _HEADER.match(line):
                name, instructions, root = header[2], {}, ""
                entry = name if header[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, instructions, root)
            name = ""
        elif start := _NAME.match(line):
            instructions[start[2]] = _instruction(start[2], line[start.end() :])
            root = start[2] if start[1] else root
    if entry not in computations:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY computation")
    return Module(computations, entry, _num_devices(text))


def _num_devices(text: str) -> int:
    header = text[: text.find("\n")]
    counts = [re.search(rf"{name}=(\d+)", header) for name in ("num_partitions", "replica_count")]
    return math.prod(int(found[1]) for found in counts if found)


def _instruction(name: str, text: str) -> Instruction:
    """`f32[2]{0} add(%a, %b), metadata={...}`; layouts and comments may hold parentheses, in pairs."""
    end = _closing(text, 0) + 1 if text.startswith("(") else _first_space(text)
    found = _OPCODE.match(text, end)
    if found is None:  # no operation that is known here
        return Instruction(name, "", _shapes(text[:end]), (), "", text[end:])
    close = _closing(text, found.end() - 1)
    arguments, attributes = text[found.end() : close], text[close + 1 :]
    operands = tuple(_OPERAND.findall(arguments))
    return Instruction(name, found[1], _shapes(text[:end]), operands, arguments, attributes)


def _first_space(text: str) -> int:
    at = text.find(" ")
    return len(text) if at < 0 else at


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(
        Shape(dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n))
        for dtype, dims in _SHAPE.findall(text)
    )


def replica_groups(attributes: str, num_devices: int) -> tuple[tuple[int, ...], ...]:
    """The groups of a collective in any of XLA's three notations.

    `{{0,1},{2,3}}`; `[2,2]<=[2,2]T(1,0)`, the numbers of the second shape, transposed and cut into the first;
    `mesh['a'=2,'b'=2] {'b'}`, the devices of a mesh along some of its axes. Empty ones mean all devices.

    >>> replica_groups("replica_groups=[2,2]<=[2,2]T(1,0)", 4)
    ((0, 2), (1, 3))
    """
    at = attributes.find("replica_groups=")
    rest = attributes[at + len("replica_groups=") :] if at >= 0 else "{}"
    if found := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        return _tuples(_iota(found[2], found[3]).reshape(_numbers(found[1])))
    if found := re.match(r"@?(?:mesh)?[\[<]([^\]>]*)[\]>]\s*(.*)", rest):
        return _along(found[1], found[2], rest)
    if rest.startswith("{{"):
        groups = re.findall(r"\{([\d,]*)\}", rest[1 : rest.find("}}") + 1])
        return tuple(_numbers(group) for group in groups)
    return (tuple(range(num_devices)),)


def _along(mesh: str, axes: str, text: str) -> tuple[tuple[int, ...], ...]:
    """Groups along `{'b'}`, or `{'a':(2)4}`: of an axis of size n the part of size 4 behind the first 2."""
    sizes = {name: int(size) for name, size in re.findall(r"['\"]?([\w.]+)['\"]?=(\d+)", mesh)}
    numbers = np.arange(math.prod(sizes.values()))
    if order := re.search(r"device_ids=\(?\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        numbers = _iota(order[1], order[2]).reshape(-1)
    wanted = re.findall(
        r"['\"]?([\w.]+)['\"]?(?::\((\d+)\)(\d+))?", axes[axes.find("{") + 1 : axes.find("}")]
    )
    split: list[int] = []  # the mesh with the named parts of axes as dimensions of their own
    place: dict[tuple[str, str], int] = {}
    for axis, size in sizes.items():
        parts = [(int(before), int(part)) for name, before, part in wanted if name == axis and part]
        if not parts:
            place[axis, ""] = len(split)
            split.append(size)
            continue
        done = 1
        for before, part in sorted(parts):
            if before > done:
                split.append(before // done)
            place[axis, str(before)] = len(split)
            split.append(part)
            done = before * part
        if size > done:
            split.append(size // done)
    dims = [place[name, before] for name, before, _ in wanted]
    moved = np.moveaxis(numbers.reshape(split), dims, range(-len(dims), 0))
    return _tuples(moved.reshape(-1, math.prod(split[dim] for dim in dims)))


def _iota(dims: str, permutation: str | None) -> np.ndarray:
    array = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return array if permutation is None else array.transpose(_numbers(permutation))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


def _tuples(array: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in array.tolist())


def _pairs(attributes: str) -> tuple[tuple[int, ...], ...]:
    found = re.search(r"source_target_pairs=\{((?:\{[\d,]+\},?)*)\}", attributes)
    return tuple(_numbers(pair) for pair in re.findall(r"\{([\d,]+)\}", found[1])) if found else ()


def dims_in(text: str) -> tuple[int, ...]:
    """`{0,1}` -> (0, 1)."""
    return _numbers(text.strip("{}"))


def attribute(instruction: Instruction, name: str) -> str | None:
    """The text of `name={...}` or `name=word` of an instruction."""
    found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^\s,]+)", instruction.attributes)
    return found[1] if found else None


def contracted(shape: Shape, dims: Sequence[int]) -> int:
    """Length of a contraction over these dimensions of an operand."""
    return math.prod(shape.dims[dim] for dim in dims)
