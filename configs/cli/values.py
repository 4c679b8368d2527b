"""Values of knobs and tree nodes: what a type accepts, and how words become values.

Types are those a person can type: `int`, `float`, `bool`, `str`, `Literal["a", "b"]`,
`tuple[int, ...]`, `dict[str, float]`, and unions of these with `None`. Two roads lead to a value:
`convert` checks a Python value (an override in a class), `parse` reads text (an override on the
command line). Both follow the type, so `8` stays a string where a string is wanted, and a shell
that eats quotes costs nothing.
"""

import ast
import functools
import re
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal, Union


class UsageError(ValueError):
    """A mistake of the person at the keyboard: one line, what is wrong and what is right."""


class WrongType(ValueError):
    """A value that its type does not accept; callers catch it and name the knob."""


def is_supported(kind: Any) -> bool:
    """Whether `convert` and `parse` know the type `kind`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind in (int, float, bool, str, None, types.NoneType):
        return True
    if origin is Literal:
        return all(isinstance(choice, str | int | types.NoneType) for choice in args)
    if origin in (Union, types.UnionType, dict):
        return all(map(is_supported, args))
    if origin in (tuple, list):
        return all(arg is Ellipsis or is_supported(arg) for arg in args)
    return False


def describe(kind: Any) -> str:
    """The type in words for one-line errors and the help: `int`, `[int, ...]`, `'a' or 'b'`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is None or kind is types.NoneType:
        return "None"
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe, args))
    if origin in (tuple, list):
        return f"[{', '.join(map(describe, _members(kind)))}{'' if _length(kind) else ', ...'}]"
    if origin is dict:
        return f"{{{describe(args[0])}: {describe(args[1])}}}"
    return getattr(kind, "__name__", str(kind))


def show(value: Any) -> str:
    """The value to read: tuples and lists both as `[1, 8, 1]`, strings in quotes."""
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return f"[{', '.join(map(show, value))}]"
    if type(value) is dict:
        return f"{{{', '.join(f'{show(k)}: {show(v)}' for k, v in value.items())}}}"
    return repr(value)


def typed(value: Any) -> str:
    """The value as the command line takes it back: no blanks, quotes only where needed.

    >>> typed((1, 8, 1)), typed("bfloat16"), typed("8"), typed(["data", "fsdp"])
    ('[1,8,1]', 'bfloat16', "'8'", '[data,fsdp]')
    """
    if type(value) in (tuple, list):
        return f"[{','.join(map(typed, value))}]"
    if type(value) is dict:
        return f"{{{','.join(f'{typed(k)}:{typed(v)}' for k, v in value.items())}}}"
    plain = (
        isinstance(value, str)
        and re.fullmatch(r"[\w./@~+-]+", value)
        and parse_untyped(value) == value
    )
    return value if plain else show(value)


