"""Layers of experts beside a dense model of the same active FLOPs, and their forms beside each other.

The width is that of GLaM 126M, with fewer layers, experts and tokens. Loss and gradients are timed, without the
optimizer, which has as many parameters to update as there are experts. All sides take turns in one process; with
`--parts moe` a second process has four devices, over which the experts are spread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from paxlike import parallel
from paxlike.layers.feedforward import FeedForward
from paxlike.layers.moe import MoE, Router
from paxlike.layers.stack import Stack
from paxlike.ops.routing import Choice
from paxlike.tasks.language import CausalLanguage
from paxlike.train.state import abstract_variables
from scripts.benchmarks import parts, paxlike_step, shapes
from scripts.benchmarks.protocol import ROOT, cpu_seconds, environment

EXPERTS, PER_TOKEN = 8, 2
WIDE = shapes.Shape(layers=2, width=768, heads=12, hidden=3072, length=256, rows=8, vocab=512)
FORMS = ("dense", "index", "einsum", "sort")


def moe(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each side and ratios to the dense one; experts over four devices beside one."""
    result: dict[str, Any] = {}
    for title, mesh in (("one device", {}), ("four devices", {"expert": 4})):
        arguments = {
            "shape": "smoke" if options.smoke else "wide",
            "rounds": options.rounds,
            "dtype": options.dtype,
            "mesh": mesh,
        }
        command = [sys.executable, "-m", "scripts.benchmarks.moe", json.dumps(arguments)]
        devices = {"JAX_NUM_CPU_DEVICES": "4"} if mesh else {}
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment() | devices,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        result[title] = json.loads(done.stdout.strip().splitlines()[-1])
        parts._print(title, result[title])
    return result


def _model(shape: shapes.Shape, form: str, dtype: str):
    """A dense feed-forward layer is as wide as the experts of a token together."""
    net = paxlike_step.model(shape, dtype=dtype, scan=True)
    (block,) = net.stack.period
    options = {"activation": "relu", "use_bias": False, "dtype": dtype}
    if form == "dense":
        ffn: nn.Module = FeedForward(hidden=PER_TOKEN * shape.hidden, **options)
    else:
        factor = None if form == "sort" else float(PER_TOKEN)
        router = Router(Choice(k=PER_TOKEN), "tokens", factor, 2 * shape.length)
        dispatch = "index" if form == "sort" else form
        ffn = MoE(EXPERTS, shape.hidden, router=router, dispatch=dispatch, **options)
    stack = Stack((block.clone(ffn=ffn),), shape.layers, "SAVE_EVERYTHING", True)
    return net.clone(stack=stack)


def _compiled(shape: shapes.Shape, form: str, dtype: str, sizes: dict[str, int]):
    """The compiled gradient, and what it is called with."""
    mesh = parallel.Mesh(ici=tuple(sizes.values()), axes=tuple(sizes)).build(
        jax.devices()[: int(np.prod(list(sizes.values())))]
    )
    net, task = _model(shape, form, dtype), CausalLanguage()
    with parallel.activate(mesh):
        rows = parallel.named_sharding(mesh, ("batch", "length"))
        batch = {k: jax.device_put(v, rows) for k, v in shapes.batches(shape, 1)[0].items()}
        place = jax.tree.map(lambda leaf: leaf.sharding, abstract_variables(net, mesh)["params"])
        init = lambda: nn.unbox(net.init(jax.random.key(0), batch["tokens"][:1]))["params"]
        params = jax.jit(init, out_shardings=place)()
        objective = lambda p, b: task.loss(net, {"params": p}, b, None).objective
        compute = jax.jit(jax.value_and_grad(objective), out_shardings=(None, place))
        return compute.lower(params, batch).compile(), params, batch


def compare(shape: str, rounds: int, dtype: str, mesh: dict[str, int]) -> dict[str, float]:
    """Medians over the rounds; ratios are medians of the ratios within a round."""
    size = WIDE if shape == "wide" else dataclasses.replace(shapes.SHAPES[shape], rows=8)
    many = mesh or {"data": 1}
    sides = {form: (form, many) for form in (FORMS if not mesh else ("index", "sort"))}
    if mesh:
        sides |= {f"{form}, one device": (form, {"data": 1}) for form in ("index", "sort")}
    compiled = {name: _compiled(size, form, dtype, on) for name, (form, on) in sides.items()}
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name, (function, params, batch) in compiled.items():
            started = time.perf_counter(), cpu_seconds()
            jax.block_until_ready(function(params, batch))
            if i:  # the first round warms up
                wall[name].append(time.perf_counter() - started[0])
                cpu[name].append(cpu_seconds() - started[1])

    def ratio(name: str, base: str, values=wall) -> float:
        return statistics.median(a / b for a, b in zip(values[name], values[base], strict=True))

    found = {f"{name}_seconds": statistics.median(wall[name]) for name in sides}
    found |= {f"{name}_cpu_seconds": statistics.median(cpu[name]) for name in sides}
    if mesh:
        one = "{}, one device"
        return found | {f"{f}_to_one_device": ratio(f, one.format(f)) for f in ("index", "sort")}
    return found | {f"{form}_to_dense": ratio(form, "dense") for form in FORMS[1:]}


if __name__ == "__main__":
    print(json.dumps(compare(**json.loads(sys.argv[1]))))
