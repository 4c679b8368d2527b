"""Layers of experts beside a dense model of the same active FLOPs, and their forms beside each other.

The model is GLaM 126M with fewer layers, experts and tokens, every other layer with experts, or a GPT of that width
with experts in every layer, which is the harder case. Timed are loss and gradients, the whole step with AdamW (which
updates as many weights as there are experts), and the arithmetic of the routers by itself. All sides take turns in one
process; with `--parts moe` a process has four devices, over which the experts are spread.
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

import fiddle as fdl
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from configs.glam import SyntheticGLaM126M64E
from paxlike import parallel
from paxlike.layers.feedforward import FeedForward
from paxlike.layers.moe import MoE, Router
from paxlike.ops import routing
from paxlike.ops.routing import Choice
from paxlike.tasks.language import CausalLanguage
from paxlike.train.state import abstract_variables
from scripts.benchmarks import parts, paxlike_step, shapes
from scripts.benchmarks.protocol import ROOT, cpu_seconds, environment

EXPERTS, PER_TOKEN, GROUPS = 8, 2, 4
WIDE = shapes.Shape(layers=2, width=768, heads=12, hidden=3072, length=512, rows=8, vocab=512)
FORMS = ("dense", "index", "einsum", "sort")
ROUTER = "router"
PARTS = {
    "one device": {"model": "glam", "mesh": {}},
    "experts in every layer": {"model": "gpt", "mesh": {}},
    "whole step": {"model": "glam", "mesh": {}, "whole": True},
    "four devices": {"model": "glam", "mesh": {"expert": 4}},
}


def moe(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each side and ratios to the dense one; experts over four devices beside one."""
    result: dict[str, Any] = {}
    for title, part in PARTS.items():
        arguments = {
            "shape": "smoke" if options.smoke else "wide",
            "rounds": options.rounds,
            "dtype": options.dtype,
            **part,
        }
        command = [sys.executable, "-m", "scripts.benchmarks.moe", json.dumps(arguments)]
        devices = {"JAX_NUM_CPU_DEVICES": "4"} if part["mesh"] else {}
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


def _group(shape: shapes.Shape) -> int:
    return shape.tokens // GROUPS


def _gpt(shape: shapes.Shape, form: str, dtype: str):
    """Experts in every layer. A dense feed-forward layer is as wide as the experts of a token together."""
    net = paxlike_step.model(shape, dtype=dtype)
    (block,) = net.stack.period
    options = {"activation": "relu", "use_bias": False, "dtype": dtype}
    if form == "dense":
        ffn: nn.Module = FeedForward(hidden=PER_TOKEN * shape.hidden, **options)
    else:
        factor = None if form == "sort" else float(PER_TOKEN)
        router = Router(Choice(k=PER_TOKEN), "tokens", factor, _group(shape))
        dispatch = "index" if form == "sort" else form
        ffn = MoE(EXPERTS, shape.hidden, router=router, dispatch=dispatch, **options)
    return net.clone(stack=net.stack.clone(period=(block.clone(ffn=ffn),)))


class _GLaM(SyntheticGLaM126M64E):
    """GLaM 126M, shrunk."""

    NUM_EXPERTS = EXPERTS
    NUM_EXPERTS_PER_TOKEN = PER_TOKEN
    ICI_MESH_SHAPE = (1, 1, 1)
    MOE_GROUPS = GROUPS


class _Dense(_GLaM):
    """Each layer of experts as one layer that is as wide as the experts of a token together."""

    def experts(self):
        return self.feed_forward_layer(
            hidden=PER_TOKEN * self.HIDDEN_DIMS, gated=False, activation="relu", use_bias=False
        )


def _glam(shape: shapes.Shape, form: str, dtype: str):
    """As `configs/glam.py` builds it: layers of experts and dense ones in turn."""
    kind = _Dense if form == "dense" else _GLaM
    forms = {"sort": {"EXPERT_CAPACITY_FACTOR": None}, "einsum": {"MOE_DISPATCH": "einsum"}}
    knobs = kind(
        NUM_LAYERS=shape.layers,
        NUM_HEADS=shape.heads,
        DIMS_PER_HEAD=shape.width // shape.heads,
        MODEL_DIMS=shape.width,
        HIDDEN_DIMS=shape.hidden,
        MAX_SEQ_LEN=shape.length,
        VOCAB_SIZE=shape.vocab,
        PERCORE_BATCH_SIZE=shape.rows,
        FPROP_DTYPE=dtype,
        **forms.get(form, {}),
    )
    return fdl.build(knobs.model())


MODELS = {"gpt": (_gpt, 1), "glam": (_glam, 2)}  # of how many layers one has experts


