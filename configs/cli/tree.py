"""The config tree as lines to read: `path = value`, unset defaults included.

Fiddle's own print shows addresses, and two parameters of Linen on every module; golden files and
overrides want neither.
"""

import dataclasses
import enum
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fiddle as fdl

_REPOSITORY = str(Path(__file__).resolve().parents[2])
UNSET = fdl.NO_VALUE
# Linen gives every module these two fields; they belong to its machinery.
_NOISE = ("parent", "name")

Key = str | int | tuple[str]  # an attribute, an index, or (dictionary key,)


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the tree: a leaf, or what a node builds."""

    path: str
    value: Any
    is_default: bool
    is_node: bool

    @property
    def shown(self) -> str:
        return show(self.value)


def lines(tree: fdl.Config) -> Iterator[Line]:
    """Every node and leaf of the tree in the order of the signatures, unset defaults included.

    A node that occurs twice is one object when built; the second time a line says so.
    """
    yield from _lines(tree, "", seen={})


def flat_text(tree: fdl.Config) -> str:
    """`path = value`, a line each; the same in every process and on every machine."""
    return "".join(f"{line.path or '<root>'} = {line.shown}\n" for line in lines(tree))


def differences(old: fdl.Config, new: fdl.Config) -> list[str]:
    """The paths at which two trees print differently."""
    before = {line.path: line.shown for line in lines(old)}
    after = {line.path: line.shown for line in lines(new)}
    return [
        f"{path or '<root>'}: {before.get(path, 'absent')} -> {after.get(path, 'absent')}"
        for path in {**before, **after}
        if before.get(path) != after.get(path)
    ]


def settable_paths(tree: fdl.Config) -> list[str]:
    """All paths that an override may name."""
    return [line.path for line in lines(tree) if line.path]


def _lines(value: Any, path: str, seen: dict[int, str], is_default: bool = False) -> Iterator[Line]:
    if isinstance(value, fdl.Buildable):
        if id(value) in seen:
            yield Line(path, Note(f"same as {seen[id(value)]}"), False, True)
            return
        seen[id(value)] = path or "<root>"
        yield Line(path, value, False, True)
        for key in parameters(value):
            child, default = argument(value, key)
            yield from _lines(child, join(path, key), seen, default)
    elif isinstance(value, dict) and holds_node(value):
        for key, item in value.items():
            yield from _lines(item, f"{path}[{key!r}]", seen)
    elif isinstance(value, list | tuple) and holds_node(value):
        for index, item in enumerate(value):
            yield from _lines(item, join(path, index), seen)
    else:
        yield Line(path, value, is_default, False)


def join(path: str, key: Key) -> str:
    if isinstance(key, str):
        return f"{path}.{key}" if path else key
    return f"{path}[{key!r}]" if isinstance(key, int) else f"{path}[{key[0]!r}]"


def holds_node(value: Any) -> bool:
    if isinstance(value, fdl.Buildable):
        return True
    if not isinstance(value, dict | list | tuple):
        return False
    items = value.values() if isinstance(value, dict) else value
    return any(map(holds_node, items))


def parameters(node: fdl.Buildable) -> list[str | int]:
    """The parameters of a node, without those of Linen's machinery that nobody set.

    Numbers are positional arguments, as in `optax.chain(a, b)`.
    """
    target = fdl.get_callable(node)
    bases = getattr(target, "__mro__", ())
    is_linen = any(base.__module__.startswith("flax.linen") for base in bases)
    named = [
        name
        for name, parameter in _signature(node).items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and not (is_linen and name in _NOISE and name not in node.__arguments__)
    ]
    return named + [key for key in node.__arguments__ if key not in named]


def argument(node: fdl.Buildable, key: str | int) -> tuple[Any, bool]:
    """The value of a parameter, and whether it is a default that nobody set."""
    if key in node.__arguments__:
        return node.__arguments__[key], False
    target = fdl.get_callable(node)
    fields = dataclasses.fields(target) if dataclasses.is_dataclass(target) else ()
    factory = next((field.default_factory for field in fields if field.name == key), None)
    if factory not in (None, dataclasses.MISSING):
        made = factory()
        return (
            made if type(made) in (list, tuple, dict) else Note(f"made by {show(factory)}")
        ), True
    default = _signature(node)[str(key)].default
    if default is not inspect.Parameter.empty:
        return default, True
    return (UNSET if isinstance(node, fdl.Config) else Note("given when called")), True


def _signature(node: fdl.Buildable) -> Mapping[str, inspect.Parameter]:
    return node.__signature_info__.signature.parameters


@dataclasses.dataclass(frozen=True)
class Note:
    """Stands in the print for what has no value of its own."""

    text: str


def show(value: Any) -> str:
    """A value in the flat print: no addresses, no folder of this machine."""
    if value is UNSET:
        return "<required, not set>"
    if isinstance(value, Note):
        return f"<{value.text}>"
    if isinstance(value, fdl.Buildable):
        kind = "" if isinstance(value, fdl.Config) else f"{type(value).__name__} "
        return f"<{kind}{_name(fdl.get_callable(value))}>"
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if type(value) is dict:
        return f"{{{', '.join(f'{show(key)}: {show(item)}' for key, item in value.items())}}}"
    if type(value) in (list, tuple):
        inside = ", ".join(map(show, value))
        return (
            f"[{inside}]" if type(value) is list else f"({inside}{',' if len(value) == 1 else ''})"
        )
    if hasattr(value, "__qualname__") and hasattr(value, "__module__"):
        return _name(value)
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
    return text.replace(_REPOSITORY, "<repository>")


def _name(value: Any) -> str:
    module, name = value.__module__, value.__qualname__
    return name if module in (None, "builtins") else f"{module}.{name}"
