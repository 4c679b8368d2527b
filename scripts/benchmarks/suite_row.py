"""One row of the suite, measured on the first device or planned for an H100; prints one JSON object.

python -m scripts.benchmarks.suite_row '{"config": "configs.gpt.Synthetic126M", "knobs": {}, "plan": true}'
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np

from configs import flags
from paxlike import parallel, xla_bundles, xla_flags
from paxlike.log.throughput import MFU_CONVENTION, peak_flops
from paxlike.plan import planner, target
from paxlike.plan.chips import find_chip
from paxlike.train.program import batch_spec, jit_step, model_flops, state_factory

H100 = find_chip("h100")
_CHECKED = "PAXLIKE_SUITE_CHECKS"
STEPS, SECONDS = 20, 8.0  # at most, of a measured row
ROOM = 0.87  # of the usable memory: nearer to it, the compiler computes again what it could keep


def main() -> int:
    task = json.loads(sys.argv[1])
    try:
        found = _planned(task) if task["plan"] else _measured(task)
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(json.dumps(found))
    return 0


def experiment_of(task: dict[str, Any], layers: int | None):
    """The experiment of a row with so many layers, as main.py would make it."""
    import fiddle as fdl

    knobs = dict(task["knobs"])
    if layers is not None:
        knobs["NUM_LAYERS"] = layers
    given = [f"--fdl.{name}={_text(value)}" for name, value in knobs.items()]
    resolved = flags.resolve(["suite", f"--fdl_config={task['config']}", *given], os.environ)
    for notice in resolved.notices:
        if "has no effect" in notice:  # a switch of Transformer Engine without its backend
            raise ValueError(notice)
    return fdl.build(resolved.tree), resolved.knobs


def _planned(task: dict[str, Any]) -> dict[str, Any]:
    """The plan of the row, with the most layers that fit where the whole model does not."""
    target.prepare_environment(H100, os.environ)
    jax.config.update("jax_platforms", "cpu")
    whole = task["whole"]
    layers, plan = (None, _plan(task, None)) if whole is None else _deepest(task, whole)
    if not plan.fits:
        raise ValueError(
            f"does not fit: {plan.memory.peak / 2**30:.1f} of {plan.usable_memory / 2**30:.1f} GiB with "
            f"{layers or 'all'} layer(s)"
        )
    _, knobs = experiment_of(task, layers)
    return {
        "layers": knobs["NUM_LAYERS"],
        "whole_layers": whole or knobs["NUM_LAYERS"],
        "rows": plan.rows,
        "tokens": plan.tokens,
        "num_parameters": plan.num_parameters,
        "flops": plan.flops,
        "whole_flops": _whole_flops(task, plan.flops),
        "peak_flops": H100.peak_flops("bfloat16"),
        "mfu_convention": MFU_CONVENTION,
        "attention": plan.attention,
        "plan_seconds": plan.estimate.step_seconds,
        "plan_peak_bytes": plan.memory.peak,
        "compile_seconds": plan.compile_seconds,
        "jax": jax.__version__,
    }


def _deepest(task: dict[str, Any], whole: int):
    """(layers, plan) of the most layers that fit with room to spare, in a few compiles: by the slope of the peak.

    A guess that fits is taken.
    """
    guess = task.get("guess")
    plans = {n: _plan(task, n) for n in ((guess,) if guess else (1, 2))}
    for _ in range(5):
        fitting = max((n for n, plan in plans.items() if _fits(plan)), default=0)
        above = min((n for n, plan in plans.items() if not _fits(plan)), default=whole + 1)
        if above - fitting <= 1 or fitting == guess:
            break
        if len(plans) == 1:
            wanted = guess - 1
        else:
            (n, a), (m, b) = sorted(plans.items())[-2:]
            slope = max((b.memory.peak - a.memory.peak) / (m - n), 1)
            wanted = n + int((ROOM * a.usable_memory - a.memory.peak) / slope)
        wanted = min(max(wanted, fitting + 1), above - 1)
        plans[wanted] = _plan(task, wanted)
    fitting = max((n for n, plan in plans.items() if _fits(plan)), default=min(plans))
    return fitting, plans[fitting]


def _fits(plan) -> bool:
    return plan.memory.peak <= ROOM * plan.usable_memory


def _plan(task: dict[str, Any], layers: int | None):
    experiment, _ = experiment_of(task, layers)
    return planner.plan(experiment, H100, num_devices=1)


def _whole_flops(task: dict[str, Any], flops: int) -> int:
    """FLOPs of a step of the whole model: nothing is compiled."""
    if task["whole"] is None:
        return flops
    experiment, _ = experiment_of(task, task["whole"])
    return _flops(experiment.on_devices(1), jax.devices("cpu")[:1])


def _flops(experiment, devices) -> int:
    mesh = experiment.mesh.build(devices)
    shapes = experiment.train_data.spec(experiment.global_batch_size)
    with parallel.activate(mesh, experiment.training_rules):
        factory = state_factory(experiment, shapes, mesh)
        return model_flops(experiment, factory.abstract(), batch_spec(shapes, mesh))


def _measured(task: dict[str, Any]) -> dict[str, Any]:
    """The row on the first device: compile, first step, then as many as fit into a few seconds."""
    if task["knobs"].get("DETERMINISTIC"):
        xla_flags.make_deterministic(os.environ)
    layers, whole = task["layers"], task["whole"]
    experiment, knobs = experiment_of(task, layers)
    verdicts = os.path.join(tempfile.gettempdir(), "paxlike-suite")  # kept from row to row
    xla_bundles.apply(experiment.xla_bundle, os.environ, folder=verdicts)
    kernels = dataclasses.replace(experiment.kernels, folder=verdicts)
    experiment = dataclasses.replace(experiment, kernels=kernels).on_devices(1)
    device = jax.devices()[0]
    mesh = experiment.mesh.build([device])
    shapes = experiment.train_data.spec(experiment.global_batch_size)
    with parallel.activate(mesh, experiment.training_rules):
        spec = batch_spec(shapes, mesh)
        factory = state_factory(experiment, shapes, mesh)
        abstract = factory.abstract()
        settled = experiment.kernels.settle(
            lambda: jit_step(experiment, factory).trace(abstract, spec)
        )
        checks = [*settled.checks, *settled.refusals]
        if settled.checks and device.platform == "gpu" and _CHECKED not in os.environ:
            # Begun anew without the memory of the check, which the peak would hold for ever; verdicts are kept.
            os.environ[_CHECKED] = json.dumps(checks)
            command = [sys.executable, "-m", "scripts.benchmarks.suite_row", json.dumps(task)]
            os.execv(sys.executable, command)
        checks = json.loads(os.environ.get(_CHECKED, "null")) or checks
        started = time.monotonic()
        step = settled.traced.lower().compile()
        compiled = time.monotonic() - started
        products = experiment.fp8_products(settled.traced, step)
        state = jax.block_until_ready(factory.initialize(experiment.seed))
        batch = {
            name: jax.device_put(_random(leaf, knobs), leaf.sharding) for name, leaf in spec.items()
        }
        started = time.monotonic()
        state, metrics = jax.block_until_ready(step(state, batch))
        first, taken = time.monotonic() - started, []
        begun = time.monotonic()
        while len(taken) < STEPS and (len(taken) < 3 or time.monotonic() - begun < SECONDS):
            started = time.monotonic()
            state, metrics = jax.block_until_ready(step(state, batch))
            taken.append(time.monotonic() - started)
        # Together, as training runs them: the host does not wait for each.
        number = max(3, min(STEPS, int(SECONDS / statistics.median(taken))))
        started = time.monotonic()
        for _ in range(1 if task["smoke"] else number):
            state, metrics = step(state, batch)
        loss = float(metrics["loss"].value())
        together = (time.monotonic() - started) / (1 if task["smoke"] else number)
        flops = model_flops(experiment, abstract, spec)
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss}")
    memory = device.memory_stats() or {}
    return {
        "layers": knobs["NUM_LAYERS"],
        "whole_layers": whole or knobs["NUM_LAYERS"],
        "rows": experiment.global_batch_size,
        "tokens": int(np.prod(shapes["tokens"].shape)),
        "flops": flops,
        "whole_flops": _whole_flops(task, flops),
        "peak_flops": peak_flops(device.device_kind, "bfloat16") or H100.peak_flops("bfloat16"),
        "mfu_convention": MFU_CONVENTION,
        "attention": settled.line,
        "kernel_checks": checks,
        "fp8_products": None if products is None else products.line(),
        "seconds": together,
        "single_seconds": statistics.median(taken),
        "first_step_seconds": first,
        "compile_seconds": compiled,
        "peak_bytes": memory.get("peak_bytes_in_use"),
        "loss": loss,
        "jax": jax.__version__,
        "device": device.device_kind,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _random(leaf, knobs) -> np.ndarray:
    if np.issubdtype(leaf.dtype, np.floating):
        return np.ones(leaf.shape, leaf.dtype)
    rng = np.random.default_rng(0)
    return rng.integers(0, knobs["VOCAB_SIZE"], leaf.shape).astype(leaf.dtype)


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    sys.exit(main())
