"""LoRA and its kin as a change of any config whose layers are made of `Linear`.

    class Adapted(LoraKnobs, Pile5B):
        '''GPT-3 5B, adapters of rank 32 on all projections.'''
        USE_LORA = True
        LORA_RANK = 32

The change gives each chosen projection an adapter and lets the optimizer train adapters alone.
"""

import copy
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import fiddle as fdl
from fiddle import daglish

from configs.knobs import Knobs
from paxlike.experiment import Experiment
from paxlike.layers.attention import Attention
from paxlike.layers.feedforward import FeedForward
from paxlike.layers.latent_attention import LatentAttention
from paxlike.layers.lora import TRAINABLE, Lora
from paxlike.layers.moe import MoE
from paxlike.layers.projection import Projecting


class LoraKnobs(Knobs, abstract=True):
    """LoRA."""

    USE_LORA: Annotated[bool, "train low-rank adapters beside frozen weights"] = False
    LORA_RANK: Annotated[int, "columns of an adapter's A"] = 8
    LORA_ALPHA: Annotated[
        float | None, "scale = alpha / rank (rslora: / sqrt(rank)); None: the rank"
    ] = None
    LORA_DROPOUT: Annotated[float, "dropout on the adapters' inputs"] = 0.0
    LORA_TARGET_LAYERS: Annotated[
        str, "all, attention, mlp, or a regex of paths such as mixer/(query|value)"
    ] = "all"
    LORA_KIND: Annotated[
        Literal["lora", "rslora", "dora"], "scale and normalisation of the adapted weights"
    ] = "lora"
    LORA_INIT: Annotated[
        Literal["kaiming", "base"], "of A: as in PEFT, or as the weights are initialised (Pax)"
    ] = "kaiming"
    LORA_BASE: Annotated[
        Literal["int8", "nf4", "bfloat16"] | None, "how frozen weights are kept; None: float32"
    ] = None

    def experiment(self) -> fdl.Config[Experiment]:
        """The tree with adapters, where they are asked for."""
        tree = super().experiment()
        return apply_lora(tree, self) if self.USE_LORA else tree


def apply_lora(tree: fdl.Config[Experiment], knobs: LoraKnobs) -> fdl.Config[Experiment]:
    """A copy of `tree` whose chosen projections have adapters, which alone are trained.

    Raises:
      ValueError: a rank below 1, a target that matches nothing, or weights that FP8 and LORA_BASE both would store.
    """
    tree = copy.deepcopy(tree)
    paths: list[str] = []
    for path, node in projecting(tree.model):
        if getattr(node, "dot_general_cls", None) is not None and knobs.LORA_BASE in (
            "int8",
            "nf4",
        ):
            raise ValueError(
                f"LORA_BASE='{knobs.LORA_BASE}' and {'USE_TE' if getattr(knobs, 'USE_TE', False) else 'USE_FP8'}=True "
                "are two ways to store a weight: choose one"
            )
        names = {f"{path}/{name}": name for name in projections(node)}
        paths += names
        chosen = [name for full, name in names.items() if _is_target(node, full, knobs)]
        if chosen:
            node.adapters = {name: adapter(knobs) for name in chosen}
    if not any(getattr(node, "adapters", None) for _, node in projecting(tree.model)):
        shown = ", ".join(paths) or "none that takes adapters"
        raise ValueError(
            f"LORA_TARGET_LAYERS='{knobs.LORA_TARGET_LAYERS}' matches no projection; there are {shown}"
        )
    fdl.build(adapter(knobs))  # refuses a bad rank now, not when the model is built
    tree.optimizer.trainable = TRAINABLE
    return tree


def adapter(knobs: LoraKnobs) -> fdl.Config[Lora]:
    """The adapter of one projection."""
    return fdl.Config(
        Lora,
        rank=knobs.LORA_RANK,
        alpha=knobs.LORA_ALPHA,
        kind=knobs.LORA_KIND,
        dropout=knobs.LORA_DROPOUT,
        init=knobs.LORA_INIT,
        base=knobs.LORA_BASE,
    )


def projections(node: fdl.Config[Any]) -> tuple[str, ...]:
    """Names of the projections that an attention or feed-forward layer will have."""
    cls = fdl.get_callable(node)
    if issubclass(cls, LatentAttention):
        queries = ("query",) if node.query_rank is None else ("query_a", "query_b")
        return (*queries, "key_a", "key_b", "out")
    if issubclass(cls, Attention):
        heads, groups = node.num_heads, node.num_kv_heads or node.num_heads
        combined = node.combine_qkv and heads == groups
        return ("qkv", "out") if combined else ("query", "key", "value", "out")
    if issubclass(cls, FeedForward | MoE):
        return ("gate", "ffn1", "ffn2") if node.gated else ("ffn1", "ffn2")
    raise ValueError(f"the projections of {cls.__name__} are not known to LoRA: add them here")


def _is_target(node: fdl.Config[Any], path: str, knobs: LoraKnobs) -> bool:
    target, cls = knobs.LORA_TARGET_LAYERS, fdl.get_callable(node)
    if target == "all":
        return True
    if target in ("attention", "mlp"):
        return issubclass(cls, Attention if target == "attention" else FeedForward | MoE)
    try:
        return re.search(target, path) is not None
    except re.error as error:
        raise ValueError(
            f"LORA_TARGET_LAYERS='{target}' is not all, attention or mlp, and no regex: {error}"
        ) from error


def projecting(model: fdl.Config[Any]) -> Iterator[tuple[str, fdl.Config[Any]]]:
    """Layers made of projections, each once, with the path that their parameters will have."""
    for node, path in daglish.iterate(model):
        if isinstance(node, fdl.Config) and _is_projecting(fdl.get_callable(node)):
            yield name_of(path), node


def _is_projecting(made: Any) -> bool:
    return isinstance(made, type) and issubclass(made, Projecting)


def name_of(path: daglish.Path) -> str:
    """`.stack.period[0].mixer` -> `stack/period_0/mixer`."""
    name = ""
    for element in path:
        if isinstance(element, daglish.Index):
            name += f"_{element.index}"
        else:
            name += f"/{getattr(element, 'name', element.code.strip('.[]'))}"
    return name.lstrip("/")
