"""Optimizer: global-norm clip, a direction, decoupled weight decay, learning-rate schedule, as Pax orders them.

update = -lr(step) * factor * (cap(direction(clip(g))) + weight_decay * p), where the direction is Adam's or another of
`directions`, and the factor is 1 but for parameters that are named. The schedule is a function of the step counter of
the training state, which advances on skipped steps too. AdamW: Loshchilov and Hutter 2019.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from paxlike.train.directions import Adafactor, Adam, Direction, Lion, Muon, Sgd, regex
from paxlike.train.matrices import Split, map_named, named, splits
from paxlike.train.schedule import Schedule

__all__ = ["Adafactor", "Adam", "Lion", "Muon", "Optimizer", "Schedule", "Sgd", "merge"]

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW, or another direction, with the semantics of Pax.

    Attributes:
      clip_norm: bound of the global gradient norm, 0 for none.
      clip_update: cap of the root mean square of each tensor's direction, 0 or less for none.
      b1, b2, epsilon, epsilon_root: of Adam: m / (sqrt(v + epsilon_root) + epsilon).
      first_dtype, second_dtype: in which Adam's moments are kept, float32 or bfloat16.
      direction: in place of Adam: one of `directions`.
      weight_decay: decoupled, times the learning rate.
      decay_exclude: parameters whose path matches this regular expression are not decayed; None decays all (Pax).
      rate_factors: (regular expression, factor of the learning rate); the first that matches a path counts. A factor
        of 0 freezes, as if the parameter were not trainable.
      skip_norm: skip steps whose gradient norm is above this, 0 for none; non-finite ones are always skipped.
      ema_decay: of the averaged parameters, 0 for none.
      trainable: parameters whose path matches this regular expression are trained; None trains all. The others have no
        gradient, no moments and no average.
      splits: the matrices that each parameter is made of; `bound` fills it in.
    """

    schedule: Schedule
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8
    epsilon_root: float = 0.0
    first_dtype: str = "float32"
    second_dtype: str = "float32"
    direction: Direction | None = None
    weight_decay: float = 0.0
    decay_exclude: str | None = None
    rate_factors: tuple[tuple[str, float], ...] = ()
    clip_norm: float = 0.0
    clip_update: float = 0.0
    skip_norm: float = 0.0
    ema_decay: float = 0.0
    trainable: str | None = None
    splits: Mapping[str, Split] | None = None

    def __post_init__(self):
        if self.trainable is not None:
            regex("trainable", self.trainable)
        if self.decay_exclude is not None:
            regex("WEIGHT_DECAY_EXCLUDE", self.decay_exclude)
        for pattern, factor in self.rate_factors:
            regex("LEARNING_RATE_FACTORS", pattern)
            if not factor >= 0.0:
                raise ValueError(f"LEARNING_RATE_FACTORS: {factor} for {pattern!r} is negative")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"EMA_DECAY={self.ema_decay} is not in [0, 1)")
        if not 0.0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"WEIGHT_DECAY={self.weight_decay} must be a finite number of at least 0"
            )
        for name in ("clip_norm", "skip_norm"):  # clip_update has -1 for none, as in Pax
            if not getattr(self, name) >= 0.0:
                raise ValueError(
                    f"{name}={getattr(self, name)} of the optimizer must be at least 0"
                )
        _ = self.adam  # refuses bad numbers

    @property
    def adam(self) -> Adam:
        """The direction where there is no other, and of the parameters that another leaves."""
        moments = {"first_dtype": self.first_dtype, "second_dtype": self.second_dtype}
        return Adam(self.b1, self.b2, self.epsilon, self.epsilon_root, **moments)

    def bound(self, params: PyTree) -> Optimizer:
        """This optimizer for a model with these parameters, in their boxes: it knows their matrices then.

        Raises:
          ValueError: a regular expression matches no parameter, or there is nothing to work on.
        """
        if self.splits is not None:
            return self
        names = list(named(params))
        patterns = [("LEARNING_RATE_FACTORS", pattern) for pattern, _ in self.rate_factors]
        if self.weight_decay and self.decay_exclude is not None:
            patterns.append(("WEIGHT_DECAY_EXCLUDE", self.decay_exclude))
        if isinstance(self.direction, Muon) and self.direction.by_adam is not None:
            patterns.append(("MUON_EXCLUDE", self.direction.by_adam))
        for knob, pattern in patterns:
            if not any(re.search(pattern, name) for name in names):
                raise ValueError(
                    f"{knob}: {pattern!r} matches no parameter; they are called {names[0]} and so on"
                )
        bound = dataclasses.replace(self, splits=splits(params))
        bound._transformation(splits(bound.select(params)))
        return bound

    def select(self, params: PyTree) -> PyTree:
        """The trainable part of nested dictionaries of parameters (or of their shardings): None in place of the rest.

        Raises:
          ValueError: nothing is trainable.
        """
        if self.trainable is None and all(factor for _, factor in self.rate_factors):
            return params
        trainable = re.compile(self.trainable or "")

        def pick(path, leaf):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return leaf if trainable.search(name) and self.rate_factor(name) else None

        # A leaf is what is no dictionary: boxes and shardings are not looked into.
        is_leaf = lambda node: not isinstance(node, Mapping)
        part = jax.tree_util.tree_map_with_path(pick, params, is_leaf=is_leaf)
        if not jax.tree.leaves(part):
            first = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_leaf)[0][0]
            name = jax.tree_util.keystr(first, simple=True, separator="/")
            what = (
                f"trainable={self.trainable!r} matches no parameter"
                if self.trainable is not None
                else "LEARNING_RATE_FACTORS freezes every parameter"
            )
            raise ValueError(f"{what}; they are called {name} and so on")
        return part

    def rate_factor(self, name: str) -> float:
        """What the learning rate is multiplied by for the parameter of this path."""
        return next((f for pattern, f in self.rate_factors if re.search(pattern, name)), 1.0)

    def init(self, params: PyTree) -> PyTree:
        """State for trainable `params`; moments have the shapes, and the boxes, of the parameters."""
        return self._transformation().init(params)

    def update(self, gradients: PyTree, opt_state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        """The direction to go, not yet times the learning rate, and the new state."""
        return self._transformation().update(gradients, opt_state, params)

    def clip_factor(self, norm: Float[Array, ""]) -> Float[Array, ""]:
        """What the gradients are multiplied by so that their norm is at most `clip_norm`."""
        if self.clip_norm <= 0:
            return jnp.ones((), jnp.float32)
        return jnp.minimum(1.0, self.clip_norm / jnp.maximum(norm, 1e-30))

    def accepts(self, norm: Float[Array, ""]) -> jax.Array:
        """Whether a step with this gradient norm is taken."""
        finite = jnp.isfinite(norm)
        return finite & (norm <= self.skip_norm) if self.skip_norm > 0 else finite

    def _transformation(
        self, of: Mapping[str, Split] | None = None
    ) -> optax.GradientTransformation:
        direction, of = self.direction or self.adam, of or self.splits
        if of is None and isinstance(direction, Adafactor | Muon):
            raise ValueError(
                f"{type(direction).__name__} must know the matrices of the model: use `bound(params)` of the optimizer"
            )
        parts = [direction.transformation(of or {}, self.adam)]
        if self.clip_update > 0:
            parts.append(optax.clip_by_block_rms(self.clip_update))
        if self.weight_decay:
            mask = None if self.decay_exclude is None else _paths_not_matching(self.decay_exclude)
            parts.append(optax.add_decayed_weights(self.weight_decay, mask))
        if self.rate_factors:
            parts.append(optax.stateless(lambda u, _: map_named(self._scaled, u)))
        return optax.chain(*parts)

    def _scaled(self, name: str, direction: jax.Array) -> jax.Array:
        factor = self.rate_factor(name)
        return direction if factor == 1.0 else factor * direction


def merge(part: PyTree, whole: PyTree) -> PyTree:
    """`whole` with the leaves of `part`, as `Optimizer.select` makes it, in their places."""
    return jax.tree.map(
        lambda new, old: old if new is None else new, part, whole, is_leaf=lambda x: x is None
    )


def _paths_not_matching(pattern: str) -> Callable[[PyTree], PyTree]:
    return lambda params: map_named(lambda name, _: re.search(pattern, name) is None, params)
