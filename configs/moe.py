"""The knobs of layers of experts, and the parts that they make."""

from typing import Annotated, Any, Literal

import fiddle as fdl

from configs.bounds import Above, AtLeast, Below
from configs.transformer import TransformerKnobs
from paxlike import parallel
from paxlike.experiment import Experiment
from paxlike.layers.moe import MoE, Router
from paxlike.log.experts import WatchOptions
from paxlike.ops.exchange import Exchange
from paxlike.ops.routing import Choice


class MoEKnobs(TransformerKnobs, abstract=True):
    """Mixture of experts."""

    NUM_EXPERTS: Annotated[int, "experts of a layer", AtLeast(1)] = 64
    NUM_EXPERTS_PER_TOKEN: Annotated[int, "experts that a token goes to", AtLeast(1)] = 2
    EXPERT_HIDDEN_DIMS: Annotated[
        int | None, "width inside an expert; None: HIDDEN_DIMS", AtLeast(1)
    ] = None
    EXPERT_CAPACITY_FACTOR: Annotated[
        float | None,
        "places of an expert = this x tokens of a group / NUM_EXPERTS; None: no token is dropped",
        Above(0),
    ] = None
    MOE_GROUPS: Annotated[
        int | None,
        "groups of tokens of a batch that are routed apart; None: one for each batch shard, one in all if dropless",
        AtLeast(1),
    ] = None
    MOE_DISPATCH: Annotated[
        Literal["index", "einsum", "sort"],
        "how tokens get to experts with a capacity: by row numbers, one-hot products (GShard), sorting",
    ] = "index"
    EXPERT_AXES: Annotated[
        tuple[str, ...], "mesh axes over which experts are spread, such as [expert] or [fsdp] (Pax)"
    ] = ("expert",)
    MOE_EXCHANGE: Annotated[
        Literal["gather", "all_to_all"],
        "without capacity: all rows to all devices of EXPERT_AXES, or each to the devices that want it",
    ] = "gather"
    EXPERT_BUFFER_FACTOR: Annotated[
        float | None,
        "all_to_all: rows that a device has places for, over the mean; None: for all, so that none is dropped",
    ] = None
    ROUTER: Annotated[
        Literal["tokens", "experts"], "who chooses; experts that do see later tokens"
    ] = "tokens"
    ROUTER_SCORE: Annotated[
        Literal["softmax", "softmax_of_chosen", "sigmoid"],
        "what makes gates of the router's logits",
    ] = "softmax"
    RENORMALIZE_GATES: Annotated[bool, "gates of a token are divided by their sum"] = True
    GATE_SCALE: Annotated[float, "factor of the gates", Above(0)] = 1.0
    EXPERT_GROUPS: Annotated[
        int, "groups of experts that a token first chooses among", AtLeast(1)
    ] = 1
    EXPERT_GROUPS_PER_TOKEN: Annotated[int, "of them, those that a token may go to", AtLeast(1)] = 1
    LOAD_BALANCING_WEIGHT: Annotated[
        float, "of the auxiliary loss, mean over the layers of experts; 1 is balanced", AtLeast(0)
    ] = 0.01
    BALANCE_FIRST_CHOICES: Annotated[
        bool, "the auxiliary loss counts first choices only (GShard), not all"
    ] = False
    ROUTER_Z_LOSS_WEIGHT: Annotated[
        float, "of the squared log normaliser of routers, mean over the layers", AtLeast(0)
    ] = 0.0
    ROUTER_JITTER: Annotated[
        float, "noise on what routers read while training, 0: none", AtLeast(0), Below(1)
    ] = 0.0
    ROUTER_BIAS_RATE: Annotated[
        float | None,
        "a bias for the choice alone moves so much a step (DeepSeek-V3); None: no bias",
        AtLeast(0),
    ] = None
    NUM_SHARED_EXPERTS: Annotated[
        int, "experts, as one layer, that all tokens go to", AtLeast(0)
    ] = 0
    ROUTER_COLLAPSE_SHARE: Annotated[
        float,
        "a warning when one expert of a layer has a larger share of the tokens for long, 0: never",
    ] = 0.75
    ROUTER_COLLAPSE_SUMMARIES: Annotated[int, "log lines in a row that count as long"] = 5

    def experiment(self) -> fdl.Config[Experiment]:
        """The whole tree, whose log watches over the routers."""
        tree = super().experiment()
        tree.logging.experts = fdl.Config(
            WatchOptions,
            share=self.ROUTER_COLLAPSE_SHARE,
            summaries=self.ROUTER_COLLAPSE_SUMMARIES,
        )
        return tree

    def moe(self, *, num_layers: int, gated: bool, activation: str | None = None, **options: Any):
        """A layer of experts, one of `num_layers`."""
        self.check_experts()
        hidden = self.expert_width()
        projections = self.projections()
        shared = None
        if self.NUM_SHARED_EXPERTS:
            shared = self.feed_forward_layer(
                hidden=self.NUM_SHARED_EXPERTS * hidden,
                activation=activation or self.ACTIVATION,
                gated=gated,
                use_bias=False,
                dropout=0.0,
            )
        return fdl.Config(
            MoE,
            num_experts=self.NUM_EXPERTS,
            hidden=hidden,
            activation=activation or self.ACTIVATION,
            gated=gated,
            use_bias=False,
            dispatch=self.MOE_DISPATCH,
            shared=shared,
            exchange=fdl.Config(Exchange, self.MOE_EXCHANGE, self.EXPERT_BUFFER_FACTOR),
            router=fdl.Config(
                Router,
                choice=fdl.Config(Choice, **self._choice()),
                chosen_by=self.ROUTER,
                capacity_factor=self.EXPERT_CAPACITY_FACTOR,
                group_size=self.tokens_of_group(),
                balance_weight=self.LOAD_BALANCING_WEIGHT / num_layers,
                balance_first=self.BALANCE_FIRST_CHOICES,
                z_loss_weight=self.ROUTER_Z_LOSS_WEIGHT / num_layers,
                jitter=self.ROUTER_JITTER,
                bias_rate=self.ROUTER_BIAS_RATE,
            ),
            **{**projections, **options},
        )

    def _choice(self) -> dict[str, Any]:
        return {
            "k": self.NUM_EXPERTS_PER_TOKEN,
            "score": self.ROUTER_SCORE,
            "renormalize": self.RENORMALIZE_GATES,
            "scale": self.GATE_SCALE,
            "num_groups": self.EXPERT_GROUPS,
            "top_groups": self.EXPERT_GROUPS_PER_TOKEN,
        }

    def check_experts(self) -> None:
        """Refuses what no layer of experts could work with, in terms of the knobs."""
        mesh, rules = self.mesh(), self.rules()
        sizes = {axis: size for axis, size in mesh.shape.items() if size > 0}
        parallel.check_experts(self.NUM_EXPERTS, sizes, None if rules is None else fdl.build(rules))
        Router(
            Choice(**self._choice()),
            self.ROUTER,
            self.EXPERT_CAPACITY_FACTOR,
            self.tokens_of_group(),
            jitter=self.ROUTER_JITTER,
        ).check(self.NUM_EXPERTS)
        Exchange(self.MOE_EXCHANGE, self.EXPERT_BUFFER_FACTOR).check()
        if self.MOE_EXCHANGE != "gather" and self.EXPERT_CAPACITY_FACTOR is not None:
            raise ValueError(
                f"MOE_EXCHANGE={self.MOE_EXCHANGE} has no effect with EXPERT_CAPACITY_FACTOR="
                f"{self.EXPERT_CAPACITY_FACTOR}: places are exchanged by an all-to-all; leave one of them out"
            )
        if self.MOE_DISPATCH != "index" and self.EXPERT_CAPACITY_FACTOR is None:
            raise ValueError(
                f"MOE_DISPATCH='{self.MOE_DISPATCH}' has no effect without EXPERT_CAPACITY_FACTOR: tokens are sorted"
            )

    def expert_width(self) -> int:
        """Width inside an expert."""
        return self.HIDDEN_DIMS if self.EXPERT_HIDDEN_DIMS is None else self.EXPERT_HIDDEN_DIMS

    def tokens_of_group(self) -> int | None:
        """Tokens that are routed together; None: all that a layer is given.

        Raises:
          ValueError: MOE_GROUPS do not divide the batch, or the mesh does not say how large it is.
        """
        mesh, groups, parts = self.mesh(), self.MOE_GROUPS, self.microbatches()
        if groups is None and self.EXPERT_CAPACITY_FACTOR is None:
            return None
        if -1 in mesh.ici:
            if groups is None:
                return None
            raise ValueError(
                f"MOE_GROUPS={groups} needs the sizes of the mesh, and ICI_MESH_SHAPE={list(mesh.ici)} leaves one open"
            )
        rows = mesh.global_batch_size(self.PERCORE_BATCH_SIZE)
        if groups is None:
            shards = mesh.num_batch_shards * mesh.shape.get("context", 1)
            groups = shards * parts // mesh.shape.get("pipeline", 1)
        tokens = rows * self.MAX_SEQ_LEN
        if groups < 1 or tokens % groups or groups % parts:
            raise ValueError(
                f"MOE_GROUPS={groups} does not divide the batch of {rows} rows x {self.MAX_SEQ_LEN} tokens in "
                f"{parts} part(s): use a multiple of {parts} that divides {tokens}"
            )
        return tokens // groups

    def rules(self) -> fdl.Config[Any] | None:
        """Experts over their axes; their width over fsdp where it is none of these."""
        rules, axes = super().rules(), tuple(self.EXPERT_AXES)
        if axes == ("expert",):
            return rules
        unknown = [axis for axis in axes if axis not in ("expert", "fsdp", "data")]
        if unknown:
            raise ValueError(f"EXPERT_AXES={list(axes)}: experts go over expert, fsdp or data only")
        rules = fdl.Config(parallel.rules_with) if rules is None else rules
        rules.expert = axes
        rules.expert_embed = None if "fsdp" in axes else "fsdp"
        return rules
