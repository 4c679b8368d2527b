"""A feed-forward layer of many experts, of which each token goes to a few (Shazeer et al. 2017).

A router chooses experts for each token (`ops.routing`). With a capacity (GShard, Lepikhin et al. 2020) every expert has
as many places for the tokens of a group, and who comes too late passes by the layer: fixed shapes, and the exchange
between devices is an all-to-all. Without one (dropless, as MegaBlocks) tokens are sorted by expert.

Shape legend: b batch, s length, d width, g groups, e experts, k experts of a token, n rows of an expert, f hidden.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from paxlike import parallel
from paxlike.layers.dropout import Dropout, Jitter
from paxlike.layers.experts import ExpertLinear, Matrices
from paxlike.layers.feedforward import ACTIVATIONS
from paxlike.layers.linear import Linear
from paxlike.layers.projection import Projecting
from paxlike.layers.remat import EXPERT_ROWS
from paxlike.layers.sequence import Sequence
from paxlike.layers.sizes import check_at_least
from paxlike.ops import dispatch, routing
from paxlike.ops.attention import is_plain
from paxlike.ops.exchange import Exchange
from paxlike.ops.fp8 import Fp8
from paxlike.ops.sown import LOSSES, SUMMARIES, UPDATES

DISPATCHES = ("index", "einsum", "sort")
ROUTERS = ("tokens", "experts")


@dataclasses.dataclass(frozen=True)
class Router:
    """How tokens find experts.

    Attributes:
      choice: experts and gates of a token.
      chosen_by: `tokens` choose experts; `experts` choose tokens (Zhou et al. 2022).
      capacity_factor: places of an expert = this * tokens of a group / experts; None: no token is dropped.
      group_size: tokens that are routed together; None: all that the layer is given.
      balance_weight: of the auxiliary loss, which is 1 when the experts have as many tokens as each other.
      balance_first: it counts first choices only (GShard), not all.
      z_loss_weight: of the squared log normaliser of the router.
      jitter: what the router reads is multiplied by 1 - jitter to 1 + jitter while training.
      bias_rate: each expert has a bias for the choice alone, which moves by this every step, up where the expert had
        fewer tokens than the mean (loss-free balancing, Wang et al. 2024); None: there is no bias.
    """

    choice: routing.Choice = routing.Choice()
    chosen_by: str = "tokens"
    capacity_factor: float | None = None
    group_size: int | None = None
    balance_weight: float = 0.0
    balance_first: bool = True
    z_loss_weight: float = 0.0
    jitter: float = 0.0
    bias_rate: float | None = None

    def check(self, num_experts: int) -> None:
        """Raises one line for what cannot be."""
        self.choice.check(num_experts)
        if self.chosen_by not in ROUTERS:
            raise ValueError(f"ROUTER='{self.chosen_by}' is none of {', '.join(ROUTERS)}")
        if self.chosen_by == "experts" and self.capacity_factor is None:
            raise ValueError("experts that choose tokens need an EXPERT_CAPACITY_FACTOR")
        if self.capacity_factor is not None and self.group_size is not None:
            routing.capacity(self.group_size, num_experts, self.capacity_factor)
        if not 0.0 <= self.jitter < 1.0:
            raise ValueError(f"ROUTER_JITTER={self.jitter} is not in [0, 1)")


class MoE(Projecting):
    """The sum over a token's experts of gate * expert(x), and the same for all tokens of shared experts.

    Each expert is a feed-forward layer without biases. Where tokens are generated one by one, or FLOPs are counted, no
    token is dropped.

    Attributes:
      num_experts: of which a token has `router.choice.k`.
      hidden, activation, gated: of each expert, as in `FeedForward`.
      router: who goes where.
      dispatch: how tokens get to experts that have a capacity: `index` gathers rows by number, `einsum` multiplies with
        one-hot tensors (GShard's, the reference), `sort` sorts, as all do without capacity. The same numbers.
      shared: a feed-forward layer for all tokens (DeepSeek), None for none.
      exchange: how sorted rows get to experts on other devices.
    """

    num_experts: int
    hidden: int
    router: Router = Router()
    activation: str = "gelu"
    gated: bool = False
    dropout: float = 0.0
    dispatch: str = "index"
    shared: nn.Module | None = None
    exchange: Exchange = Exchange()

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], sequence: Sequence) -> Float[Array, "b s d"]:
        self._check()
        segments = sequence.segments
        valid = jnp.ones(x.shape[:2], jnp.bool_) if segments is None else segments != 0
        logits = self._logits(x, sequence)
        bias = self._bias()
        experts = self._experts(x.shape[-1])
        if self.is_initializing():
            y = jnp.zeros_like(x)
            for expert in experts.values():
                expert.create()
        elif self.router.chosen_by == "experts":
            y = self._by_experts(x, valid, logits, experts, sequence)
        else:
            y = self._by_tokens(x, valid, logits, bias, experts, sequence)
        if self.shared is not None:
            y = y + self.shared(x, sequence)
        y = checkpoint_name(parallel.scatter_length(y), "ffn2")
        return Dropout(self.dropout, name="dropout")(y, train=sequence.train)

    def _check(self) -> None:
        check_at_least(1, self, "num_experts", "hidden")
        self.router.check(self.num_experts)
        self.exchange.check()
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"ACTIVATION='{self.activation}' is none of {', '.join(sorted(ACTIVATIONS))}"
            )
        if self.dispatch not in DISPATCHES:
            raise ValueError(f"MOE_DISPATCH='{self.dispatch}' is none of {', '.join(DISPATCHES)}")
        chosen = [self._dot_general_cls(name) for name in ("ffn1", "gate", "ffn2")]
        other = [made for made in chosen if not isinstance(made, Fp8 | None)]
        if other and not self.has_places():
            raise ValueError(
                f"rows sorted by expert are multiplied in FPROP_DTYPE or by ops.fp8, and not by {other[0]}: set an "
                "EXPERT_CAPACITY_FACTOR and MOE_DISPATCH=index or einsum"
            )
        if self.use_bias:
            raise ValueError("experts have no biases: set use_bias=False")

    def has_places(self) -> bool:
        """Whether each expert has as many rows as the others, in training."""
        return self.router.capacity_factor is not None and (
            self.dispatch != "sort" or self.router.chosen_by == "experts"
        )

    def _logits(self, x, sequence: Sequence) -> Float[Array, "b s e"]:
        """Of the router, in float32."""
        wide = Jitter(self.router.jitter, name="jitter")(
            x.astype(jnp.float32), train=sequence.train
        )
        linear = Linear(
            features=self.num_experts,
            axes=("embed", None),
            use_bias=False,
            kernel_init=self._init_of("router"),
            dtype="float32",
            name="router",
        )
        return parallel.shard(linear(wide), "batch", "length", None)

    def _bias(self) -> Float[Array, "e"] | None:
        if self.router.bias_rate is None:
            return None
        init = nn.with_logical_partitioning(nn.initializers.zeros, ("norm",))
        bias = self.param("choice_bias", init, (self.num_experts,), jnp.float32)
        return jax.lax.stop_gradient(bias)

    def _experts(self, width: int) -> dict[str, ExpertLinear]:
        inside, outside = ("expert_embed", "mlp"), ("mlp", "expert_embed")
        experts = {"ffn1": self._expert("ffn1", width, self.hidden, inside)}
        if self.gated:
            experts["gate"] = self._expert("gate", width, self.hidden, inside)
        return experts | {"ffn2": self._expert("ffn2", self.hidden, width, outside)}

    def _expert(self, name, inputs, features, axes) -> ExpertLinear:
        return ExpertLinear(
            num_experts=self.num_experts,
            inputs=inputs,
            features=features,
            axes=axes,
            kernel_init=self._init_of(name),
            dtype=self.dtype,
            dot_general_cls=self._dot_general_cls(name),
            name=name,
            **self._adapter(name),
        )

    def _init_of(self, name: str):
        return (self.kernel_inits or {}).get(name, self.kernel_init)

    def _by_tokens(self, x, valid, logits, bias, experts, sequence: Sequence):
        """Tokens choose."""
        router, choice = self.router, self.router.choice
        group = dispatch.Groups.of(x.shape[:2], router.group_size)
        logits, real = group.split(logits), group.split(valid)
        chosen = routing.choose(logits, real, choice, bias)
        factor = router.capacity_factor
        places, kept = None, None
        if factor is not None and not sequence.cache_length and not is_plain():
            places = routing.capacity(group.size, self.num_experts, factor)
            kept = routing.positions(chosen.experts, self.num_experts) < places
        exchange = Exchange(self.exchange.kind) if sequence.cache_length else self.exchange
        # What finds no place in a buffer is known only when rows have been sent.
        sow_later = places is None and exchange.buffer_factor is not None
        if sequence.train and not sow_later:
            self._sow(logits, chosen, kept)
        if places is not None and self.dispatch == "einsum":
            xs, combine = dispatch.by_onehot(group.split(x), chosen, places)
            return group.join(combine(self._in_places(xs, experts)))
        if places is not None and self.dispatch == "index":
            xs, combine = dispatch.by_index(group.split(x), chosen, places)
            return group.join(combine(self._in_places(xs, experts)))
        if kept is not None:
            e = self.num_experts
            chosen = dataclasses.replace(
                chosen,
                experts=jnp.where(kept, chosen.experts, e),
                gates=jnp.where(kept, chosen.gates, 0.0),
            )
        # A token that is generated reads the weights of its experts, and would have to round those of all.
        wide = bool(sequence.cache_length) or is_plain()
        y, fits = dispatch.by_sorting(
            x.astype(self.dtype),
            group.join(chosen.experts),
            group.join(chosen.gates),
            {name: expert.matrices(wide=wide) for name, expert in experts.items()},
            self._of_matrices,
            num_experts=self.num_experts,
            exchange=exchange,
        )
        if sequence.train and sow_later:
            self._sow(logits, chosen, None if fits is None else group.split(fits))
        return y

    def _by_experts(self, x, valid, logits, experts, sequence: Sequence):
        """Experts choose."""
        if sequence.cache_length:
            raise ValueError(
                "experts that choose tokens look at whole rows: such a model cannot generate token by token"
            )
        group = dispatch.Groups.of(x.shape[:2], self.router.group_size)
        factor = self.router.capacity_factor or 0.0
        places = routing.capacity(group.size, self.num_experts, factor)
        tokens, gates = routing.expert_choice(group.split(logits), group.split(valid), places)
        xs, combine = dispatch.by_experts(group.split(x), tokens, gates)
        return group.join(combine(self._in_places(xs, experts)))

    def _in_places(self, xs: Float[Array, "g e c d"], experts) -> Float[Array, "g e c d"]:
        """The experts' outputs where each has as many rows."""
        groups = xs.shape[0]
        rows = checkpoint_name(parallel.to_experts(xs.astype(self.dtype)), EXPERT_ROWS)
        inner = lambda name: checkpoint_name(
            parallel.on_experts(experts[name](rows), groups, "act_mlp"),
            "ffn1_gate" if name == "gate" else "ffn1",
        )
        activation = ACTIVATIONS[self.activation]
        if self.gated:
            hidden = activation(inner("gate")) * inner("ffn1")
        else:
            hidden = activation(inner("ffn1"))
        return parallel.from_experts(experts["ffn2"](hidden), groups)

    def _of_matrices(self, rows, sizes, matrices: dict[str, Matrices], reference: bool):
        """The experts' outputs for rows sorted by expert."""

        def product(name, x):
            with jax.named_scope(name):
                return matrices[name].grouped(x, sizes, reference=reference)

        activation = ACTIVATIONS[self.activation]
        inner = checkpoint_name(product("ffn1", rows), "ffn1")
        if self.gated:
            inner = activation(checkpoint_name(product("gate", rows), "ffn1_gate")) * inner
        else:
            inner = activation(inner)
        return product("ffn2", inner)

    def _sow(self, logits, chosen: routing.Routing, kept: Bool[Array, "g s k"] | None) -> None:
        """Auxiliary losses, statistics and the change of the bias, where someone asks for them."""
        router, last = self.router, lambda _, new: new
        sow = lambda kind, name, value: self.sow(
            kind, name, value, reduce_fn=last, init_fn=lambda: None
        )
        balance = routing.balance_loss(chosen, first=router.balance_first)
        if router.balance_weight:
            sow(LOSSES, "balance", router.balance_weight * balance)
        z_loss = routing.z_loss(logits, chosen.valid)
        if router.z_loss_weight:
            sow(LOSSES, "router_z", router.z_loss_weight * z_loss)
        tokens = jnp.sum(chosen.valid)
        share = dispatch.mean_share(chosen)
        if router.bias_rate is not None:
            step = router.bias_rate * jnp.sign(1.0 / self.num_experts - share)
            sow(UPDATES, "choice_bias", jnp.where(tokens > 0, step, 0.0))
        if self.is_mutable_collection(SUMMARIES):
            found = dispatch.statistics(chosen, kept)
            sow(SUMMARIES, "moe", {**found, "balance": balance, "z_loss": z_loss, "share": share})
