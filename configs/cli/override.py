"""Overrides of single nodes: `--fdl.model.stack.period[0].ffn.hidden=8`.

A path is what one would write in Python. Only what exists can be overridden, and only by a value
that fits: the type that the parameter declares where that is simple, else that of the value now.
"""

import collections.abc
import copy
import enum
import functools
import operator
import re
import sys
import types
import typing
from collections.abc import Iterable
from typing import Any

import fiddle as fdl

from configs.bounds import complaint
from configs.cli import tree, values
from configs.cli.values import UsageError
from paxlike.nearest import ask, nearest

_TOKEN = re.compile(r"\.?([A-Za-z_]\w*)|\[\s*(-?\d+)\s*\]|\[\s*(['\"]?)([^\]]*?)\3\s*\]")


def override(
    root: fdl.Config, path: str, text: str, *, knob_names: Iterable[str] = ()
) -> fdl.Config:
    """A copy of the tree with the value that `text` says at `path`; raises UsageError.

    `knob_names` are named in the error when the path looks like one of them.
    """
    flag, keys = f"--fdl.{path}={text}", parse_path(path)
    now, kind = _locate(root, path, keys, knob_names)
    try:
        value = _read(text, now, kind)
    except values.WrongType as error:
        shown = not (now is tree.UNSET or tree.holds_node(now))
        raise UsageError(
            f"{flag}: {error}" + (f"; it is {tree.show(now)} now" if shown else "")
        ) from error
    if (wrong := complaint(value, ())) and not complaint(now, ()):
        raise UsageError(f"{flag} {wrong}; it is {tree.show(now)} now")
    return _put(copy.deepcopy(root), keys, value)


def parse_path(path: str) -> list[tree.Key]:
    """The steps of `a.b[0]['k'].c`."""
    keys: list[tree.Key] = []
    position = 0
    while position < len(path):
        match = _TOKEN.match(path, position)
        starts_wrong = match and (path[position] == ".") == (position == 0) and match[1]
        if not match or starts_wrong:
            raise UsageError(f"--fdl.{path}: not a path; write it like a.b[0]['key'].c")
        keys.append(match[1] or (int(match[2]) if match[2] else (match[4],)))
        position = match.end()
    return keys


def _locate(
    root: fdl.Config, path: str, keys: list[tree.Key], knob_names: Iterable[str]
) -> tuple[Any, Any]:
    """The value at `path` now, and the type that its parameter declares (None: none)."""
    value, kind, here = root, None, ""
    for key in keys:
        kind = None
        if isinstance(value, fdl.Buildable) and key in tree.parameters(value):
            kind = _annotation(fdl.get_callable(value), key)
            value, _ = tree.argument(value, key)
        elif isinstance(value, dict) and (name := _dict_key(value, key)) is not None:
            value = value[name]
        elif (
            isinstance(value, list | tuple)
            and isinstance(key, int)
            and -len(value) <= key < len(value)
        ):
            value = value[key]
        else:
            raise UsageError(_unknown(root, path, here, key, value, knob_names))
        here = tree.join(here, key)
    return value, kind


def _unknown(
    root: fdl.Config, path: str, here: str, key: tree.Key, value: Any, knob_names: Iterable[str]
) -> str:
    """The error line for a path whose step `key` below `here` does not exist."""
    if not isinstance(value, fdl.Buildable | dict | list | tuple):
        return f"--fdl.{path}: {here} has no parts that can be set, it is {tree.show(value)}"
    last, paths = path.rpartition(".")[2], tree.settable_paths(root)
    parts = {part: f"{here}{'.' * bool(here and part[0] != '[')}{part}" for part in _parts(value)}
    close = [parts[part] for part in nearest(str(key), parts)]
    same_name = [known for known in paths if re.split(r"[.\[]", known)[-1] == last]
    as_knob = [name for name in knob_names if name.lower() == last.lower()]
    candidates = as_knob or list(dict.fromkeys([*close, *same_name]))[:3]
    candidates = candidates or nearest(path, [*paths, *knob_names])
    remedy = ask([f"--fdl.{candidate}" for candidate in candidates])
    step = tree.join(here, key)
    return f"--fdl.{path}: the tree has no {step}{remedy or '; --fdl_help shows the tree'}"


def _dict_key(value: dict[Any, Any], key: tree.Key) -> Any:
    wanted = key[0] if isinstance(key, tuple) else key
    return next((name for name in value if name == wanted or str(name) == str(wanted)), None)


