"""LoRA as two thin products beside LoRA as Pax computes it: memory and time of the step that trains the adapters.

The other side makes W + A B of each layer in every step, and with it the gradient of the whole weight. Both have the
same parameters, loss and optimizer; the two compiled steps take turns in one process, so that what else the machine
does meets both.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from paxlike import parallel
from paxlike.layers.attention import Attention
from paxlike.layers.block import Block
from paxlike.layers.feedforward import FeedForward
from paxlike.layers.lora import TRAINABLE, Lora
from paxlike.layers.projection import Projecting
from paxlike.ops import platform
from paxlike.plan import target
from paxlike.plan.chips import find_chip
from paxlike.plan.planner import fused_attention
from paxlike.tasks.language import CausalLanguage
from paxlike.train.optimizer import Optimizer, Schedule
from paxlike.train.state import StateFactory
from paxlike.train.step import TrainStep
from scripts.benchmarks import parts, paxlike_step, shapes
from scripts.benchmarks.protocol import cpu_seconds

RANK = 32
# Where the width is far above the rank, as in models that are worth adapting; few layers, so that it fits anywhere.
WIDE = shapes.Shape(layers=2, width=1024, heads=8, hidden=4096, length=128, rows=4, vocab=512)
# Four layers of the width of LLaMA 7B, one of its rows.
LLAMA7B = shapes.Shape(layers=4, width=4096, heads=32, hidden=11008, length=4096, rows=1, vocab=512)
H100 = find_chip("h100")


def lora(options: argparse.Namespace) -> dict[str, Any]:
    """Both sides: temporary memory of the step, seconds, and the ratios, with and without rematerialisation."""
    result: dict[str, Any] = {}
    for remat in (False, True):
        arguments = {
            "shape": "smoke" if options.smoke else "wide",
            "rounds": options.rounds,
            "dtype": options.dtype,
            "remat": remat,
        }
        command = [sys.executable, "-m", "scripts.benchmarks.lora", json.dumps(arguments)]
        name = "layers recomputed" if remat else "everything kept"
        if not options.plan_only:
            result[name] = parts._run(command)
            parts._print(name, result[name])
    try:
        target.check_compiler(H100)
    except ValueError as error:
        print(f"memory on an H100 is not known: {error}", flush=True)
        return result
    for shape in ("smoke",) if options.smoke else ("wide", "7b"):
        name = f"{shape}, planned for an H100"
        command = [sys.executable, "-m", "scripts.benchmarks.lora", json.dumps({"planned": shape})]
        result[name] = parts._run(command)
        parts._print(name, result[name])
    return result


class _Materialized(nn.Module):
    """x (W + A B), the sum made in full."""

    features: int | tuple[int, ...]
    axes: tuple[str | None, ...]
    kernel_init: Any
    dtype: str

    @nn.compact
    def __call__(self, x):
        features = (self.features,) if isinstance(self.features, int) else tuple(self.features)
        inputs = x.shape[len(x.shape) - (len(self.axes) - len(features)) :]
        p, q = math.prod(inputs), math.prod(features)
        shape = (*inputs, *features)
        init = nn.with_logical_partitioning(self.kernel_init, self.axes)
        kernel = self.param("kernel", init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, features, jnp.float32)
        # Parts of a combined projection have an A and a B each, as on the other side.
        c = features[0] if len(features) > 1 and self.axes[len(inputs)] is None else 1
        a = self.param("lora/a", self.kernel_init, (c, p, RANK), jnp.float32)
        b = self.param("lora/b", nn.initializers.zeros, (c, RANK, q // c), jnp.float32)
        delta = jax.lax.dot_general(a, b, (((2,), (1,)), ((0,), (0,))))
        weight = kernel.reshape(p, q) + jnp.moveaxis(delta, 0, 1).reshape(p, q)
        rows = x.reshape(-1, p).astype(self.dtype)
        y = (rows @ weight.astype(self.dtype)).reshape(*x.shape[: x.ndim - len(inputs)], *features)
        return y + bias.astype(self.dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


class _Projecting(Projecting, kw_only=True):
    def projection(self, name, features, axes, *, use_bias=None):
        return _Materialized(features, axes, self.kernel_init, self.dtype, name=name)


class _Attention(_Projecting, Attention):
    pass


class _FeedForward(_Projecting, FeedForward):
    pass


def _model(shape: shapes.Shape, *, thin: bool, dtype: str, remat: bool):
    net = paxlike_step.model(shape, dtype=dtype, scan=True, remat=remat)
    (block,) = net.stack.period
    attention, feedforward = block.mixer, block.ffn
    names = ("qkv", "out", "ffn1", "ffn2")
    options = {"dtype": dtype, "adapters": {name: Lora(RANK) for name in names} if thin else None}
    block = Block(
        mixer=(Attention if thin else _Attention)(
            num_heads=attention.num_heads, head_dim=attention.head_dim, **options
        ),
        ffn=(FeedForward if thin else _FeedForward)(hidden=feedforward.hidden, **options),
        mixer_norm=block.mixer_norm,
        ffn_norm=block.ffn_norm,
    )
    return net.clone(stack=net.stack.clone(period=(block,)))


def _lowered(shape: shapes.Shape, mesh, **options):
    """The step, traced, and what makes its first state."""
    optimizer = Optimizer(Schedule("constant", 1e-4), trainable=TRAINABLE)
    rows = parallel.named_sharding(mesh, ("batch", "length"))
    batch = shapes.batches(shape, 1)[0]
    spec = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=rows) for k, v in batch.items()}
    net = _model(shape, **options)
    factory = StateFactory(net, optimizer, spec, mesh)
    step = TrainStep(net, CausalLanguage(), optimizer)
    return jax.jit(step, donate_argnums=0).lower(factory.abstract(), spec), factory


def planned(planned: str) -> dict[str, float]:
    """Temporary memory of both sides as the compiler for an H100, which need not be there, plans it."""
    target.prepare_environment(H100, os.environ)
    os.environ.pop("JAX_PLATFORMS", None)  # plug-ins are not looked for otherwise
    jax.config.update("jax_platforms", "cpu")
    shape = {"wide": WIDE, "7b": LLAMA7B, **shapes.SHAPES}[planned]
    dtype, result = "float32" if planned == "wide" else "bfloat16", {}
    place = parallel.Mesh()
    mesh = place.build(target.make_devices(place, H100))
    hardware = platform.Hardware(H100.platform, H100.compute_capability)
    with platform.traced_for(hardware), fused_attention(H100), parallel.activate(mesh):
        for remat in (True, False):
            memory = []
            for thin in (True, False):
                lowered, _ = _lowered(shape, mesh, thin=thin, dtype=dtype, remat=remat)
                memory.append(lowered.compile().memory_analysis().temp_size_in_bytes)
            name = "recomputed" if remat else "kept"
            result[f"{name}_thin_megabytes"], result[f"{name}_materialized_megabytes"] = (
                size / 1e6 for size in memory
            )
            result[f"{name}_ratio"] = memory[0] / memory[1]
    return result


def _compiled(shape: shapes.Shape, mesh, **options):
    lowered, factory = _lowered(shape, mesh, **options)
    rows = parallel.named_sharding(mesh, ("batch", "length"))
    data = [jax.device_put(batch, rows) for batch in shapes.batches(shape)]
    return lowered.compile(), factory.initialize(0), data


def compare(shape: str, rounds: int, dtype: str, remat: bool) -> dict[str, float]:
    """Medians over the rounds; the ratio is the median of the ratios within a round."""
    size = WIDE if shape == "wide" else shapes.SHAPES[shape]
    options, sides = {"dtype": dtype, "remat": remat}, {}
    mesh = parallel.Mesh().build(jax.devices()[:1])
    with parallel.activate(mesh):
        for name in ("thin", "materialized"):
            sides[name] = list(_compiled(size, mesh, thin=name == "thin", **options))
        memory = {
            name: function.memory_analysis().temp_size_in_bytes
            for name, (function, *_) in sides.items()
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        cpu: dict[str, list[float]] = {name: [] for name in sides}
        for i in range(rounds + 1):
            for name, side in sides.items():
                function, state, data = side
                started = time.perf_counter(), cpu_seconds()
                side[1], metrics = function(state, data[i % len(data)])
                jax.block_until_ready((side[1], metrics))
                if i:  # the first round warms up
                    seconds[name].append(time.perf_counter() - started[0])
                    cpu[name].append(cpu_seconds() - started[1])
    ratio = lambda values: statistics.median(
        ours / theirs for ours, theirs in zip(values["thin"], values["materialized"], strict=True)
    )
    return {
        **{f"{name}_temporary_megabytes": memory[name] / 1e6 for name in sides},
        **{f"{name}_seconds": statistics.median(seconds[name]) for name in sides},
        "temporary_memory_ratio": memory["thin"] / memory["materialized"],
        "time_ratio": ratio(seconds),
        "cpu_time_ratio": ratio(cpu),
    }


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps((planned if "planned" in given else compare)(**given)))
