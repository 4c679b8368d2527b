"""The program of a training step: its state, its batch, its FLOPs; a run, a replay and a plan compile the same one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax

from paxlike import parallel
from paxlike.log.flops import train_flops
from paxlike.train.state import StateFactory, TrainState, replicated
from paxlike.train.step import TrainStep

if TYPE_CHECKING:
    from paxlike.experiment import Experiment


def state_factory(
    experiment: Experiment, spec: Mapping[str, jax.ShapeDtypeStruct], mesh: jax.sharding.Mesh
) -> StateFactory:
    """What makes the states of a run, for batches of `spec` on `mesh`."""
    return StateFactory(
        experiment.model,
        experiment.optimizer,
        spec,
        mesh,
        rules=experiment.zero.state_rules(experiment.rules),
        gradient_rules=experiment.zero.gradient_rules(experiment.rules),
        offload=experiment.offload_optimizer_state,
    )


def jit_step(experiment: Experiment, factory: StateFactory):
    """The training step, jitted: `lower(abstract, spec)` is the one program that runs train and that plans compile."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, factory.abstract())
    step = TrainStep.of(factory, experiment.task, **step_options(experiment))

    def train_step(state, batch):  # its name is that of the program in profiles and dumps
        return step(state, batch)

    place = (shardings, replicated(factory.mesh))
    return jax.jit(train_step, donate_argnums=0, out_shardings=place)


def step_options(experiment: Experiment) -> dict[str, Any]:
    """Those of `TrainStep.of`."""
    return {
        "num_microbatches": experiment.num_accumulated,
        "seed": experiment.seed,
        "accumulation_dtype": experiment.accumulation_dtype,
    }


def model_flops(experiment: Experiment, abstract: TrainState, spec: Mapping[str, Any]) -> int:
    """FLOPs that a step needs, of all devices together; see `paxlike.log.flops`."""
    model, task = experiment.model, experiment.task
    variables = {"params": abstract.params, **abstract.collections}
    with parallel.without_pipeline():
        return train_flops(lambda v, b: task.forward(model, v, b), variables, spec)


def batch_spec(spec: Mapping[str, jax.ShapeDtypeStruct], mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch with their shardings: rows over the data and fsdp axes."""
    names = ("batch", "length")
    return {
        name: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=parallel.named_sharding(mesh, names[: len(leaf.shape)])
        )
        for name, leaf in spec.items()
    }
