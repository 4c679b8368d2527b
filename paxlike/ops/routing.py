"""Which experts each token goes to, and in which place of their queues: everything about a router but its weight.

Shape legend: g groups of tokens that are routed apart, s tokens of a group, e experts, k experts of a token, c places
of an expert (its capacity) for the tokens of a group, n groups of experts.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

SCORES = ("softmax", "softmax_of_chosen", "sigmoid")
_TINY = 1e-9  # added to the sum that gates are divided by, as GShard does


@dataclasses.dataclass(frozen=True)
class Choice:
    """How the scores of a router become experts and gates.

    Attributes:
      k: experts of a token.
      score: `softmax` over all experts (GShard, Switch, Mixtral); `softmax_of_chosen`, over the logits of the chosen
        ones only; `sigmoid` of each (DeepSeek-V3).
      renormalize: gates of a token are divided by their sum.
      scale: factor of the gates.
      num_groups, top_groups: experts are chosen among the best groups of experts only (DeepSeek-V2, section 2.2.2): the
        score of a group is its best expert's, with `sigmoid` the sum of its two best.
    """

    k: int = 2
    score: str = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1

    def check(self, num_experts: int) -> None:
        """Raises one line for what cannot be chosen from so many experts."""
        if self.score not in SCORES:
            raise ValueError(f"ROUTER_SCORE='{self.score}' is none of {', '.join(SCORES)}")
        if not 1 <= self.k <= num_experts:
            raise ValueError(
                f"NUM_EXPERTS_PER_TOKEN={self.k} is not between 1 and NUM_EXPERTS={num_experts}"
            )
        n, top = self.num_groups, self.top_groups
        if n < 1 or num_experts % n:
            raise ValueError(f"NUM_EXPERTS={num_experts} is not a multiple of EXPERT_GROUPS={n}")
        if not 1 <= top <= n:
            raise ValueError(f"EXPERT_GROUPS_PER_TOKEN={top} is not between 1 and {n}")
        if self.k > top * (num_experts // n):
            raise ValueError(
                f"NUM_EXPERTS_PER_TOKEN={self.k} is more than {top} of {n} groups of {num_experts} experts have"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Where tokens go.

    Attributes:
      experts: of each token, best first; the number of experts where there is none (padding).
      gates: what each expert's output is multiplied by, float32; 0 where there is none.
      scores: of all experts, positive and summing to 1, for the auxiliary loss and for statistics.
      valid: tokens that are no padding.
    """

    experts: Int[Array, "g s k"]
    gates: Float[Array, "g s k"]
    scores: Float[Array, "g s e"]
    valid: Bool[Array, "g s"]


def choose(
    logits: Float[Array, "g s e"],
    valid: Bool[Array, "g s"],
    choice: Choice,
    bias: Float[Array, "e"] | None = None,
) -> Routing:
    """The k experts of each token; `bias` is added to the scores for the choice alone (Wang et al. 2024)."""
    logits = logits.astype(jnp.float32)
    e = logits.shape[-1]
    sigmoid = choice.score == "sigmoid"
    scores = jax.nn.sigmoid(logits) if sigmoid else jax.nn.softmax(logits, axis=-1)
    wanted = jax.lax.stop_gradient(scores if bias is None else scores + bias[None, None])
    if choice.num_groups > 1:
        wanted = _of_best_groups(wanted, choice, 2 if sigmoid else 1)
    _, experts = jax.lax.top_k(wanted, choice.k)
    if choice.score == "softmax_of_chosen":
        gates = jax.nn.softmax(jnp.take_along_axis(logits, experts, axis=-1), axis=-1)
    else:
        gates = jnp.take_along_axis(scores, experts, axis=-1)
    if choice.renormalize and choice.k > 1:
        gates = gates / (jnp.sum(gates, axis=-1, keepdims=True) + _TINY)
    gates = choice.scale * gates
    if sigmoid:
        scores = scores / (jnp.sum(scores, axis=-1, keepdims=True) + _TINY)
    real = valid[..., None]
    return Routing(jnp.where(real, experts, e), jnp.where(real, gates, 0.0), scores, valid)


def _of_best_groups(wanted, choice: Choice, best: int):
    g, s, e = wanted.shape
    parts = wanted.reshape(g, s, choice.num_groups, -1)
    value = jnp.sum(jax.lax.top_k(parts, min(best, parts.shape[-1]))[0], axis=-1)
    _, groups = jax.lax.top_k(value, choice.top_groups)
    keep = jnp.any(jax.nn.one_hot(groups, choice.num_groups, dtype=jnp.bool_), axis=2)
    return jnp.where(keep[..., None], parts, -jnp.inf).reshape(g, s, e)