def convert(value: Any, kind: Any) -> Any:
    """The value as `kind`: lists become tuples, ints become floats where one is wanted.

    Nothing else changes: `True` is no int, and 0 stays 0. Raises WrongType.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        # An exact member wins over a converting one: 3 stays an int in `float | int`.
        exact = [member for member in args if type(value) is member]
        found = _first(lambda member: convert(value, member), [*exact, *args], kind, show(value))
        return _not_empty(found, kind)
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in args):
            return value
    elif origin in (tuple, list):
        if isinstance(value, tuple | list) and _length(kind) in (None, len(value)):
            return tuple(convert(item, member) for item, member in zip(value, _each(kind, value)))
    elif origin is dict:
        if isinstance(value, dict):
            return {convert(k, args[0]): convert(v, args[1]) for k, v in value.items()}
    elif kind is None or kind is types.NoneType:
        if value is None:
            return None
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif type(value) is kind:
        return value
    raise WrongType(f"{describe(kind)} wanted, got {show(value)}{_hint(value, kind)}")


def parse(text: str, kind: Any) -> Any:
    """The text of a command line as a value of `kind`.

    Accepts `true`/`False` in any case, `[1,8,1]` or `(1,8,1)` or `1,8,1`, bare words and quoted
    ones (`a`, `'a'`, `"a"`, `\\"a\\"`). Raises WrongType.

    >>> parse("[1,8,1]", tuple[int, ...]), parse("TRUE", bool), parse("8", str)
    ((1, 8, 1), True, '8')
    """
    text = text.strip()
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        # Strings accept nearly everything, so they come last.
        members = sorted(args, key=lambda member: member is str)
        exact = [member for member in members if member is not float]
        found = _first(lambda member: parse(text, member), [*exact, *members], kind, text)
        return _not_empty(found, kind)
    if origin is Literal:
        return _first(lambda choice: _choose(text, choice), args, kind, text)
    if origin in (tuple, list):
        items = _items(text)
        if items is not None and _length(kind) in (None, len(items)):
            return tuple(parse(item, member) for item, member in zip(items, _each(kind, items)))
    elif origin is dict:
        pairs = _pairs(text)
        if pairs is not None:
            return {parse(k, args[0]): parse(v, args[1]) for k, v in pairs}
    elif kind is str:
        # A bare None means None, which a `str` cannot be; as four letters it would hide a mistake.
        if text.lower() != "none":
            return unquote(text)
    else:
        value = parse_untyped(text)
        if (
            kind is float
            and isinstance(value, str)
            and value == text
            and value.lstrip("+-") in ("inf", "nan")
        ):
            value = float(value)
        return convert(value, kind)
    raise WrongType(f"{describe(kind)} wanted, got {text}")


def _not_empty(value: Any, kind: Any) -> Any:
    """The value, unless it is an empty text where None says that there is none.

    It comes from a shell variable that was never set, and as a path it would mean the folder one is in.
    """
    if isinstance(value, str) and not value.strip() and types.NoneType in typing.get_args(kind):
        raise WrongType(f"{describe(kind)} wanted, got an empty text")
    return value


def parse_untyped(text: str) -> Any:
    """The text as the value it looks like; what looks like nothing else is a string.

    >>> [parse_untyped(text) for text in ("1e-4", "[data,fsdp]", "true", "bfloat16")]
    [0.0001, ['data', 'fsdp'], True, 'bfloat16']
    """
    text = text.strip()
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    if _is_quoted(text) or _is_quoted(text.replace('\\"', '"')):
        return unquote(text)
    if (pairs := _pairs(text)) is not None:
        return {parse_untyped(key): parse_untyped(value) for key, value in pairs}
    if text[:1] in ("[", "(") and (items := _items(text)) is not None:
        values = [parse_untyped(item) for item in items]
        return values if text[0] == "[" else tuple(values)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def unquote(text: str) -> str:
    """The text without one pair of quotes around it, plain or escaped for a shell."""
    for candidate in (text, text.replace('\\"', '"').replace("\\'", "'")):
        if _is_quoted(candidate):
            try:
                return str(ast.literal_eval(candidate))
            except (ValueError, SyntaxError):
                return candidate[1:-1]
    return text


def split_top_level(text: str, separator: str = ",") -> list[str]:
    """Splits at separators outside quotes and brackets; WrongType where these do not close."""
    parts, depth, quote, start = [], 0, "", 0
    for index, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == separator and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    if depth or quote:
        raise WrongType(f"brackets or quotes do not close in {text}")
    parts.append(text[start:])
    return [part.strip() for part in parts]


def _is_quoted(text: str) -> bool:
    return len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"" and text[0] not in text[1:-1]


def _items(text: str) -> list[str] | None:
    """The item texts of `[a, b]`, `(a, b)` or `a, b`; None for anything else."""
    if (text[:1], text[-1:]) in (("[", "]"), ("(", ")")):
        text = text[1:-1]
    elif "," not in text or text[0] in "([{":
        return None
    items = split_top_level(text)
    if items[-1] == "":
        items.pop()  # `[]`, and the trailing comma of `(1,)`
    return items


def _pairs(text: str) -> list[list[str]] | None:
    """The (key, value) texts of `{a: b}`; None for anything else."""
    if (text[:1], text[-1:]) != ("{", "}"):
        return None
    pairs = [split_top_level(item, ":") for item in split_top_level(text[1:-1]) if item]
    return pairs if all(len(pair) == 2 for pair in pairs) else None


def _choose(text: str, choice: Any) -> Any:
    if parse(text, type(choice)) != choice:
        raise WrongType(text)
    return choice


def _first(attempt: Any, options: Iterable[Any], kind: Any, shown: str) -> Any:
    for option in options:
        try:
            return attempt(option)
        except WrongType:
            continue
    raise WrongType(f"{describe(kind)} wanted, got {shown}")


def _members(kind: Any) -> list[Any]:
    return [arg for arg in typing.get_args(kind) if arg is not Ellipsis]


@functools.cache
def _length(kind: Any) -> int | None:
    """The length a tuple type asks for, None for any."""
    args = typing.get_args(kind)
    return None if typing.get_origin(kind) is list or Ellipsis in args else len(args)


def _each(kind: Any, items: Iterable[Any]) -> Iterable[Any]:
    members = _members(kind)
    return members if _length(kind) else [members[0] for _ in items]


def _hint(value: Any, kind: Any) -> str:
    if kind is int and isinstance(value, float) and value.is_integer():
        return f" (write {int(value)})"
    return ""
