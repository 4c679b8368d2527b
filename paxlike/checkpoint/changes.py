"""Which settings of a model were others when a checkpoint was written.

Arrays of equal shape do not make the same model: an activation or an epsilon has no array. A checkpoint holds the
resolved config of its run as text, a line `path = value` for every field of the model and the task, defaults included;
here it is compared with the text of this start. A field that only one of the two has came with another version and is
passed over, and so is what lies below a node that the other one does not have: the line of the node itself differs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable

# Fields, wherever in the model, that give the same numbers: how it is computed, and how fresh weights were drawn.
_SAME = {"remat", "remat_layers", "scan", "pipeline", "implementation", "lookup"}
_SAME |= {"dispatch", "exchange", "init", "context", "chunk"}
# Another precision of the same function.
_PRECISION = {"dtype", "dot_general_cls", "base"}
# How many tokens an expert takes: which are left out, not what is done with the others.
_CAPACITY = {"capacity_factor", "group_size", "buffer_factor"}
# What only training reads: the loss, noise, and weights of losses beside the main one.
_TRAINING = {"task", "dropout", "embedding_dropout", "jitter", "bias_rate"}
_TRAINING |= {"balance_weight", "balance_first", "z_loss_weight"}
_ALLOWED = (_PRECISION, _CAPACITY, _TRAINING)

_KNOB = re.compile(r"([A-Z][A-Z0-9_]*) += (.*?) +\[[^\[\]]*\]")
_MOST_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Change:
    """A field of the tree with its two values, as they are printed; `knob` where one has the same two values."""

    path: str
    old: str
    new: str
    knob: str | None = None

    @property
    def name(self) -> str:
        return self.knob or self.path

    def has(self, *kinds: set[str]) -> bool:
        """Whether the field, or a node above it, is of these kinds."""
        parts = re.sub(r"\[.*?\]", "", self.path).split(".")
        return any(part in kind for part in parts for kind in kinds)


def refused(old: str, new: str) -> str | None:
    """What makes the run that `new` describes another one than that of `old`, in a clause, or None."""
    return _clause(changes(old, new), lambda each: not each.has(*_ALLOWED))


def allowed(old: str, new: str) -> str | None:
    """What else changes the numbers of a run that goes on."""
    return _clause(changes(old, new), lambda each: each.has(*_ALLOWED))


def applied(old: str, new: str) -> str | None:
    """What changes the numbers of a model that is only applied."""
    return _clause(changes(old, new), lambda each: each.path != "seed" and not each.has(_TRAINING))


def changes(old: str, new: str) -> list[Change]:
    """All that may change a number, in the order of the tree; none where a text is empty.

    >>> was = "# knobs\\nSLOPE = 1 [class A]\\n# tree\\nmodel = <a.Net>\\nmodel.slope = 1\\nmodel.scan = True\\n"
    >>> changes(was, was.replace("= 1", "= 2").replace("True", "False"))
    [Change(path='model.slope', old='1', new='2', knob='SLOPE')]
    """
    if old == new:
        return []
    knobs, others = _knobs(old), _knobs(new)
    before, after = _model(old), _model(new)
    found = []
    for path, value in before.items():
        change = Change(path, value, after.get(path, value))
        if change.new == value or re.search(r"_inits?\b", path):
            continue
        if change.has(_SAME) and not change.has(_CAPACITY):
            continue
        named = [
            name
            for name, was in knobs.items()
            if (was, others.get(name)) == (value, change.new) and _akin(name, path)
        ]
        found.append(dataclasses.replace(change, knob=named[0]) if len(named) == 1 else change)
    return found


def _akin(knob: str, path: str) -> bool:
    """Whether they share a word: equal values alone may be chance."""
    field = path.rpartition(".")[2]
    return not {*knob.lower().split("_")}.isdisjoint(field.split("_"))


def _clause(found: Iterable[Change], wanted: Callable[[Change], bool]) -> str | None:
    """`A was 1 and is 2`, each name once."""
    by_name = {each.name: each for each in reversed([*found]) if wanted(each)}
    texts = [f"{each.name} was {each.old} and is {each.new}" for each in reversed(by_name.values())]
    if len(texts) > _MOST_SHOWN:
        texts = [*texts[:_MOST_SHOWN], f"{len(texts) - _MOST_SHOWN} more"]
    return ", ".join(texts) or None


def _model(text: str) -> dict[str, str]:
    """Path -> value of the model, the task and the seed; of a list or dictionary of nodes, its keys."""
    found: dict[str, str] = {}
    for line in text.partition("# tree\n")[2].splitlines():
        path, _, value = line.partition(" = ")
        if path not in ("model", "task", "seed") and not path.startswith(("model.", "task.")):
            continue
        found[path] = _short(value)
        whole, bracket, key = path.removesuffix("]").rpartition("[")
        if path.endswith("]") and bracket:
            held = found.get(whole, "").removesuffix("]")
            found[whole] = f"{held}, {key}]" if held else f"[{key}]"
    return found


def _knobs(text: str) -> dict[str, str]:
    lines = text.partition("# tree\n")[0].splitlines()
    return {found[1]: found[2] for line in lines if (found := _KNOB.fullmatch(line))}


def _short(value: str) -> str:
    """A class or function without its module, which another version may have moved."""
    name = re.fullmatch(r"<?([A-Za-z_][\w.]*?)>?", value)
    return name[1].rpartition(".")[2] if name else value
