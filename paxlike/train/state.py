"""The training state, and how it is born: sharded, on the devices, from one abstract description."""

from __future__ import annotations

import dataclasses
import functools
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
from paxlike.train.matrices import is_box, named, unboxed
from paxlike.train.optimizer import Optimizer, merge

PyTree = Any
HOST_MEMORY = "pinned_host"


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


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Shardings inside the training step; None where the compiler is left to choose.

    Attributes:
      gradients: of the gradients of all parameters: they are reduced and scattered rather than replicated.
      update: of the parameters while they are updated, where that is not their own.
      opt_state: on the devices, of an optimizer state that is kept on the host.
    """

    gradients: PyTree = None
    update: PyTree = None
    opt_state: PyTree = None


@dataclasses.dataclass(frozen=True)
class StateFactory:
    """Makes training states of one model and optimizer on one mesh, all from the same abstract description.

    Attributes:
      spec: of a batch.
      rules: logical axis -> mesh axis of the optimizer state and the averaged parameters; None: as the parameters.
      gradient_rules: the same of gradients.
      offload: keep the optimizer state in the memory of the host between its uses.
    """

    model: nn.Module
    optimizer: Optimizer
    spec: Mapping[str, jax.ShapeDtypeStruct]
    mesh: jax.sharding.Mesh
    rules: parallel.Rules | None = None
    gradient_rules: parallel.Rules | None = None
    offload: bool = False

    @functools.cached_property
    def bound_optimizer(self) -> Optimizer:
        """The optimizer that knows the matrices of the model's parameters, and where they lie."""
        params = self._description.params
        bound = self.optimizer.bound(params)
        if self.mesh.size == 1:
            return bound
        placed = named(_placed(params, self.mesh, self.rules))
        splits = {
            name: dataclasses.replace(split, place=placed[name].sharding)
            for name, split in (bound.splits or {}).items()
        }
        return dataclasses.replace(bound, splits=splits)

    @functools.cached_property
    def _description(self) -> TrainState:
        return jax.eval_shape(lambda: self._boxed(jax.random.key(0)))

    def abstract(self) -> TrainState:
        """Shapes, dtypes and shardings of the state; nothing is allocated.

        Raises:
          ValueError: a parameter does not divide over the mesh.
        """
        return self.place(self.boxed())

    def boxed(self) -> TrainState:
        """Shapes and dtypes of the state in boxes with the logical names of their dimensions; the same on any mesh."""
        return self._description

    def place(self, boxed: TrainState) -> TrainState:
        """What `boxed` describes, with the shardings of this mesh; ValueError where a parameter does not divide."""
        whole = _placed(dataclasses.replace(boxed, opt_state=None, ema=None), self.mesh)
        part = _placed(
            dataclasses.replace(boxed, params=None, collections={}), self.mesh, self.rules
        )
        opt_state = _in_host_memory(part.opt_state) if self.offload else part.opt_state
        return dataclasses.replace(whole, opt_state=opt_state, ema=part.ema)

    def layout(self) -> Layout:
        """Where the training step keeps what it computes on the way from one state to the next."""

        def place(tree, rules=None):
            return jax.tree.map(lambda leaf: leaf.sharding, _placed(tree, self.mesh, rules))

        description = self._description
        opt_state = place(description.opt_state, self.rules) if self.offload else None
        if self.mesh.size == 1:
            return Layout(opt_state=opt_state)
        own = place(description.params)
        update = own if self.rules is None else place(description.params, self.rules)
        gradients = (
            own if self.gradient_rules is None else place(description.params, self.gradient_rules)
        )
        return Layout(gradients, None if update == own else update, opt_state)

    def initialize(self, seed: int) -> TrainState:
        """A fresh state, each shard made on the device that keeps it."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract())
        make = jax.jit(
            lambda key: jax.tree.map(unboxed, self._boxed(key), is_leaf=is_box),
            out_shardings=shardings,
        )
        return make(jax.random.key(seed))

    def _boxed(self, key: jax.Array) -> TrainState:
        """The state whose leaves still carry the logical names of their dimensions."""
        inputs = {k: jnp.zeros(v.shape, v.dtype) for k, v in self.spec.items() if k == "tokens"}
        variables = dict(self.model.init({"params": key, "dropout": key}, **inputs))
        params = variables.pop("params")
        optimizer = self.optimizer.bound(params)
        trained = optimizer.select(params)
        _check_trainable(trained)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(trained),
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
    return _placed(boxed, mesh)


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


def check_offload() -> None:
    """Raises ValueError where the devices have no memory of the host that they can read."""
    device = jax.local_devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST_MEMORY not in kinds:
        raise ValueError(
            f"OFFLOAD_OPTIMIZER_STATE=True needs the memory kind {HOST_MEMORY}, and {device.device_kind} has "
            f"{', '.join(kinds)}; set it to False"
        )


def _in_host_memory(tree: PyTree) -> PyTree:
    """Abstract arrays, all but scalars, in the memory of the host."""

    def move(leaf):
        if not leaf.ndim:
            return leaf
        place = leaf.sharding.with_memory_kind(HOST_MEMORY)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return jax.tree.map(move, tree)


def _placed(boxed: PyTree, mesh: jax.sharding.Mesh, rules: parallel.Rules | None = None) -> PyTree:
    """Abstract arrays with the shardings that their boxes, or the lack of one, ask for."""

    def place(path, leaf):
        names = leaf.names if is_box(leaf) else ()
        leaf = unboxed(leaf)
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        if (
            len(names) != leaf.ndim
        ):  # no box, or a factored moment that keeps the box of its parameter but not its rank
            names = (None,) * leaf.ndim
        parallel.check_divisible(
            names,
            leaf.shape,
            dict(mesh.shape),
            f"{'parameter' if rules is None else 'state'} '{where}' of shape {leaf.shape}",
            rules,
        )
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=parallel.named_sharding(mesh, names, rules)
        )

    return jax.tree_util.tree_map_with_path(place, boxed, is_leaf=is_box)
