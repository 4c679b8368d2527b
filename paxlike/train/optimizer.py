"""Optimizer: global-norm clip, Adam, decoupled weight decay, learning-rate schedule, as Pax orders them.

update = -lr(step) * (cap(adam(clip(g))) + weight_decay * p). The schedule is a function of the step counter of the
training state, which advances on skipped steps too. AdamW: Loshchilov and Hutter 2019.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Learning rate as a function of the step: linear warm-up from 0, then flat, then decay.

    Attributes:
      kind: `linear_rampup_cosine_decay`, `linear_rampup_exponential_decay` or `constant` (Pax's names).
      peak: learning rate at the end of the warm-up.
      warmup, decay_start, decay_end: steps; flat between warmup and decay_start, constant after decay_end.
      min_ratio, max_ratio: factors of `peak` at the end and at the top.
    """

    kind: Literal["linear_rampup_cosine_decay", "linear_rampup_exponential_decay", "constant"]
    peak: float
    warmup: int = 0
    decay_start: int = 0
    decay_end: int = 1
    min_ratio: float = 0.1
    max_ratio: float = 1.0

    def __post_init__(self):
        kinds = ("linear_rampup_cosine_decay", "linear_rampup_exponential_decay", "constant")
        if self.kind not in kinds:
            raise ValueError(f"LR_SCHEDULE='{self.kind}' is none of {', '.join(kinds)}")
        if self.kind != "constant" and not 0 <= self.warmup <= self.decay_start < self.decay_end:
            raise ValueError(
                f"the schedule needs warmup <= decay start < decay end, got "
                f"{self.warmup}, {self.decay_start}, {self.decay_end}"
            )

    def __call__(self, step: jax.typing.ArrayLike) -> Float[Array, ""]:
        """The learning rate of step `step` (counted from 0)."""
        if self.kind == "constant":
            return jnp.asarray(self.peak, jnp.float32)
        step = jnp.asarray(step, jnp.float32)
        rise = (
            jnp.minimum(step / max(self.warmup, 1), 1.0)
            if self.warmup
            else jnp.ones((), jnp.float32)
        )
        done = jnp.clip((step - self.decay_start) / (self.decay_end - self.decay_start), 0.0, 1.0)
        if self.kind == "linear_rampup_cosine_decay":
            fall = self.min_ratio + (self.max_ratio - self.min_ratio) * 0.5 * (
                1.0 + jnp.cos(jnp.pi * done)
            )
        else:
            fall = self.max_ratio * (self.min_ratio / self.max_ratio) ** done
        return self.peak * rise * fall


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with the semantics of Pax.

    Attributes:
      clip_norm: bound of the global gradient norm, 0 for none.
      clip_update: cap of the root mean square of each tensor's Adam update, 0 or less for none.
      epsilon, epsilon_root: update = m / (sqrt(v + epsilon_root) + epsilon).
      weight_decay: decoupled, times the learning rate.
      decay_exclude: parameters whose path matches this regular expression are not decayed; None decays all (Pax).
      skip_norm: skip steps whose gradient norm is above this, 0 for none; non-finite ones are always skipped.
      ema_decay: of the averaged parameters, 0 for none.
      trainable: parameters whose path matches this regular expression are trained; None trains all. The others have no
        gradient, no moments and no average.
    """

    schedule: Schedule
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8
    epsilon_root: float = 0.0
    weight_decay: float = 0.0
    decay_exclude: str | None = None
    clip_norm: float = 0.0
    clip_update: float = 0.0
    skip_norm: float = 0.0
    ema_decay: float = 0.0
    trainable: str | None = None

    def __post_init__(self):
        if self.trainable is not None:
            try:
                re.compile(self.trainable)
            except re.error as error:
                raise ValueError(
                    f"trainable={self.trainable!r} is no regular expression: {error}"
                ) from error
        for name, value in (
            ("ADAM_BETA1", self.b1),
            ("ADAM_BETA2", self.b2),
            ("EMA_DECAY", self.ema_decay),
        ):
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name}={value} is not in [0, 1)")

    def select(self, params: PyTree) -> PyTree:
        """The trainable part of nested dictionaries of parameters (or of their shardings): None in place of the rest.

        Raises:
          ValueError: nothing is trainable.
        """
        if self.trainable is None:
            return params
        compiled = re.compile(self.trainable)

        def pick(path, leaf):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return leaf if compiled.search(name) else None

        # A leaf is what is no dictionary: boxes and shardings are not looked into.
        is_leaf = lambda node: not isinstance(node, Mapping)
        part = jax.tree_util.tree_map_with_path(pick, params, is_leaf=is_leaf)
        if not jax.tree.leaves(part):
            first = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_leaf)[0][0]
            name = jax.tree_util.keystr(first, simple=True, separator="/")
            raise ValueError(
                f"trainable={self.trainable!r} matches no parameter; they are called {name} and so on"
            )
        return part

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

    def _transformation(self) -> optax.GradientTransformation:
        parts = [optax.scale_by_adam(self.b1, self.b2, self.epsilon, self.epsilon_root)]
        if self.clip_update > 0:
            parts.append(optax.clip_by_block_rms(self.clip_update))
        if self.weight_decay:
            mask = None if self.decay_exclude is None else _paths_not_matching(self.decay_exclude)
            parts.append(optax.add_decayed_weights(self.weight_decay, mask))
        return optax.chain(*parts)


def merge(part: PyTree, whole: PyTree) -> PyTree:
    """`whole` with the leaves of `part`, as `Optimizer.select` makes it, in their places."""
    return jax.tree.map(
        lambda new, old: old if new is None else new, part, whole, is_leaf=lambda x: x is None
    )


def _paths_not_matching(pattern: str) -> Callable[[PyTree], PyTree]:
    compiled = re.compile(pattern)

    def mask(params: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: (
                compiled.search(jax.tree_util.keystr(path, simple=True, separator="/")) is None
            ),
            params,
        )

    return mask
