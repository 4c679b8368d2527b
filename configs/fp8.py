"""FP8, and Transformer Engine, as a change of any config whose layers are made of `Linear`.

    python main.py --fdl_config=Pile5B --fdl.USE_FP8=True --fdl.FP8_RECIPE=current

The change tells each chosen projection how to multiply; parameters and their names stay as they are.
"""

import copy
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import fiddle as fdl
from fiddle import daglish

from configs.knobs import Knobs, knobs
from configs.lora import name_of, projecting, projections
from paxlike.experiment import Experiment
from paxlike.layers.linear import Linear
from paxlike.layers.moe import MoE
from paxlike.ops.fp8 import Fp8
from paxlike.ops.te import TransformerEngine


class Fp8Knobs(Knobs, abstract=True):
    """FP8."""

    USE_FP8: Annotated[bool, "8-bit matrix products: E4M3 forward, E5M2 for gradients"] = False
    FP8_RECIPE: Annotated[
        Literal["delayed", "current", "mxfp8"],
        "scales from the steps before, from each tensor itself, or (USE_TE) from each 32 values",
    ] = "delayed"
    FP8_AMAX_HISTORY: Annotated[int, "delayed: steps whose largest value counts"] = 1024
    FP8_MARGIN: Annotated[int, "scales leave room for values 2^this times as large"] = 0
    FP8_LAYERS: Annotated[
        str, "blocks (attention projections, feed-forward), all, or a regex such as ffn/|mixer/out"
    ] = "blocks"
    USE_TE: Annotated[
        bool, "Transformer Engine multiplies by the weights of FP8_LAYERS, with USE_FP8 in FP8"
    ] = False
    TE_FUSED: Annotated[
        bool | None,
        "USE_TE: norms are part of the products behind them; None: with USE_FP8, where that can be",
    ] = None

    def experiment(self) -> fdl.Config[Experiment]:
        """The tree whose chosen layers multiply in FP8, where that is asked for."""
        tree = super().experiment()
        self._refuse_contradictions()
        return apply_fp8(tree, self) if self.USE_FP8 or self.USE_TE else tree

    def _refuse_contradictions(self) -> None:
        default = {knob.name: knob.default for knob in knobs(type(self))}
        recipe = f"FP8_RECIPE={self.FP8_RECIPE}"
        off = "USE_FP8=False" + ("" if self.USE_TE else " and USE_TE=False")
        own_or = " with USE_TE=True" if self.USE_TE else ""
        for name, reads, without in (
            ("FP8_LAYERS", self.USE_FP8 or self.USE_TE, off),
            ("FP8_RECIPE", self.USE_FP8, "USE_FP8=False"),
            ("FP8_AMAX_HISTORY", self.USE_FP8, "USE_FP8=False"),
            ("FP8_MARGIN", self.USE_FP8, "USE_FP8=False"),
            ("FP8_AMAX_HISTORY", self.FP8_RECIPE == "delayed", recipe),
            ("FP8_MARGIN", self.FP8_RECIPE == "delayed" or not self.USE_TE, recipe + own_or),
            ("TE_FUSED", self.USE_TE, "USE_TE=False"),
        ):
            value = getattr(self, name)
            if not reads and value != default[name]:
                raise ValueError(f"{name}={value} has no effect with {without}")
        if self.USE_FP8 and self.FP8_RECIPE == "mxfp8" and not self.USE_TE:
            raise ValueError("FP8_RECIPE=mxfp8 is Transformer Engine's: it needs USE_TE=True")


def apply_fp8(tree: fdl.Config[Experiment], knobs: Fp8Knobs) -> fdl.Config[Experiment]:
    """A copy of `tree` whose chosen layers multiply in FP8, or by Transformer Engine.

    Raises:
      ValueError: a recipe that there is not, layers that match nothing, or a Transformer Engine that is not installed.
    """
    tree = copy.deepcopy(tree)
    whole = product(knobs)
    fdl.get_callable(whole)(**fdl.ordered_arguments(whole))  # refuses bad numbers now, in one line
    names: list[str] = []
    found = False
    for path, node in projecting(tree.model):
        own = {f"{path}/{name}": name for name in projections(node)}
        chosen = [name for full, name in own.items() if _is_chosen(full, knobs)]
        if fdl.get_callable(node) is MoE and knobs.USE_TE:
            if chosen and knobs.FP8_LAYERS not in ("blocks", "all"):
                raise ValueError(
                    f"FP8_LAYERS='{knobs.FP8_LAYERS}' names {path}/{chosen[0]}, but Transformer Engine does not "
                    "multiply by the weights of experts: set USE_TE=False"
                )
            continue
        names += own
        if chosen:
            node.dot_general_cls, found = {name: product(knobs) for name in chosen}, True
    for path, node in _linears(tree.model):
        names.append(path)
        if knobs.FP8_LAYERS != "blocks" and _is_chosen(path, knobs):
            node.dot_general_cls, found = product(knobs), True
    if not found:
        shown = ", ".join(names) or "none that multiplies by a weight"
        raise ValueError(f"FP8_LAYERS='{knobs.FP8_LAYERS}' matches no layer; there are {shown}")
    return tree


def product(knobs: Fp8Knobs) -> fdl.Config[Any]:
    """How one weight is multiplied."""
    options: dict[str, Any] = {"recipe": knobs.FP8_RECIPE} if knobs.USE_FP8 else {}
    options |= {"amax_history": knobs.FP8_AMAX_HISTORY, "margin": knobs.FP8_MARGIN}
    if not knobs.USE_TE:
        return fdl.Config(Fp8, **options)
    fused = False if knobs.TE_FUSED is None and not knobs.USE_FP8 else knobs.TE_FUSED
    return fdl.Config(TransformerEngine, **options, fused=fused)


def _is_chosen(path: str, knobs: Fp8Knobs) -> bool:
    if knobs.FP8_LAYERS in ("blocks", "all"):
        return True
    try:
        return re.search(knobs.FP8_LAYERS, path) is not None
    except re.error as error:
        raise ValueError(
            f"FP8_LAYERS='{knobs.FP8_LAYERS}' is not blocks or all, and no regex: {error}"
        ) from error


def _linears(model: fdl.Config[Any]) -> Iterator[tuple[str, fdl.Config[Any]]]:
    """`Linear`s that the tree itself holds."""
    for node, path in daglish.iterate(model):
        if isinstance(node, fdl.Config) and fdl.get_callable(node) is Linear:
            yield name_of(path), node
