"""A plan as aligned text, to read, and as JSON, to keep."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from paxlike.log.throughput import MFU_CONVENTION
from paxlike.plan.chips import USABLE_MEMORY
from paxlike.plan.planner import Plan
from paxlike.plan.search import Result

GIB = 2**30


def text(plan: Plan, *, num_tokens: float | None = None, gpu_hours: float | None = None) -> str:
    """The whole plan, without a last newline; with a budget also what that comes to."""
    parts = [_head(plan), _memory(plan), _flops(plan), _collectives(plan), _time(plan)]
    if num_tokens is not None or gpu_hours is not None:
        parts.append(_budget(plan, num_tokens, gpu_hours))
    parts.append(_assumptions(plan))
    return "\n\n".join(parts)


def fit_line(plan: Plan) -> str:
    """`fits: ...` or `does not fit: ...` with the numbers."""
    peak, usable = plan.memory.peak / GIB, plan.usable_memory / GIB
    trust = "" if plan.memory.trusted else " (the peak of a CPU program: not to be trusted)"
    if plan.fits:
        return f"fits: {peak:.2f} of {usable:.2f} GiB, {usable - peak:.2f} GiB are left{trust}"
    return f"does not fit: {peak:.2f} of {usable:.2f} GiB, {peak - usable:.2f} GiB too much{trust}"


def mesh_text(plan: Plan) -> str:
    """`data=1 fsdp=256 tensor=1`."""
    return " ".join(f"{axis}={size}" for axis, size in plan.mesh.items())


def as_json(plan: Plan, *, command: str = "", **more: Any) -> str:
    """The plan with its derived numbers; seconds, bytes and FLOPs."""
    estimate = dataclasses.asdict(plan.estimate)
    estimate["collectives"] = [
        dataclasses.asdict(total) for total in plan.estimate.collectives.values()
    ]
    estimate |= {
        "exposed_seconds": plan.estimate.exposed_seconds,
        "seconds_without_overlap": plan.estimate.seconds_without_overlap,
        "seconds_with_full_overlap": plan.estimate.seconds_with_full_overlap,
    }
    memory = dataclasses.asdict(plan.memory) | {
        "activations": plan.memory.activations,
        "usable": plan.usable_memory,
        "fits": plan.fits,
    }
    fields = {
        field.name: getattr(plan, field.name)
        for field in dataclasses.fields(plan)
        if field.name not in ("chip", "memory", "estimate", "efficiency", "fp8")
    }
    fields["fp8"] = None if plan.fp8 is None else dataclasses.asdict(plan.fp8)
    chip = dataclasses.asdict(plan.chip)
    for name in ("target", "topologies"):
        chip.pop(name)
    found = {
        "command": command,
        **fields,
        "num_devices": plan.num_devices,
        "chip": chip,
        "efficiency": dataclasses.asdict(plan.efficiency),
        "memory": memory,
        "estimate": estimate,
        "tokens_per_second": plan.tokens_per_second,
        "sequences_per_second_per_device": plan.rows_per_second / plan.num_devices,
        "mfu": plan.mfu,
        "mfu_convention": MFU_CONVENTION,
        **more,
    }
    return json.dumps(found, indent=1) + "\n"


def table(rows: Sequence[Sequence[str]], *, left: int = 1, indent: str = "  ") -> str:
    """Rows in columns as wide as their longest entry; the first `left` columns flush left."""
    widths = [max(len(row[number]) for row in rows) for number in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            entry.ljust(width) if number < left else entry.rjust(width)
            for number, (entry, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def search_table(found: Result) -> str:
    """What was compiled, best first, and in one line each why the others were not."""
    rows = [("", "mesh", "micro-", "policy", "step", "MFU", "peak", "")]
    rows.append(("", "", "batches", "", "s", "", "GiB", ""))
    for number, (candidate, plan) in enumerate(found.compiled, 1):
        rows.append(
            (
                str(number) if plan.fits else "-",
                mesh_text(plan),
                str(candidate.num_microbatches),
                candidate.policy or "",
                f"{plan.estimate.step_seconds:.4f}",
                f"{plan.mfu:.1%}",
                f"{plan.memory.peak / GIB:.2f}",
                "fits" if plan.fits else "does not fit",
            )
        )
    lines = [table(rows, left=2)] if found.compiled else []
    lines += [f"  {len(group):,} refused: {reason}" for reason, group in found.refused.items()]
    if found.later:
        lines.append(
            f"  {len(found.later):,} not compiled: by the formula slower than those above, or less likely to fit"
        )
    return "\n".join(lines)


def search_json(found: Result, *, command: str = "") -> str:
    """All plans of a search, best first, and what was refused."""
    kept = {
        "command": command,
        "best": found.best[0].knobs if found.best else None,
        "compiled": [
            {"knobs": candidate.knobs, **json.loads(as_json(plan))}
            for candidate, plan in found.compiled
        ],
        "refused": {reason: len(group) for reason, group in found.refused.items()},
        "not_compiled": len(found.later),
    }
    return json.dumps(kept, indent=1) + "\n"


def _head(plan: Plan) -> str:
    trained = (
        ""
        if plan.num_trained == plan.num_parameters
        else f" ({plan.num_trained:,} of them trained)"
    )
    parts = "" if plan.num_microbatches == 1 else f" in {plan.num_microbatches} microbatches"
    return "\n".join(
        [
            f"{plan.name} on {plan.num_devices} x {plan.chip.name}, {plan.num_nodes} node(s) of {plan.per_node}: "
            f"{mesh_text(plan)}",
            f"{plan.num_parameters:,} parameters{trained}; {plan.rows:,} rows = {plan.tokens:,} tokens a step{parts}; "
            f"{plan.compute_dtype}; attention: {plan.attention}",
            *([] if plan.fp8 is None else [plan.fp8.line()]),
            *(f"note: {notice}" for notice in plan.notices),
        ]
    )


def _memory(plan: Plan) -> str:
    memory = plan.memory
    rows = [
        ("parameters", memory.parameters),
        ("optimizer moments", memory.moments),
        ("other state", memory.other_state),
        ("batch", memory.batch),
        ("gradients, float32, by arithmetic", memory.gradients),
        ("activations and other temporaries", memory.activations),
        ("peak", memory.peak),
        (f"usable: {USABLE_MEMORY} x {plan.chip.memory_bytes / GIB:.2f}", plan.usable_memory),
    ]
    lines = [
        (name, f"{count / GIB:,.3f}") for name, count in rows if count or name != "other state"
    ]
    return "\n".join(["memory of one device, GiB", table(lines), fit_line(plan)])


def _flops(plan: Plan) -> str:
    devices = plan.num_devices
    rows = [
        ("", "all devices", "one device"),
        ("needed by the model", f"{plan.flops:.3e}", f"{plan.flops / devices:.3e}"),
        (
            "traced, with recomputation",
            f"{plan.traced_flops:.3e}",
            f"{plan.traced_flops / devices:.3e}",
        ),
        ("in the compiled program", "", f"{plan.estimate.flops:.3e}"),
    ]
    if plan.chip.platform == "tpu":  # its program is not read for products
        rows.pop()
    return "\n".join(["FLOPs of a step", table(rows)])


def _collectives(plan: Plan) -> str:
    found = sorted(plan.estimate.collectives.values(), key=lambda total: -total.seconds)
    if not found:
        return "collectives of a step: none"
    rows = [("kind", "axes", "links", "count", "GiB", "GiB sent", "seconds")]
    rows += [
        (
            total.kind,
            " x ".join(total.axes),
            "across nodes" if total.across_nodes else "inside a node",
            f"{total.count:,}",
            f"{total.bytes / GIB:,.4f}",
            f"{total.sent_bytes / GIB:,.4f}",
            f"{total.seconds:.4f}",
        )
        for total in found
    ]
    return "\n".join(
        ["collectives of a step, as one device takes part in them", table(rows, left=3)]
    )


def _time(plan: Plan) -> str:
    estimate = plan.estimate
    starting = estimate.compute_seconds - estimate.product_seconds - estimate.memory_seconds
    rows = [
        ("bound by matrix products", f"{estimate.product_seconds:.4f}"),
        ("bound by memory traffic", f"{estimate.memory_seconds:.4f}"),
        (f"starting {estimate.num_operations:,} operations", f"{starting:.4f}"),
        ("collectives that nothing runs beside", f"{estimate.exposed_seconds:.4f}"),
        ("step", f"{estimate.step_seconds:.4f}"),
    ]
    return "\n".join(
        [
            "time of a step, seconds, estimated",
            table(rows),
            f"between {estimate.seconds_with_full_overlap:.4f} (all {estimate.collective_seconds:.4f} s of collectives "
            f"hidden) and {estimate.seconds_without_overlap:.4f} (none)",
            f"{plan.tokens_per_second:,.0f} tokens/s, {plan.rows_per_second / plan.num_devices:.4g} sequences/s per "
            f"device, MFU {plan.mfu:.1%}",
        ]
    )


def budget(plan: Plan, num_tokens: float | None, gpu_hours: float | None) -> dict[str, float]:
    """What a number of tokens takes, or what device hours give, at the estimated rate.

    With both: the parameters of a model that would use up the budget on those tokens at this MFU, by 6 FLOPs per
    parameter and token (Kaplan et al. 2020, section 2.1).
    """
    found: dict[str, float] = {}
    if num_tokens is not None:
        seconds = num_tokens / plan.tokens_per_second
        found |= {"tokens": num_tokens, "days": seconds / 86400}
        found |= {"device_hours": seconds / 3600 * plan.num_devices}
    if gpu_hours is not None:
        seconds = gpu_hours * 3600 / plan.num_devices
        found |= {"budget_device_hours": gpu_hours, "budget_days": seconds / 86400}
        found |= {"budget_tokens": plan.tokens_per_second * seconds}
    if num_tokens is not None and gpu_hours is not None:
        flops = gpu_hours * 3600 * plan.chip.peak_flops(plan.compute_dtype) * plan.mfu
        found["budget_parameters"] = flops / (6 * num_tokens)
    return found


def _budget(plan: Plan, num_tokens: float | None, gpu_hours: float | None) -> str:
    found = budget(plan, num_tokens, gpu_hours)
    lines = ["budget"]
    if num_tokens is not None:
        lines.append(
            f"  {num_tokens:.4g} tokens take {found['days']:,.2f} days on {plan.num_devices} devices = "
            f"{found['device_hours']:,.0f} device hours"
        )
    if gpu_hours is not None:
        lines.append(
            f"  {gpu_hours:,.0f} device hours are {found['budget_days']:,.2f} days and give "
            f"{found['budget_tokens']:.4g} tokens"
        )
    if "budget_parameters" in found:
        lines.append(
            f"  both, at this MFU: a model of about {found['budget_parameters']:.3g} parameters "
            "(6 FLOPs per parameter and token)"
        )
    return "\n".join(lines)


def _assumptions(plan: Plan) -> str:
    chip, share = plan.chip, plan.efficiency
    peak = chip.peak_flops(plan.compute_dtype)
    return "\n".join(
        [
            "assumed",
            f"  {chip.name}: {peak / 1e12:,.6g} TFLOP/s in {plan.compute_dtype}, memory "
            f"{chip.memory_bandwidth / 1e9:,.0f} GB/s, links {chip.link_bandwidth / 1e9:,.3g} GB/s in a node and "
            f"{chip.network_bandwidth / 1e9:,.3g} GB/s across nodes, per device and direction",
            f"  of these are reached: matrix products {share.matmul:.0%}, fused attention {share.attention:.0%}, "
            f"memory {share.memory:.0%}, links {share.links:.0%}",
            f"  a collective waits {chip.link_seconds * 1e6:.0f} us in a node, {chip.network_seconds * 1e6:.0f} us "
            f"across nodes, an operation {chip.operation_seconds * 1e6:.0f} us",
            "  collectives run beside what the compiler scheduled between their start and end, and nothing else",
            f"traced in {plan.trace_seconds:.1f} s, compiled in {plan.compile_seconds:.1f} s; peak memory of this "
            f"process {plan.host_memory_peak / GIB:.2f} GiB",
        ]
    )
