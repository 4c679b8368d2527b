"""The training state, and how it is born: sharded, on the devices, from one abstract description."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from paxlike import parallel
from paxlike.train.optimizer import Optimizer, merge

PyTree = Any


@flax.struct.dataclass
class TrainState:
    """Everything a run needs to go on, apart from the position in the data.

    Attributes:
      step: number of steps taken, skipped ones included.
      params: float32 parameters; frozen ones may be of other dtypes.
      opt_state: state of the optax transformation.
      collections: Flax collections other than the parameters (FP8 scales, batch statistics).
      ema: moving average of the trainable parameters (None in place of frozen ones), None where it is off.
      skipped_steps: steps whose gradient was not finite and that changed nothing.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    collections: Mapping[str, PyTree]
    ema: PyTree
    skipped_steps: Int[Array, ""]

    def variables(self, *, use_ema: bool = False) -> dict[str, PyTree]:
        """The Flax variables of the model; with the averaged parameters where there are any and they are asked for."""
        params = merge(self.ema, self.params) if use_ema and self.ema is not None else self.params
        return {"params": params, **self.collections}


@dataclasses.dataclass(frozen=True)
class StateFactory:
    """Makes training states of one model and optimizer on one mesh, all from the same abstract description."""

    model: nn.Module
    optimizer: Optimizer
    spec: Mapping[str, jax.ShapeDtypeStruct]  # of a batch
    mesh: jax.sharding.Mesh

    def abstract(self) -> TrainState:
        """Shapes, dtypes and shardings of the state; nothing is allocated.

        Raises:
          ValueError: a parameter does not divide over the mesh.
        """
        return placed(self.boxed(), self.mesh)

    def boxed(self) -> TrainState:
        """Shapes and dtypes of the state in boxes with the logical names of their dimensions; the same on any mesh."""
        return jax.eval_shape(lambda: self._boxed(jax.random.key(0)))

    def initialize(self, seed: int) -> TrainState:
        """A fresh state, each shard made on the device that keeps it."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract())
        make = jax.jit(
            lambda key: jax.tree.map(_unbox, self._boxed(key), is_leaf=_is_box),
            out_shardings=shardings,
        )
        return make(jax.random.key(seed))

    def _boxed(self, key: jax.Array) -> TrainState:
        """The state whose leaves still carry the logical names of their dimensions."""
        inputs = {k: jnp.zeros(v.shape, v.dtype) for k, v in self.spec.items() if k == "tokens"}
        variables = dict(self.model.init({"params": key, "dropout": key}, **inputs))
        params = variables.pop("params")
        trained = self.optimizer.select(params)
        _check_trainable(trained)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self.optimizer.init(trained),
            collections=variables,
            # A copy: the averaged parameters must not share buffers with those that are donated to the step.
            ema=jax.tree.map(jnp.copy, trained) if self.optimizer.ema_decay else None,
            skipped_steps=jnp.zeros((), jnp.int32),
        )


def num_parameters(params: PyTree) -> int:
    """Number of scalars in `params` (arrays or abstract arrays)."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def abstract_variables(model: nn.Module, mesh: jax.sharding.Mesh) -> dict[str, PyTree]:
    """Shapes, dtypes and shardings of the model's variables on `mesh`, nothing allocated: for reading weights alone.

    Call it with `mesh` in force. ValueError where a parameter does not divide over it.
    """
    rows = parallel.num_shards("batch")
    boxed = jax.eval_shape(
        lambda: dict(model.init(jax.random.key(0), jnp.zeros((rows, 1), jnp.int32)))
    )
    return placed(boxed, mesh)


def _check_trainable(params: PyTree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            # The path of a boxed parameter ends with the box's own field.
            name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
            raise ValueError(
                f"parameter '{name}' of type {leaf.dtype} cannot be trained; leave it out of `trainable`"
            )


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding of a scalar."""
    return NamedSharding(mesh, P())


def placed(boxed: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
    """Abstract arrays with the shardings that their boxes, or the lack of one, ask for on `mesh`, which is in force.

    ValueError where a parameter does not divide over it.
    """

    def place(path, leaf):
        names = leaf.names if _is_box(leaf) else ()
        leaf = _unbox(leaf)
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        if (
            len(names) != leaf.ndim
        ):  # no box, or a factored moment that keeps the box of its parameter but not its rank
            names = (None,) * leaf.ndim
        parallel.check_divisible(
            names, leaf.shape, dict(mesh.shape), f"parameter '{where}' of shape {leaf.shape}"
        )
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=parallel.named_sharding(mesh, names)
        )

    return jax.tree_util.tree_map_with_path(place, boxed, is_leaf=_is_box)


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.meta.AxisMetadata)


def _unbox(leaf: Any) -> Any:
    return (
        leaf.value if _is_box(leaf) else leaf
    )  # not `unbox()`, which constrains to a mesh axis of the logical name
