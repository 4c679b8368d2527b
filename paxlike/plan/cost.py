"""What one operation of a compiled program costs: FLOPs of its matrix products and bytes that it reads and writes.

Both are read from the text of the program (`paxlike.plan.hlo`), so that what the compiler duplicated, recomputed or
failed to shard counts, other than in the FLOPs of the model.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from paxlike.plan.hlo import Computation, Instruction, Module, Shape, attribute, contracted, dims_in

# What neither computes nor moves: names for what is there, ends of what began before, collectives (another model's).
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "optimization-barrier",
    "opt-barrier",
    "domain",
    "",
}
_SAME = (
    "bitcast",
    "reshape",
    "get-tuple-element",
    "copy",
    "convert",
)  # between a fusion's parameter and its slice
_DTYPES = {"f64": "float64", "f32": "float32", "bf16": "bfloat16", "f16": "float16"}


@dataclasses.dataclass(frozen=True)
class Product:
    """FLOPs of matrix products, with the type of their operands; of fused attention if `fused`."""

    flops: int
    dtype: str
    fused: bool = False


def products(module: Module, instruction: Instruction, computation: Computation) -> list[Product]:
    """The matrix products of an operation, those inside a fusion included."""
    opcode = instruction.opcode
    if opcode == "dot":
        lhs = computation.operands(instruction)[0].shapes[0]
        dims = dims_in(attribute(instruction, "lhs_contracting_dims") or "{}")
        return [_product(instruction.shapes[0], contracted(lhs, dims), lhs)]
    if opcode == "convolution":
        return [_convolution(instruction, computation)]
    if opcode == "custom-call":
        return _custom_call(instruction, computation)
    if opcode.removesuffix("-start") in ("fusion", "async") and "calls" in instruction.calls:
        inside = module.computations[instruction.calls["calls"]]
        return [
            product
            for inner in inside.instructions.values()
            for product in products(module, inner, inside)
        ]
    return []


def traffic(module: Module, instruction: Instruction, computation: Computation) -> int:
    """Bytes that an operation reads from memory and writes to it; a slice counts, not what it is cut from."""
    opcode = instruction.opcode.removesuffix("-start")
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0
    operands = computation.operands(instruction)
    if opcode in ("fusion", "async") and "calls" in instruction.calls:
        inside = module.computations[instruction.calls["calls"]]
        if opcode == "async":
            return sum(traffic(module, inner, inside) for inner in inside.instructions.values())
        return _read_in_fusion(inside) + _written(inside, inside.instructions[inside.root])
    result = _result_bytes(instruction, operands)
    if opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * result
    if opcode == "dynamic-update-slice":
        return 2 * operands[1].bytes
    if opcode == "scatter":
        return 3 * operands[-1].bytes
    if opcode in ("iota", "broadcast", "rng-bit-generator"):
        return result
    return result + sum(operand.bytes for operand in operands)


def _result_bytes(instruction: Instruction, operands: Sequence[Instruction]) -> int:
    """Of what begins and ends apart the result holds the operands, too, and they come first."""
    if not instruction.opcode.endswith("-start"):
        return instruction.bytes
    given = sum(len(operand.shapes) for operand in operands)
    return sum(shape.bytes for shape in instruction.shapes[given:])


def _product(out: Shape, length: int, lhs: Shape) -> Product:
    return Product(2 * out.size * length, _dtype(lhs))


def _dtype(shape: Shape) -> str:
    return "float8" if shape.dtype.startswith("f8") else _DTYPES.get(shape.dtype, shape.dtype)


def _convolution(instruction: Instruction, computation: Computation) -> Product:
    """Output elements times kernel elements per output feature: on TPUs matrix products have this form, too."""
    lhs, rhs = (operand.shapes[0] for operand in computation.operands(instruction)[:2])
    labels = attribute(instruction, "dim_labels") or ""
    kernel = labels.partition("_")[2].partition("->")[0]
    features = rhs.dims[kernel.index("o")] if "o" in kernel else 1
    return _product(instruction.shapes[0], rhs.size // max(features, 1), lhs)


def _custom_call(instruction: Instruction, computation: Computation) -> list[Product]:
    target = (attribute(instruction, "custom_call_target") or "").strip('"')
    operands = computation.operands(instruction)
    config = instruction.backend_config
    if "fmha" in target:
        return _attention(instruction, operands, config, backward="Backward" in target)
    if re.search(r"gemm|matmul", target, re.IGNORECASE) and operands:
        numbers = config.get("gemm_backend_config", config).get("dot_dimension_numbers", {})
        dims = [int(dim) for dim in numbers.get("lhs_contracting_dimensions", ())]
        lhs = operands[0].shapes[0]
        dims = dims or [len(lhs.dims) - 1]
        return [_product(instruction.shapes[0], contracted(lhs, dims), lhs)]
    return []


def _attention(instruction, operands, config, *, backward: bool) -> list[Product]:
    """cuDNN: 2 products forward, 5 backward; a causal mask saves half of each."""
    fmha = config.get("cudnn_fmha_backend_config", {})
    dims = fmha.get("intermediate_tensor_shape", {}).get("dimensions", ())
    pairs = 1
    for dim in dims:
        pairs *= int(dim)
    query = operands[0].shapes[0]
    share = 0.5 if "CAUSAL" in str(fmha.get("mask_type", "")) else 1.0
    flops = round((10 if backward else 4) * pairs * query.dims[-1] * share)
    return [Product(flops, _dtype(query), fused=True)] if dims else []


def _read_in_fusion(inside: Computation) -> int:
    total = 0
    for parameter in inside.instructions.values():
        if parameter.opcode == "parameter":
            total += _read(inside, parameter)
    return total


def _read(inside: Computation, source: Instruction) -> int:
    """Bytes read of a fusion's parameter: only the slices, where only slices of it are used."""
    found, stack = 0, [source]
    while stack:
        current = stack.pop()
        for user in inside.users[current.name]:
            if user.opcode in _SAME:
                stack.append(user)
            elif (
                user.opcode in ("dynamic-slice", "slice", "gather")
                and user.operands[0] == current.name
            ):
                found += user.bytes
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == current.name:
                pass  # updated in place
            else:
                return source.bytes
    return min(found, source.bytes)


def _written(inside: Computation, root: Instruction) -> int:
    if root.opcode == "tuple":
        return sum(_written(inside, operand) for operand in inside.operands(root))
    if root.opcode in ("bitcast", "reshape") and inside.operands(root):
        before = inside.operands(root)[0]
        return _written(inside, before) if before.opcode == "dynamic-update-slice" else root.bytes
    if root.opcode == "dynamic-update-slice":
        return inside.operands(root)[1].bytes
    return root.bytes
