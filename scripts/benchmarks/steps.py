"""Parts that compare training steps: on one device, on a mesh of virtual ones, by host time, on a GPU."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from typing import Any

from scripts.benchmarks.protocol import ROOT, Worker
from scripts.benchmarks.shapes import SHAPES

MESHES = {"fsdp 4": (1, 4, 1), "tensor 4": (1, 1, 4), "fsdp 2 x tensor 2": (1, 2, 2)}
PAX_SEQUENCES_PER_SECOND = 73.6  # per H100, Pax's GPT-3 126M at 4 sequences of 2,048 per GPU
H100_BF16_FLOPS = 989e12


def step(options: argparse.Namespace) -> dict[str, Any]:
    """paxlike beside the bare step and PyTorch, at each shape."""
    result = {}
    for shape in options.shapes:
        workers = [_jax(kind, shape, dtype=options.dtype) for kind in ("paxlike", "bare")]
        if options.torch_python:
            kinds = ["torch eager"] + ([] if options.no_torch_compile else ["torch.compile"])
            workers += [_torch(kind, shape, options) for kind in kinds]
        result[shape] = take_turns(workers, options.rounds, options.steps, SHAPES[shape].tokens)
        show(shape, result[shape])
    return result


def mesh(options: argparse.Namespace) -> dict[str, Any]:
    """paxlike beside the bare step on four virtual CPU devices, at each shape."""
    result = {}
    for shape, (name, sizes) in itertools.product(options.shapes, MESHES.items()):
        workers = [_jax(kind, shape, devices=4, mesh_shape=sizes) for kind in ("paxlike", "bare")]
        title = f"{shape}, {name}"
        result[title] = take_turns(workers, options.rounds, options.steps, SHAPES[shape].tokens)
        show(title, result[title])
    return result


def host(options: argparse.Namespace) -> dict[str, Any]:
    """A step with next to no arithmetic, where what the host does shows: the same 12 layers, 32 wide, 8 tokens."""
    workers = [_jax(kind, "host", scan=True) for kind in ("paxlike", "bare")]
    result = take_turns(workers, options.rounds, 5 if options.smoke else 200, SHAPES["host"].tokens)
    show("host", result)
    return result


def gpu(options: argparse.Namespace) -> dict[str, Any]:
    """GPT-3 126M in bfloat16 on one GPU, cuDNN's attention against the plain one."""
    shape, result = SHAPES["126m"], {}
    workers = [
        _jax("paxlike", "126m", label=name, platform="cuda", dtype="bfloat16", implementation=name)
        for name in ("cudnn", "reference")
    ]
    sides = take_turns(workers, options.rounds, 20, shape.tokens)
    for name, side in sides["sides"].items():
        seconds = side["median_seconds"]
        side["sequences_per_second"] = shape.rows / seconds
        side["mfu"] = 3 * shape.forward_flops() / seconds / H100_BF16_FLOPS
        side["over_pax"] = side["sequences_per_second"] / PAX_SEQUENCES_PER_SECOND
        print(
            f"{name}: {side['sequences_per_second']:.1f} sequences/s ({side['over_pax']:.2f} x Pax), "
            f"MFU {side['mfu']:.1%} (989 TFLOP/s, causal half of the scores)"
        )
    result["sides"] = sides["sides"]
    return result


def take_turns(workers: list[Worker], rounds: int, steps: int, tokens: int) -> dict[str, Any]:
    """Numbers of all sides; ratios are time over the time of the first side, round by round."""
    try:
        for i in range(rounds):
            first = i % len(workers)  # nobody's turn always follows the same other's
            for worker in workers[first:] + workers[:first]:
                worker.run(steps)
    finally:
        for worker in workers:
            worker.close()
    sides, baseline = {}, workers[0].rounds
    for worker in workers:
        wall, cpu = ([statistics.mean(r[key]) for r in worker.rounds] for key in ("wall", "cpu"))
        sides[worker.name] = {
            "median_seconds": statistics.median(wall),
            "least_seconds": min(wall),
            "median_cpu_seconds": statistics.median(cpu),
            "least_cpu_seconds": min(cpu),
            "tokens_per_second": tokens / statistics.median(wall),
            "first_over_this": _ratio(baseline, worker.rounds, "wall"),
            "first_over_this_cpu": _ratio(baseline, worker.rounds, "cpu"),
            "first_over_this_least_cpu": min(_means(baseline, "cpu")) / min(cpu),
            "loss": worker.rounds[-1]["loss"],
            "startup_seconds": worker.startup_seconds,
            "about": worker.about,
            "rounds": worker.rounds,
        }
    return {"first": workers[0].name, "tokens_per_step": tokens, "sides": sides}


def show(title: str, result: dict[str, Any]) -> None:
    """A table of one comparison."""
    first = result["first"]
    heads = ("clock ms", "CPU ms", "least", "tokens/s", f"{first} / it", "by CPU", "by least")
    print(f"{title:20s} {' '.join(f'{head:>12s}' for head in heads)}")
    for name, side in result["sides"].items():
        numbers = (
            f"{1e3 * side['median_seconds']:12.1f}",
            f"{1e3 * side['median_cpu_seconds']:12.1f}",
            f"{1e3 * side['least_cpu_seconds']:12.1f}",
            f"{side['tokens_per_second']:12.0f}",
            f"{side['first_over_this']:12.3f}",
            f"{side['first_over_this_cpu']:12.3f}",
            f"{side['first_over_this_least_cpu']:12.3f}",
        )
        print(f"{name:20s} {' '.join(numbers)}", flush=True)


def _ratio(first: list[dict[str, Any]], other: list[dict[str, Any]], key: str) -> float:
    pairs = zip(_means(first, key), _means(other, key), strict=True)
    return statistics.median(a / b for a, b in pairs)


def _means(rounds: list[dict[str, Any]], key: str) -> list[float]:
    return [statistics.mean(r[key]) for r in rounds]


def _jax(
    kind: str,
    shape: str,
    *,
    devices: int = 1,
    platform: str = "cpu",
    label: str | None = None,
    **model,
) -> Worker:
    arguments = json.dumps({"kind": kind, "shape": shape, **model})
    command = [sys.executable, "-m", "scripts.benchmarks.jax_worker", arguments]
    return Worker(label or kind, command, devices=devices, platform=platform)


def _torch(kind: str, shape: str, options: argparse.Namespace) -> Worker:
    arguments = json.dumps({"kind": kind, "shape": shape, "dtype": options.dtype})
    script = str(ROOT / "scripts" / "benchmarks" / "torch_gpt.py")
    return Worker(kind, [options.torch_python, script, arguments])
