"""What every objective looks like to the step and to the evaluator."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from paxlike.log.metric import Metric

Batch = Mapping[str, jax.Array]
Variables = Mapping[str, Any]  # Flax collections: {"params": ..., ...}
Metrics = dict[str, Metric]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Loss:
    """What a training batch, or a part of one, contributes.

    Attributes:
      objective: what is minimised, summed over the batch and not yet divided by the weight of the whole batch.
      metrics: sums and weights for the log.
      collections: new values of Flax collections other than the parameters, `{}` where there are none.
      updates: what is added to parameters without a gradient, a part of their tree (`ops.sown`).
    """

    objective: Float[Array, ""]
    metrics: Metrics
    collections: Variables
    updates: Variables = dataclasses.field(default_factory=dict)


class Task(Protocol):
    """An objective: turns a model and a batch into something to minimise and metrics to watch."""

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """What the sum over the batch is divided by; known before the forward pass, so that microbatches add up."""
        ...

    def loss(
        self, model: nn.Module, variables: Variables, batch: Batch, rngs: Mapping[str, jax.Array]
    ) -> Loss:
        """The training loss (dropout active)."""
        ...

    def evaluate(self, model: nn.Module, variables: Variables, batch: Batch) -> Metrics:
        """Metrics of held-out rows; rows with `example_weight` 0 count nothing."""
        ...

    def forward(self, model: nn.Module, variables: Variables, batch: Batch) -> Any:
        """The forward pass with everything that costs FLOPs, for counting them."""
        ...
