"""Whether a compiled step multiplies in 8 bits where it was told to: products asked for beside products found.

The three products of a weight carry names (`paxlike.ops.fp8`), in the traced step and in what the compiler makes of it.
What the trace holds is expected, loops multiplied; each product found under the same name with 8-bit operands, or as
cuBLASLt's 8-bit call, answers one. A product that is computed again in the backward pass is expected once, and so is
one that is a loop over blocks (`paxlike.ops.grouped`).
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from paxlike import compat
from paxlike.ops.fp8 import SCOPE
from paxlike.plan import hlo

_KIND = re.compile(rf"/{SCOPE}(forward|input_grad|weight_grad)(?:/|$)")
_RECOMPUTED = re.compile(r"\brematted_computation\b|\bcheckpoint/rematted")
_NAME = re.compile(r"^[a-z]\w*$")
_FRAMES = {"while", "body", "cond", "closed_call", "checkpoint", "rematted_computation", "remat"}
_FRAMES |= {"shard_map", "core_call", "pjit", "fp8"}
Key = tuple[str, str]  # layer, product


@dataclasses.dataclass(frozen=True)
class Products:
    """How often a device multiplies in 8 bits in one step.

    Attributes:
      expected, found: of all layers and products; `found` counts no product that was not expected.
      missing: layer -> how many of its products are not in 8 bits.
    """

    expected: int
    found: int
    missing: dict[str, int]

    def line(self) -> str:
        """`FP8 products: 36 of 36`, and which layers fell back."""
        text = f"FP8 products: {self.found:,} of {self.expected:,}"
        if not self.missing:
            return text
        layers = ", ".join(f"{layer} ({count:,})" for layer, count in self.missing.items())
        return (
            f"{text}; the compiler fell back to a wider type in {layers}: see XLA_FLAGS "
            "(--xla_gpu_enable_triton_gemm=false lets cuBLASLt have them)"
        )


def count(traced: Any, module: hlo.Module) -> Products | None:
    """The products of a traced step (`jit(...).trace(...)`) in its compiled form; None where it asks for none."""
    expected = asked_for(traced)
    return compare(expected, made(module)) if expected else None


def compare(expected: Counter[Key], found: Counter[Key]) -> Products:
    """`expected` against `found`."""
    lacking = {key: max(0, number - found[key]) for key, number in expected.items()}
    missing: Counter[str] = Counter()
    for (layer, _), number in lacking.items():
        missing[layer] += number
    total = expected.total()
    return Products(total, total - sum(lacking.values()), dict(+missing))


def asked_for(traced: Any) -> Counter[Key]:
    """(layer, product) -> times that a device computes it, of the trace of a step."""
    found: Counter[Key] = Counter()
    for name, times in _products(compat.without_dead_code(traced.jaxpr), "", 1):
        if not _RECOMPUTED.search(name) and (key := _key(name)):
            found[key] += times
    return found


def made(module: hlo.Module) -> Counter[Key]:
    """The same of a compiled program: what is multiplied in 8 bits there, recomputed products too."""
    found: Counter[Key] = Counter()
    for instruction, computation, times in module.executed(whole=_is_product):
        if instruction.opcode == "while":
            # By the name of the loop: of two loops that do the same, the compiler keeps the inside of one.
            body = module.computations[instruction.calls["body"]]
            if (key := _key_of(instruction)) and _has_narrow(module, body):
                found[key] += times
            continue
        for one, where in _with_fused(module, instruction, computation):
            if _is_narrow(one, where) and (key := _key_of(one)):
                found[key] += times
    return found


def _is_product(loop: hlo.Instruction) -> bool:
    return _key_of(loop) is not None


def _key_of(instruction: hlo.Instruction) -> Key | None:
    return _key(instruction.op_name)


def _has_narrow(module: hlo.Module, body: hlo.Computation) -> bool:
    return any(
        _is_narrow(one, where)
        for instruction in body.instructions.values()
        for one, where in _with_fused(module, instruction, body)
    )


def _with_fused(
    module: hlo.Module, instruction: hlo.Instruction, computation: hlo.Computation
) -> list[tuple[hlo.Instruction, hlo.Computation]]:
    """An operation, or those of a fusion, and the computations that they stand in."""
    if instruction.opcode != "fusion":
        return [(instruction, computation)]
    called = module.computations[instruction.calls["calls"]]
    return [(one, called) for one in [instruction, *called.instructions.values()]]


def _is_narrow(instruction: hlo.Instruction, computation: hlo.Computation) -> bool:
    if instruction.opcode == "custom-call":
        return "matmul$f8" in instruction.attributes
    if instruction.opcode != "dot":
        return False
    shapes = [shape for operand in computation.operands(instruction) for shape in operand.shapes]
    return len(shapes) == 2 and all(shape.dtype.startswith("f8") for shape in shapes)


def _key(name: str) -> Key | None:
    """`.../while/body/period_0/mixer/qkv/qkv._product/fp8/fp8_forward/dot_general` -> (period_0/mixer/qkv, forward)."""
    kind = _KIND.search(name)
    if kind is None:
        return None
    parts = [part for part in name[: kind.start()].split("/") if _NAME.match(part)]
    return "/".join(part for part in parts if part not in _FRAMES), kind[1]


def _products(jaxpr: Any, prefix: str, times: int) -> Iterator[tuple[str, int]]:
    """(name, how often) of the matrix products of a jaxpr."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name = f"{prefix}/{equation.source_info.name_stack}"
        if equation.primitive.name == "dot_general":
            yield name, times
        is_scan = equation.primitive.name == "scan" and not _KIND.search(name)
        turns = equation.params["length"] if is_scan else 1
        for value in equation.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                if hasattr(item, "eqns") or hasattr(getattr(item, "jaxpr", None), "eqns"):
                    yield from _products(item, name, times * turns)
