"""Are loss and gradients of a config on its mesh those of one device?

    python scripts/check_mesh.py --fdl_config=Synthetic126M --fdl.ICI_MESH_SHAPE=[2,2,2] ... [--tolerance 1e-5]

Takes main.py's flags. The first batch of the config goes through the model once on the whole mesh and once on one
device, which has to hold it all: shrink the model (`NUM_LAYERS`, `MODEL_DIMS`, ...) and set FPROP_DTYPE=float32.
Prints the losses and the parameters whose gradients differ most, and exits with 1 where one is beyond the tolerance, a
share of the norm of its tensor.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")

import fiddle as fdl  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
from flax import linen as nn  # noqa: E402

from configs import flags  # noqa: E402
from paxlike import parallel  # noqa: E402
from paxlike.arguments import ArgumentParser  # noqa: E402
from paxlike.experiment import Experiment  # noqa: E402
from paxlike.train.state import abstract_variables  # noqa: E402


def main() -> int:
    """Returns 1 where the mesh and one device disagree."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tolerance", type=float, default=1e-5)
    parser.add_argument("--rows", type=int, default=5, help="gradients that are printed")
    options, rest = parser.parse_known_args()
    request, unknown = flags.split(["main.py", *rest])
    if unknown[1:]:
        parser.error(f"{unknown[1]} is no flag of this script or of a config")
    experiment: Experiment = fdl.build(flags.resolve(request, dict(os.environ)).tree)
    experiment = experiment.on_these_devices()
    whole = experiment.mesh.build()
    one = parallel.Mesh(ici=(1,) * len(whole.axis_names), axes=whole.axis_names)
    single = one.build(jax.devices()[:1])
    here = parallel.Mesh().build(jax.devices()[:1])
    with (
        parallel.activate(here),
        experiment.train_data.batches(
            global_batch=experiment.global_batch_size,
            sharding=parallel.named_sharding(here, ("batch", "length")),
        ) as batches,
    ):
        batch = {name: np.asarray(value) for name, value in next(batches).items()}
    params = _initial(experiment, single)
    expected = _run(experiment, single, params, batch)
    found = _run(experiment, whole, params, batch)
    sizes = " x ".join(f"{axis} {size}" for axis, size in whole.shape.items())
    print(f"loss: {found[0]:.7f} on {sizes}, {expected[0]:.7f} on one device")
    apart = sorted(_distances(found[1], expected[1]), reverse=True)
    for distance, name in apart[: options.rows]:
        print(f"{distance:10.2e}  {name}")
    loss = abs(found[0] - expected[0]) / abs(expected[0])
    good = max(loss, apart[0][0]) <= options.tolerance
    print("the same" if good else f"NOT the same: beyond {options.tolerance:g}")
    return 0 if good else 1


def _initial(experiment: Experiment, mesh: jax.sharding.Mesh) -> Any:
    with parallel.activate(mesh, experiment.training_rules):
        tokens = jax.numpy.zeros((1, 1), jax.numpy.int32)
        init = jax.jit(lambda key: nn.unbox(experiment.model.init(key, tokens))["params"])
        return jax.device_get(init(jax.random.key(experiment.seed)))


def _run(experiment: Experiment, mesh, params: Any, batch: dict[str, np.ndarray]):
    """(mean loss, gradients) on the host."""
    model, task = experiment.model, experiment.task
    with parallel.activate(mesh, experiment.training_rules):
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract_variables(model, mesh)["params"])
        rows = {
            name: jax.device_put(
                value, parallel.named_sharding(mesh, ("batch", "length")[: value.ndim])
            )
            for name, value in batch.items()
        }

        def objective(params, batch):
            rngs = {"dropout": jax.random.key(experiment.seed)}
            loss = task.loss(model, {"params": params}, batch, rngs)
            return loss.objective / task.weight(batch)

        compute = jax.jit(jax.value_and_grad(objective), out_shardings=(None, places))
        value, gradients = jax.device_get(compute(jax.device_put(params, places), rows))
    return float(value), gradients


def _distances(found: Any, expected: Any):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        norm = max(float(np.linalg.norm(b)), 1e-30)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        yield float(np.linalg.norm(a - b)) / norm, name


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (flags.UsageError, ValueError) as error:
        sys.exit(f"error: {error}")
