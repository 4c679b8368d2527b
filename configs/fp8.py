"""FP8 as a change of any config whose layers are made of `Linear`.

    python main.py --fdl_config=Pile5B --fdl.USE_FP8=True --fdl.FP8_RECIPE=current

The change tells each chosen projection how to multiply; parameters and their names stay as they are.
"""

import copy
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import fiddle as fdl
from fiddle import daglish

from configs.knobs import Knobs
from configs.lora import name_of, projecting, projections
from paxlike.experiment import Experiment
from paxlike.layers.linear import Linear
from paxlike.ops.fp8 import Fp8


class Fp8Knobs(Knobs, abstract=True):
    """FP8."""

    USE_FP8: Annotated[bool, "8-bit matrix products: E4M3 forward, E5M2 for gradients"] = False
    FP8_RECIPE: Annotated[
        Literal["delayed", "current"], "scales from the steps before, or from each tensor itself"
    ] = "delayed"
    FP8_AMAX_HISTORY: Annotated[int, "delayed: steps whose largest value counts"] = 1024
    FP8_MARGIN: Annotated[int, "scales leave room for values 2^this times as large"] = 0
    FP8_LAYERS: Annotated[
        str, "blocks (attention projections, feed-forward), all, or a regex such as ffn/|mixer/out"
    ] = "blocks"

    def experiment(self) -> fdl.Config[Experiment]:
        """The tree whose chosen layers multiply in FP8, where that is asked for."""
        tree = super().experiment()
        return apply_fp8(tree, self) if self.USE_FP8 else tree


def apply_fp8(tree: fdl.Config[Experiment], knobs: Fp8Knobs) -> fdl.Config[Experiment]:
    """A copy of `tree` whose chosen layers multiply in FP8.

    Raises:
      ValueError: a recipe that there is not, or layers that match nothing.
    """
    tree = copy.deepcopy(tree)
    fdl.build(product(knobs))  # refuses bad numbers now, not when the model is built
    names: list[str] = []
    found = False
    for path, node in projecting(tree.model):
        own = {f"{path}/{name}": name for name in projections(node)}
        names += own
        chosen = [name for full, name in own.items() if _is_chosen(full, knobs)]
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


def product(knobs: Fp8Knobs) -> fdl.Config[Fp8]:
    """How one weight is multiplied."""
    return fdl.Config(
        Fp8,
        recipe=knobs.FP8_RECIPE,
        amax_history=knobs.FP8_AMAX_HISTORY,
        margin=knobs.FP8_MARGIN,
    )


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
