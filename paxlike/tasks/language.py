"""Causal language modelling: predict every next token; loss in nats per token."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from paxlike.log.metric import Metric
from paxlike.ops import attention, cross_entropy, sown
from paxlike.tasks import choice, experts
from paxlike.tasks.task import Batch, Loss, Metrics, Variables


@dataclasses.dataclass(frozen=True)
class CausalLanguage:
    """Cross-entropy of the next token, averaged over the tokens of weight 1.

    Attributes:
      z_loss: coefficient of the squared log normaliser (Chowdhery et al. 2022, section 5), 0 for none.
      chunk: positions of a row whose logits exist at a time; None chooses by size, 0 never splits.
    """

    z_loss: float = 0.0
    chunk: int | None = None

    def __post_init__(self):
        if not self.z_loss >= 0.0:
            raise ValueError(f"Z_LOSS_WEIGHT={self.z_loss} must be at least 0")
        if self.chunk is not None and self.chunk < 0:
            raise ValueError(
                f"LOGITS_CHUNK={self.chunk} must be None, 0 (the whole row) or positions"
            )

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """Number of scored tokens of the batch."""
        return jnp.sum(batch["weights"])

    def loss(self, model: nn.Module, variables: Variables, batch: Batch, rngs) -> Loss:
        """Sum of the cross-entropy and the z-loss over the scored tokens; accuracy beside it."""
        output, collections = model.apply(
            variables,
            batch["tokens"],
            **_layout(batch),
            train=True,
            rngs=rngs,
            mutable=[*_mutable(variables), *sown.SOWN],
        )
        total, parts = cross_entropy.linear_cross_entropy(
            output.hidden,
            output.table,
            output.aligned(batch["targets"]),
            output.aligned(batch["weights"]),
            chunk=self.chunk,
            z_loss=self.z_loss,
            logit_cap=output.logit_cap,
        )
        weight = self.weight(batch)
        metrics = {
            "loss": Metric(total, weight),
            "log_pplx": Metric(parts.loss, weight),
            "accuracy": Metric(parts.num_correct, weight),
        }
        if self.z_loss:
            metrics["z_loss"] = Metric(self.z_loss * parts.z_loss, weight)
        collections = dict(collections)
        losses, summaries, updates = (collections.pop(name, {}) for name in sown.SOWN)
        if losses:
            # The mean over the tokens is what the auxiliary losses are added to.
            extra = sown.total(losses) * weight
            total = total + extra
            metrics["aux_loss"] = Metric(extra, weight)
        metrics |= experts.metrics(summaries, weight)
        return Loss(total, metrics, collections, updates)

    def evaluate(self, model: nn.Module, variables: Variables, batch: Batch) -> Metrics:
        """Loss and log-perplexity (nats per token), accuracy, bits per byte, and the measures of data sets that ask.

        Rows that are one `whole_answer` have `acc_strict`: an answer is right if every scored token is the argmax
        over the vocabulary (LAMBADA). Those with `alternatives` have `boolq_acc`, see `two_way_accuracy`.
        """
        output = model.apply(variables, batch["tokens"], **_layout(batch))
        nll, correct = cross_entropy.token_cross_entropy(
            output.hidden,
            output.table,
            output.aligned(batch["targets"]),
            chunk=self.chunk,
            logit_cap=output.logit_cap,
        )
        weights = output.aligned(batch["weights"])
        rows = batch.get("example_weight", jnp.ones(weights.shape[:1]))
        weights = weights * rows[:, None]
        total, weight = jnp.sum(nll * weights), jnp.sum(weights)
        metrics = {
            "loss": Metric(total, weight),
            "log_pplx": Metric(total, weight),
            "accuracy": Metric(jnp.sum(correct * weights), weight),
        }
        if "whole_answer" in batch:
            strict = jnp.all(correct | (weights == 0), axis=-1)
            scored = rows * batch["whole_answer"] * jnp.any(weights > 0, axis=-1)
            metrics["acc_strict"] = Metric(jnp.sum(strict * scored), jnp.sum(scored))
        if "alternatives" in batch:
            metrics["boolq_acc"] = choice.two_way_accuracy(
                output.in_order(), output.table, batch["targets"], batch["alternatives"], rows
            )
        if "num_bytes" in batch:
            metrics["bits_per_byte"] = Metric(
                total / math.log(2.0), jnp.sum(batch["num_bytes"] * rows)
            )
        return metrics

    def forward(self, model: nn.Module, variables: Variables, batch: Batch) -> jax.Array:
        """The logits of every position."""
        with attention.plain():
            return model.apply(variables, batch["tokens"], **_layout(batch)).logits()


def _layout(batch: Batch) -> dict[str, jax.Array]:
    return {name: batch[name] for name in ("positions", "segments") if name in batch}


def _mutable(variables: Variables) -> list[str]:
    return [name for name in variables if name != "params"]