def capacity(tokens: int, num_experts: int, factor: float) -> int:
    """Places of an expert for a group of so many tokens, as GShard counts them.

    factor * tokens / experts, rounded down and then up to a multiple of 4 if that is above 1. A token with k experts
    needs k places: with a factor of k every expert has a place for each of its tokens if they are spread evenly.

    Raises:
      ValueError: that is less than one token.
    """
    places = int(tokens * factor / num_experts)
    if places < 1:
        raise ValueError(
            f"EXPERT_CAPACITY_FACTOR={factor} x {tokens} tokens of a group / NUM_EXPERTS={num_experts} is less "
            f"than one token for an expert; use a factor of {num_experts / tokens:g} or more, fewer groups, or "
            "None (dropless)"
        )
    return -(-places // 4) * 4 if places > 1 else 1


def positions(experts: Int[Array, "g s k"], num_experts: int) -> Int[Array, "g s k"]:
    """The place of each token in the queue of its expert: first choices, in the order of the tokens, come first."""
    g, s, k = experts.shape
    queue = experts.swapaxes(1, 2).reshape(g, k * s)
    rank = jnp.argsort(jnp.argsort(queue, axis=1, stable=True), axis=1)
    start = jnp.take_along_axis(_starts(queue, num_experts), queue, axis=1)
    return (rank - start).reshape(g, k, s).swapaxes(1, 2)


def positions_by_counting(experts: Int[Array, "g s k"], num_experts: int) -> Int[Array, "g s k"]:
    """The same by running sums over one-hot vectors, as GShard writes it."""
    g, s, k = experts.shape
    queue = experts.swapaxes(1, 2).reshape(g, k * s)
    onehot = jax.nn.one_hot(queue, num_experts + 1, dtype=jnp.int32)
    place = jnp.sum((jnp.cumsum(onehot, axis=1) - 1) * onehot, axis=-1)
    return place.reshape(g, k, s).swapaxes(1, 2)


def _starts(queue: Int[Array, "g q"], num_experts: int) -> Int[Array, "g e1"]:
    """Where each expert's part begins once `queue` is sorted; the last one is that of the tokens without expert."""
    counts = jnp.sum(jax.nn.one_hot(queue, num_experts + 1, dtype=jnp.int32), axis=1)
    return jnp.cumsum(counts, axis=1) - counts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Places of experts and the assignments (a token and one of its k experts) that have them.

    Attributes:
      of_assignment: number of the place, e * c + position; E * C for an assignment that is dropped.
      assignment: s-th token's j-th expert is s * k + j; S * K for a place that is empty.
    """

    of_assignment: Int[Array, "g sk"]
    assignment: Int[Array, "g ec"]


def slots(experts: Int[Array, "g s k"], num_experts: int, places: int) -> Slots:
    """The places of `experts`, each of which has `places`; who comes too late is dropped."""
    g, s, k = experts.shape
    queue = experts.swapaxes(1, 2).reshape(g, k * s)
    order = jnp.argsort(queue, axis=1, stable=True)
    starts = _starts(queue, num_experts)
    rank = jnp.argsort(order, axis=1)
    position = rank - jnp.take_along_axis(starts, queue, axis=1)
    kept = (position < places) & (queue < num_experts)
    slot = jnp.where(kept, queue * places + position, num_experts * places)
    slot = slot.reshape(g, k, s).swapaxes(1, 2).reshape(g, s * k)
    ends = jnp.concatenate([starts[:, 1:], jnp.full((g, 1), k * s)], axis=1)
    at = starts[:, :num_experts, None] + jnp.arange(places)[None, None]
    there = (at < ends[:, :num_experts, None]).reshape(g, -1)
    who = jnp.take_along_axis(order, jnp.minimum(at, k * s - 1).reshape(g, -1), axis=1)
    assignment = (who % s) * k + who // s  # `order` counts choice by choice
    return Slots(slot, jnp.where(there, assignment, s * k))


def expert_choice(
    logits: Float[Array, "g s e"], valid: Bool[Array, "g s"], places: int
) -> tuple[Int[Array, "g e c"], Float[Array, "g e c"]]:
    """Tokens and gates of each expert, which takes those with the highest score (Zhou et al. 2022, section 3.2).

    The token is S where there are not as many. A token sees which later ones were chosen, so a causal model trained so
    knows a little of the future.
    """
    scores = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    scores = jnp.where(valid[..., None], scores, -1.0).swapaxes(1, 2)
    gates, tokens = jax.lax.top_k(scores, min(places, scores.shape[-1]))
    return jnp.where(gates >= 0.0, tokens, scores.shape[-1]), jnp.maximum(gates, 0.0)


def shares(routing: Routing, *, first: bool) -> Float[Array, "g e"]:
    """Of the tokens of a group, the share that goes to each expert: first choices alone, or all; sums to 1."""
    e = routing.scores.shape[-1]
    experts = routing.experts[..., :1] if first else routing.experts
    counts = jnp.sum(jax.nn.one_hot(experts, e, dtype=jnp.float32), axis=(1, 2))
    return counts / jnp.maximum(jnp.sum(counts, axis=-1, keepdims=True), 1.0)


def balance_loss(routing: Routing, *, first: bool = True) -> Float[Array, ""]:
    """E * sum_e (share of tokens of e) * (mean score of e), averaged over groups: 1 when balanced.

    Shazeer et al. 2017 and GShard (Lepikhin et al. 2020, algorithm 1) count first choices (`first`), later models all.
    Groups count by their tokens.
    """
    valid = routing.valid.astype(jnp.float32)
    tokens = jnp.sum(valid, axis=1)
    mean = jnp.sum(routing.scores * valid[..., None], axis=1) / jnp.maximum(tokens, 1.0)[:, None]
    share = jax.lax.stop_gradient(shares(routing, first=first))
    of_group = routing.scores.shape[-1] * jnp.sum(share * mean, axis=-1)
    return jnp.sum(of_group * tokens) / jnp.maximum(jnp.sum(tokens), 1.0)


def z_loss(logits: Float[Array, "g s e"], valid: Bool[Array, "g s"]) -> Float[Array, ""]:
    """Mean over tokens of the squared log normaliser (ST-MoE, Zoph et al. 2022, equation 5)."""
    square = jnp.square(jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1))
    return jnp.sum(square * valid) / jnp.maximum(jnp.sum(valid), 1.0)
