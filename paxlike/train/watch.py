"""A training step that measures: what each module gives, each gradient and each update."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from paxlike import parallel
from paxlike.train import program
from paxlike.train.matrices import is_box, named
from paxlike.train.state import StateFactory, TrainState, replicated
from paxlike.train.step import TrainStep

if TYPE_CHECKING:
    from paxlike.experiment import Experiment

_SOWN = "intermediates"
_NAME = "replay"  # of what is sown
_MODULES, _GRADIENTS = "replay_modules", "replay_gradients"

Stats = dict[str, Any]  # max, rms and non_finite: scalars, or vectors over the layers


class Watch:
    """The training step, compiled to measure rather than to train: the state is left as it is."""

    def __init__(self, experiment: Experiment, factory: StateFactory, abstract, spec):
        task = _WatchedTask(experiment.task, [])
        step = _WatchedStep.of(factory, task, **program.step_options(experiment))
        boxes = named(factory.boxed().params)
        # Arrays of a stack have the layers in front.
        stacked = {
            name: is_box(box) and not {*parallel.STACKED}.isdisjoint(box.names[:1])
            for name, box in boxes.items()
        }

        def measure(state, batch):
            new, metrics = step(state, batch)
            moved = jax.tree.map(
                lambda a, b: a.astype(jnp.float32) - b.astype(jnp.float32),
                experiment.optimizer.select(new.params),
                experiment.optimizer.select(state.params),
            )
            layers = lambda tree: {
                name: _measured([leaf], keep=int(stacked[name]), with_norm=True)
                for name, leaf in named(tree).items()
            }
            return {
                "modules": metrics[_MODULES],
                "gradients": layers(metrics[_GRADIENTS]),
                "updates": layers(moved),
                "values": layers(state.params),
            }

        with parallel.without_pipeline():
            jitted = jax.jit(measure, out_shardings=replicated(factory.mesh))
            self._program = jitted.lower(abstract, spec).compile()
        self.order = task.order

    def __call__(self, state: TrainState, batch) -> dict[str, dict[str, Stats]]:
        return jax.device_get(self._program(state, batch))


@dataclasses.dataclass(frozen=True, eq=False)
class _WatchedTask:
    """A task that also gives what the outputs of all modules are like.

    Attributes:
      order: paths of the modules as their calls end; filled in while the step is traced.
    """

    task: Any
    order: list[str]

    def weight(self, batch):
        return self.task.weight(batch)

    def loss(self, model, variables, batch, rngs):
        with nn.intercept_methods(self._see):
            loss = self.task.loss(model, {**variables, _SOWN: {}}, batch, rngs)
        collections = dict(loss.collections)
        modules = dict(_seen_in(collections.pop(_SOWN, {})))
        return dataclasses.replace(
            loss, collections=collections, metrics={**loss.metrics, _MODULES: modules}
        )

    def _see(self, call, args, kwargs, context):
        output = call(*args, **kwargs)
        if context.method_name == "__call__":
            arrays = [x for x in jax.tree.leaves(output) if jnp.issubdtype(x.dtype, jnp.floating)]
            if arrays and context.module.sow(_SOWN, _NAME, _measured(arrays)):
                name = "/".join(context.module.path) or "model"
                if name not in self.order:
                    self.order.append(name)
        return output


class _WatchedStep(TrainStep):
    """A training step whose metrics hold what its modules give and the gradients themselves."""

    def _gradients(self, state, whole, batch):
        gradients, collections, metrics, *rest = super()._gradients(state, whole, batch)
        return gradients, collections, {**metrics, _GRADIENTS: gradients}, *rest

    def _of_all_parts(self, metrics):
        parts = dict(metrics)
        modules = {name: _merged(stats) for name, stats in parts.pop(_MODULES).items()}
        return {**super()._of_all_parts(parts), _MODULES: modules}


def _seen_in(collection: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator:
    """(path of a module, what was sown in it), calls of the same module together."""
    for name, node in collection.items():
        if name == _NAME:
            stats = _merged(jax.tree.map(lambda *each: jnp.stack(each), *node))
            yield "/".join(path) or "model", stats
        else:
            yield from _seen_in(node, (*path, name))


def _measured(arrays: list[jax.Array], *, keep: int = 0, with_norm: bool = False) -> Stats:
    """Largest absolute value, root mean square and share that is not finite, but for the first `keep` dimensions."""
    parts = []
    for x in arrays:
        wide, axes = x.astype(jnp.float32), tuple(range(keep, x.ndim))
        finite = jnp.isfinite(wide)
        size = jnp.abs(jnp.where(finite, wide, 0.0))
        most = jnp.max(size, axis=axes, keepdims=True)
        # Over the maximum: squares of large numbers are no float32.
        shares = jnp.square(size / jnp.where(most > 0, most, 1.0))
        count = x.size / math.prod(x.shape[:keep])
        parts.append(
            {
                "max": jnp.squeeze(most, axes),
                "rms": jnp.squeeze(most, axes) * jnp.sqrt(jnp.sum(shares, axis=axes) / count),
                "non_finite": jnp.sum(~finite, axis=axes) / count,
            }
        )
    merged = _merged(jax.tree.map(lambda *each: jnp.stack(each), *parts))
    if with_norm:
        merged["norm"] = merged["rms"] * math.sqrt(count)
    return merged


def _merged(stats: Stats) -> Stats:
    """Of equal parts that are stacked in front."""
    most = jnp.max(stats["rms"], axis=0)
    shares = jnp.square(stats["rms"] / jnp.where(most > 0, most, 1.0)[None])
    return {
        "max": jnp.max(stats["max"], axis=0),
        "rms": most * jnp.sqrt(jnp.mean(shares, axis=0)),
        "non_finite": jnp.mean(stats["non_finite"], axis=0),
    }
