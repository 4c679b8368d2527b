"""The training step: loss, gradients, clip, update, as one pure function of (state, batch)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from paxlike.ops import fp8
from paxlike.train.optimizer import Optimizer, merge
from paxlike.train.state import StateFactory, TrainState

OVERWRITE = "_overwrite_with_gradient"  # the collection whose "gradients" are its new values (Flax)
# Neither the optimizer nor clipping nor an average sees what is differentiated with respect to these.
_OBSERVED = (OVERWRITE, fp8.STATE)
LOSS_EPSILON = 1e-6  # Pax adds this to the weight that the loss is divided by


@dataclasses.dataclass(
    frozen=True, eq=False
)  # by identity: jit needs a hash, and shardings have none
class TrainStep:
    """`step(state, batch) -> (state, metrics)`.

    Attributes:
      num_microbatches: parts into which the batch is cut; their gradients are added, so the result is that of the
        whole batch.
      seed: root of all randomness; a step uses `fold_in(seed, step)`.
      shardings: that the gradients of all parameters are held to, so that they are reduced and scattered rather than
        replicated. None on one device.
      update_shardings: that all parameters are held to while they are updated; None: their own.
      opt_state_shardings: on the devices, of an optimizer state that is kept in the memory of the host; None: it is
        not kept there.
      accumulation_dtype: in which the gradients of microbatches are added.
    """

    model: nn.Module
    task: Any
    optimizer: Optimizer
    num_microbatches: int = 1
    seed: int = 1234
    shardings: Any = None
    update_shardings: Any = None
    opt_state_shardings: Any = None
    accumulation_dtype: str = "float32"

    @classmethod
    def of(cls, factory: StateFactory, task: Any, **options: Any) -> TrainStep:
        """The step on the states of `factory`, laid out as it says."""
        layout = factory.layout()
        return cls(
            factory.model,
            task,
            factory.bound_optimizer,
            shardings=layout.gradients,
            update_shardings=layout.update,
            opt_state_shardings=layout.opt_state,
            **options,
        )

    def __call__(
        self, state: TrainState, batch: Mapping[str, jax.Array]
    ) -> tuple[TrainState, dict[str, Any]]:
        """One step; a step whose gradient is not finite changes nothing but the counters."""
        # What is not trained is handed on as it is: it has no gradient, and is neither averaged nor compared.
        whole, state = (
            state.params,
            dataclasses.replace(state, params=self.optimizer.select(state.params)),
        )
        gradients, collections, metrics, moves = self._gradients(state, whole, batch)
        norm, param_norm = optax.tree.norm(gradients), optax.tree.norm(state.params)
        if self.update_shardings is not None:
            gradients = self._held(gradients, self.update_shardings)
            state = dataclasses.replace(
                state, params=self._held(state.params, self.update_shardings)
            )
        if self.opt_state_shardings is not None:
            state = dataclasses.replace(
                state, opt_state=jax.device_put(state.opt_state, self.opt_state_shardings)
            )
        factor = self.optimizer.clip_factor(norm)
        rate = self.optimizer.schedule(state.step)
        directions, opt_state = self.optimizer.update(
            jax.tree.map(lambda g: g * factor, gradients), state.opt_state, state.params
        )
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, directions)
        params = _moved(params, moves)
        ema = self._average(state, params)
        accepted = self.optimizer.accepts(norm)
        proposed = TrainState(state.step, params, opt_state, collections, ema, state.skipped_steps)
        kept = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), proposed, state)
        kept = dataclasses.replace(kept, params=merge(kept.params, whole))
        skipped = state.skipped_steps + jnp.where(accepted, 0, 1)
        metrics |= {
            "learning_rate": rate,
            "grad_norm": norm,
            "clipped_grad_norm": norm * factor,
            "param_norm": param_norm,
            "skipped_steps": skipped,
        }
        return dataclasses.replace(kept, step=state.step + 1, skipped_steps=skipped), metrics

    def _gradients(self, state: TrainState, whole, batch):
        """Gradients of the mean loss for the part of the `whole` in `state`, new collections, metrics and updates."""
        weight = self.task.weight(batch) + LOSS_EPSILON
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)
        observed = {k: v for k, v in state.collections.items() if k in _OBSERVED}
        others = {k: v for k, v in state.collections.items() if k not in _OBSERVED}

        def objective(params, observed, others, part, key):
            variables = {"params": merge(params, whole), **observed, **others}
            loss = self.task.loss(self.model, variables, part, {"dropout": key})
            return loss.objective / weight, loss

        differentiate = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)

        def microbatch(part, key, others):
            (_, loss), (gradients, seen) = differentiate(state.params, observed, others, part, key)
            if self.shardings is not None:
                gradients = self._held(gradients, self.shardings)
            kept = {k: v for k, v in loss.collections.items() if k not in _OBSERVED}
            return gradients, seen, {**others, **kept}, loss.metrics, loss.updates

        if self.num_microbatches == 1:
            gradients, seen, others, *rest = microbatch(batch, key, others)
            return gradients, {**_overwritten(observed, seen), **others}, *rest

        def accumulate(carry, part_and_index):
            (gradients, seen, others), (part, index) = carry, part_and_index
            # Each part starts from the scales of the step before; the largest of what they see counts.
            more, new, others, *rest = microbatch(part, jax.random.fold_in(key, index), others)
            gradients = jax.tree.map(lambda a, g: a + g.astype(a.dtype), gradients, more)
            return (gradients, jax.tree.map(jnp.maximum, seen, new), others), rest

        nothing = jax.tree.map(lambda a: jnp.full_like(a, -jnp.inf), observed)
        dtype = jnp.dtype(self.accumulation_dtype)
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype), state.params)
        parts = _split(batch, self.num_microbatches)
        carry, (metrics, moves) = jax.lax.scan(
            accumulate, (zeros, nothing, others), (parts, jnp.arange(self.num_microbatches))
        )
        gradients, seen, others = carry
        return (
            jax.tree.map(lambda g: g.astype(jnp.float32), gradients),
            {**_overwritten(observed, seen), **others},
            self._of_all_parts(metrics),
            jax.tree.map(lambda u: jnp.mean(u, axis=0), moves),
        )

    def _of_all_parts(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Metrics of the whole batch from those of the microbatches, stacked."""
        return jax.tree.map(lambda m: jnp.sum(m, axis=0), metrics)

    def _held(self, trained, shardings):
        """The trained part of the parameters, or their gradients, held to shardings of all."""
        place = self.optimizer.select(shardings)
        return jax.tree.map(jax.lax.with_sharding_constraint, trained, place)

    def _average(self, state: TrainState, params):
        if state.ema is None:
            return None
        decay = self.optimizer.ema_decay
        return jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, state.ema, params)


def _moved(params, moves):
    """`params` with `moves`, a part of their tree, added; what is not trained stays."""
    if not isinstance(moves, Mapping):
        return None if params is None else params + moves
    return (
        {
            name: _moved(value, moves[name]) if name in moves else value
            for name, value in params.items()
        }
        if moves
        else params
    )


def _overwritten(observed: dict[str, Any], seen: dict[str, Any]) -> dict[str, Any]:
    """The new collections, of the old ones and of what was differentiated with respect to them."""
    return {
        name: jax.tree.map(fp8.advance, observed[name], new) if name == fp8.STATE else new
        for name, new in seen.items()
    }


def _split(batch, parts: int):
    """(b, ...) -> (parts, b / parts, ...), taking every parts-th row so that each part spans all devices."""

    def split(x):
        b, *rest = x.shape
        if b % parts:
            raise ValueError(f"a batch of {b} rows does not divide into {parts} microbatches")
        return jnp.moveaxis(x.reshape(b // parts, parts, *rest), 1, 0)

    return jax.tree.map(split, dict(batch))