def _annotation(target: Any, key: str | int) -> Any:
    """The type a class or function declares for a parameter; None where none can be read."""
    owners = [target]
    if isinstance(target, type):
        bases = target.__mro__
        annotated = [base for base in bases if key in vars(base).get("__annotations__", {})]
        owners = annotated or [target.__init__]  # type: ignore[misc]
    for owner in owners[:1]:
        kind = getattr(owner, "__annotations__", {}).get(key)
        if isinstance(kind, str):
            scope = vars(sys.modules.get(owner.__module__, types))
            try:
                kind = eval(kind, scope, dict(vars(owner)) if isinstance(owner, type) else {})
            except Exception:  # a name that only a type checker knows; the current value must do
                return None
        return typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind
    return None


def _simple(kind: Any) -> Any:
    """The part of a type that can be typed on a command line; None where there is none."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(kind) if values.is_supported(member)]
        return functools.reduce(operator.or_, members) if members else None
    return kind if kind is not None and values.is_supported(kind) else None


def _read(text: str, now: Any, kind: Any) -> Any:
    """The value of `text` by the declared type where that is simple, else by the current value."""
    simple = _simple(kind)
    if simple is types.NoneType and text.strip().lower() == "none":
        return None
    if simple not in (None, types.NoneType):
        value = values.parse(text, simple)
        return list(value) if isinstance(now, list) and isinstance(value, tuple) else value
    if isinstance(now, enum.Enum):
        named = type(now).__members__
        if values.unquote(text) in named:
            return named[values.unquote(text)]
        raise values.WrongType(f"one of {', '.join(named)} wanted, got {text}")
    if type(now) in (int, float, bool, str):
        return values.parse(text, type(now))
    if now is None or now is tree.UNSET or isinstance(now, tree.Note):
        if not _takes_literals(kind):
            wanted = f"{values.describe(kind)} wanted"
            raise values.WrongType(f"{wanted}, which cannot be typed here; use --fiddler")
        return values.parse_untyped(text)
    if tree.holds_node(now) and text.strip() not in ("[]", "{}", "()"):
        parts = ", ".join(_parts(now))
        raise values.WrongType(f"a node cannot be typed; set one of its parts ({parts})")
    if type(now) in (list, tuple):
        kinds = {type(item) for item in now}
        if len(kinds) == 1 and kinds <= {int, float, bool, str}:
            return type(now)(values.parse(text, types.GenericAlias(tuple, (*kinds, ...))))
        value = values.parse_untyped(text)
        if isinstance(value, list | tuple):
            return type(now)(value)
        raise values.WrongType(f"a list wanted, got {text}")
    if type(now) is dict:
        value = values.parse_untyped(text)
        if isinstance(value, dict):
            return value
        raise values.WrongType(f"a dictionary wanted, got {text}")
    raise values.WrongType("such a value cannot be typed here; use --fiddler")


def _takes_literals(kind: Any) -> bool:
    """Whether a declared type may hold what can be typed; a class or function cannot be."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(kind) if member is not types.NoneType]
        return any(map(_takes_literals, members))
    if typing.get_origin(kind) in (type, collections.abc.Callable):
        return False
    return not isinstance(kind, type) or kind.__module__ in ("builtins", "typing")


def _parts(node: Any) -> list[str]:
    """The steps that lead into a node: `hidden`, `[0]`, `['pile']`."""
    if isinstance(node, fdl.Buildable):
        return [tree.join("", key) for key in tree.parameters(node)]
    keys = node if isinstance(node, dict) else range(len(node))
    return [f"[{key!r}]" for key in keys]


def _put(node: Any, keys: list[Any], value: Any) -> Any:
    """`node` with `value` at `keys`; tuples are rebuilt, unset defaults are copied first."""
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(node, fdl.Buildable):
        child, is_default = tree.argument(node, key)
        child = _put(copy.deepcopy(child) if is_default else child, rest, value)
        if isinstance(key, int):
            node[key] = child
        else:
            setattr(node, key, child)
    elif isinstance(node, dict):
        key = _dict_key(node, key)
        node[key] = _put(node[key], rest, value)
    else:
        items = list(node)
        items[key] = _put(items[key], rest, value)
        return items if isinstance(node, list) else type(node)(items)
    return node