def _gradient(shape: shapes.Shape, net: nn.Module, sizes: dict[str, int]):
    """A function that computes loss and gradients once."""
    mesh, task = _mesh(sizes), CausalLanguage()
    with parallel.activate(mesh):
        rows = parallel.named_sharding(mesh, ("batch", "length"))
        batch = {k: jax.device_put(v, rows) for k, v in shapes.batches(shape, 1)[0].items()}
        place = jax.tree.map(lambda leaf: leaf.sharding, abstract_variables(net, mesh)["params"])
        init = lambda: nn.unbox(net.init(jax.random.key(0), batch["tokens"][:1]))["params"]
        params = jax.jit(init, out_shardings=place)()
        objective = lambda p, b: task.loss(net, {"params": p}, b, None).objective
        compute = jax.jit(jax.value_and_grad(objective), out_shardings=(None, place))
        compiled = compute.lower(params, batch).compile()
    return lambda: jax.block_until_ready(compiled(params, batch))


def _step(shape: shapes.Shape, net: nn.Module):
    """A function that takes one training step."""
    mesh = _mesh({"data": 1})
    with parallel.activate(mesh):
        factory, jitted, _ = paxlike_step._step(shape, mesh, net)
        batch = jax.device_put(shapes.batches(shape, 1)[0])
        state = [factory.initialize(0)]
        compiled = jitted.lower(state[0], batch).compile()

    def step():
        state[0], metrics = compiled(state[0], batch)
        jax.block_until_ready((state[0], metrics))

    return step


def _router(shape: shapes.Shape, layers: int):
    """A function that does what routers of so many layers do, and its gradient: scores, choice, places."""
    size = _group(shape)

    def arithmetic(w, x):
        logits = x @ w
        chosen = routing.choose(logits, jnp.ones(x.shape[:2], jnp.bool_), Choice(k=PER_TOKEN))
        slots = routing.slots(
            chosen.experts, EXPERTS, routing.capacity(size, EXPERTS, float(PER_TOKEN))
        )
        return jnp.sum(jnp.square(chosen.gates)), slots

    x = jax.random.normal(jax.random.key(0), (GROUPS, size, shape.width))
    w = jax.random.normal(jax.random.key(1), (shape.width, EXPERTS))
    compiled = jax.jit(jax.grad(arithmetic, (0, 1), has_aux=True)).lower(w, x).compile()
    return lambda: [jax.block_until_ready(compiled(w, x)) for _ in range(layers)]


def _mesh(sizes: dict[str, int]) -> jax.sharding.Mesh:
    count = int(np.prod(list(sizes.values())))
    return parallel.Mesh(ici=tuple(sizes.values()), axes=tuple(sizes)).build(jax.devices()[:count])


def compare(
    shape: str, rounds: int, dtype: str, model: str, mesh: dict[str, int], whole: bool = False
) -> dict[str, float]:
    """Medians over the rounds; ratios are medians of the ratios within a round."""
    size = WIDE if shape == "wide" else dataclasses.replace(shapes.SHAPES[shape], rows=8)
    build, period = MODELS[model]
    net = lambda form: build(size, form, dtype)
    one = {"data": 1}
    if mesh:
        sides = {form: _gradient(size, net(form), mesh) for form in ("index", "sort")}
        bases = {form: f"{form}, one device" for form in sides}
        sides |= {f"{form}, one device": _gradient(size, net(form), one) for form in bases}
    elif whole:
        sides = {form: _step(size, net(form)) for form in ("dense", "index", "sort")}
        bases = dict.fromkeys(("index", "sort"), "dense")
    else:
        sides = {form: _gradient(size, net(form), one) for form in FORMS}
        sides[ROUTER] = _router(size, size.layers // period)
        bases = dict.fromkeys((*FORMS[1:], ROUTER), "dense")
    spent: dict[str, dict[str, list[float]]] = {
        kind: {name: [] for name in sides} for kind in ("", "_cpu")
    }
    for i in range(rounds + 1):
        for name, run in sides.items():
            started = time.perf_counter(), cpu_seconds()
            run()
            if i:  # the first round warms up
                spent[""][name].append(time.perf_counter() - started[0])
                spent["_cpu"][name].append(cpu_seconds() - started[1])
    found = {}
    for kind, of in spent.items():
        found |= {f"{name}{kind}_seconds": statistics.median(of[name]) for name in sides}
        for name, base in bases.items():
            pairs = zip(of[name], of[base], strict=True)
            other = "one_device" if mesh else base
            found[f"{name}{kind}_to_{other}"] = statistics.median(a / b for a, b in pairs)
    return found


if __name__ == "__main__":
    print(json.dumps(compare(**json.loads(sys.argv[1]))))
