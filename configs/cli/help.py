"""The help pages: what a config is, what can be turned, and how."""

import inspect
import re
import shlex
import sys
import textwrap
import types
import typing
from collections.abc import Callable
from typing import Any, Literal

from configs.cli import registry, tree, values
from configs.cli.request import FLAGS
from configs.cli.resolve import Resolved, experiment
from configs.cli.values import UsageError
from configs.knobs import REQUIRED, Knob, Knobs, knobs

_WIDTH = 100
_Painter = Callable[[str, str], str]
_BOLD, _DIM, _GREEN, _YELLOW = "1", "2", "32", "33"


def help_text(resolved: Resolved, *, color: bool = False, width: int = _WIDTH) -> str:
    """All about one config: docstring, knobs by group, examples, tree. Never wider than `width`."""
    paint = _painter(color)
    blocks = [_heading(resolved, paint, width)]
    blocks += _groups(resolved, paint, width)
    blocks += [_examples(resolved, paint, width), _tree(resolved, paint, width)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def usage_text(*, color: bool = False, width: int = _WIDTH, flag_values: Any = None) -> str:
    """How to start: the flags of the configs, those of main.py, and all configs."""
    paint = _painter(color)
    rows = [
        (f"--{name}" + (f"={value}" if value else ""), text)
        for name, (value, text) in FLAGS.items()
    ]
    lines = [paint("usage: python main.py --fdl_config=NAME --job_log_dir=DIR [flags]", _BOLD), ""]
    lines += [paint("Config", _BOLD), *_columns(rows, width)]
    if main := _main_flags(flag_values):
        lines += ["", paint("Run", _BOLD), *_columns(main, width)]
    lines += ["", paint("All configs", _BOLD)]
    for line in registry.list_configs(width=width - 2).splitlines():
        lines += [f"  {part}" for part in _fit(line, width - 2)]
    lines += ["", "--fdl_help --fdl_config=NAME shows what can be set in a config."]
    return "\n".join(lines) + "\n"


def _heading(resolved: Resolved, paint: _Painter, width: int) -> str:
    cls = resolved.config_class
    if cls is None:
        return paint(resolved.name, _BOLD)
    lineage = [base for base in cls.__mro__[1:] if issubclass(base, Knobs)]
    names = [base.__name__ for base in lineage if base.experiment is not Knobs.experiment]
    first = paint(resolved.name, _BOLD)
    if names:
        first += paint(f"   inherits from {', '.join(names)}", _DIM)
    doc = inspect.cleandoc(vars(cls).get("__doc__") or "")
    # Paragraphs are wrapped; those with indented lines (commands, tables) are left as they are.
    paragraphs = [text for text in re.split(r"\n\s*\n", doc) if text]
    wrapped = [
        text if re.search(r"^\s", text, re.M) else textwrap.fill(" ".join(text.split()), width)
        for text in paragraphs
    ]
    return "\n".join([first, *wrapped[:1]]) + "".join(f"\n\n{text}" for text in wrapped[1:])


def _groups(resolved: Resolved, paint: _Painter, width: int) -> list[str]:
    """One block per mixin, all in the same columns: mark, name, value, type, meaning."""
    if resolved.config_class is None:
        return []
    all_knobs = knobs(resolved.config_class)
    rows = [
        (knob, values.typed(resolved.knobs[knob.name]), _kind_cell(knob.type)) for knob in all_knobs
    ]
    sizes = [
        max(len(knob.name) for knob, *_ in rows),
        min(16, max(len(value) for _, value, _ in rows)),
        max(len(kind) for *_, kind in rows),
    ]
    legend = (
        f"{paint('*', _YELLOW)} set by the config   {paint('>', _GREEN)} set by you   ? may be None"
    )
    blocks = [f"{paint('Knobs', _BOLD)}   --fdl.NAME=VALUE   {legend}"]
    for group in dict.fromkeys(knob.group for knob in all_knobs):
        lines = [paint(group, _BOLD)]
        for knob, value, kind in rows:
            if knob.group == group:
                lines += _knob_lines(resolved, knob, value, kind, sizes, paint, width)
        blocks.append("\n".join(lines))
    return blocks


def _knob_lines(
    resolved: Resolved,
    knob: Knob,
    value: str,
    kind: str,
    sizes: list[int],
    paint: _Painter,
    width: int,
) -> list[str]:
    """`* NAME  value  type  meaning`, the meaning wrapped; a long value pushes the rest down."""
    name_size, value_size, kind_size = sizes
    mark, tint = _mark(resolved, knob)
    left = 2 + name_size + 2 + value_size + 2 + kind_size + 2
    start = f"{paint(mark, tint)} {paint(knob.name.ljust(name_size), tint)}  "
    explanation = _explanation(resolved, knob, mark)
    right = textwrap.wrap(explanation, width - left, break_on_hyphens=False)
    right[0] = f"{paint(kind.ljust(kind_size), _DIM)}  {right[0]}"
    right[1:] = [" " * left + line for line in right[1:]]
    if len(value) <= value_size:
        return [start + paint(value.ljust(value_size), tint) + "  " + right[0], *right[1:]]
    indent = 2 + name_size + 2
    shown = textwrap.wrap(value, width - indent, break_on_hyphens=False)
    first, *more = [paint(line, tint) for line in shown]
    below = [" " * indent + line for line in more]
    return [start + first, *below, " " * (indent + value_size + 2) + right[0], *right[1:]]


def _mark(resolved: Resolved, knob: Knob) -> tuple[str, str]:
    if not resolved.origins[knob.name].startswith("class "):
        return ">", _GREEN
    if resolved.knobs[knob.name] != knob.declared_default:
        return "*", _YELLOW
    return " ", ""


def _explanation(resolved: Resolved, knob: Knob, mark: str) -> str:
    text = knob.meaning
    if choices := _choices(knob.type):
        text += f"; one of {', '.join(map(str, choices))}"
    bounds = " and ".join(bound.words for bound in knob.bounds)
    if bounds not in ("", "at least 0", "at least 1"):  # what anybody would expect of a number
        text += f"; {bounds}"
    if mark == ">":
        text += (
            " (required)" if knob.default is REQUIRED else f" (was {values.typed(knob.default)})"
        )
        if resolved.origins[knob.name] != "command line":
            text += f", from {resolved.origins[knob.name]}"
    return text


def _kind_cell(kind: Any) -> str:
    """The type in at most eight letters or so: `int`, `float?`, `[int]`, `choice`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        cells = [_kind_cell(arg) for arg in args if arg is not types.NoneType]
        return "|".join(dict.fromkeys(cells)) + ("?" if types.NoneType in args else "")
    if origin in (tuple, list):
        return f"[{_kind_cell(args[0])}]"
    return "choice" if origin is Literal else "dict" if origin is dict else values.describe(kind)


def _choices(kind: Any) -> list[Any]:
    """The choices of a Literal, alone or in a union."""
    if typing.get_origin(kind) is Literal:
        return list(typing.get_args(kind))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        members = typing.get_args(kind)
        found = [choice for member in members for choice in _choices(member)]
        others = [member for member in members if not _choices(member)]
        return found + [values.describe(member) for member in others] if found else []
    return []


def _examples(resolved: Resolved, paint: _Painter, width: int) -> str:
    """Three overrides that work for this very config, and how to keep them."""
    if resolved.config_class is None:
        return ""
    cls = resolved.config_class
    start = f"  python main.py --fdl_config={resolved.name} --job_log_dir=DIR"
    lines = [paint("How to change it", _BOLD)]
    for comment, flag in _example_flags(resolved):
        lines += [f"  {paint(f'# {comment}', _DIM)}", f"{start} \\", f"      {flag}"]
    lines += ["", f"  {paint('# To keep a change, write it down as a config of its own:', _DIM)}"]
    lines += [f"  class Mine({cls.__name__}):", '      """What it is for."""']
    lines += [f"      {name} = {value!r}" for name, value in list(resolved.knobs.items())[:1]]
    return "\n".join(lines)


def _example_flags(resolved: Resolved) -> list[tuple[str, str]]:
    """(comment, flag): a number doubled where the config allows it, a list, and a node."""
    by_kind: dict[str, tuple[str, Any]] = {}
    for name, value in resolved.knobs.items():
        by_kind.setdefault(type(value).__name__, (name, value))
    found = []
    if "int" in by_kind and resolved.config_class:
        name, value = by_kind["int"]
        try:
            experiment(resolved.config_class, {**resolved.knobs, name: value * 2})
            value *= 2
        except UsageError:
            pass
        found.append(("a knob", f"--fdl.{name}={value}"))
    if "tuple" in by_kind:
        flag = "--fdl.{}={}".format(by_kind["tuple"][0], values.typed(by_kind["tuple"][1]))
        found.append(("a list; the quotes are for the shell", shlex.quote(flag)))
    leaves = [line for line in tree.lines(resolved.tree) if type(line.value) in (int, float, bool)]
    for line in sorted(leaves, key=lambda line: -line.path.count("."))[:1]:
        flag = f"--fdl.{line.path}={values.typed(line.value)}"
        found.append(("a node of the tree below", shlex.quote(flag)))
    return found


def _tree(resolved: Resolved, paint: _Painter, width: int) -> str:
    lines = [f"{paint('Tree', _BOLD)}   --fdl.path.to.node=VALUE"]
    for line in tree.lines(resolved.tree):
        parts = _fit(f"{line.path or '<root>'} = {line.shown}", width - 2)
        lines += [f"  {paint(part, _DIM if line.is_default else '')}" for part in parts]
    return "\n".join(lines)


def _fit(line: str, width: int) -> list[str]:
    """The line as it is, or wrapped where it is too long; what is aligned stays so."""
    if len(line) <= width:
        return [line]
    return textwrap.wrap(line, width, subsequent_indent="    ", break_on_hyphens=False)


def _columns(rows: list[tuple[str, str]], width: int) -> list[str]:
    """Two columns; a left side that is too long stands on a line of its own."""
    size = max((len(left) for left, _ in rows if len(left) <= 32), default=0)
    lines = []
    for left, right in rows:
        first, *more = textwrap.wrap(right, width - size - 4) or [""]
        if len(left) > size:
            lines.append(f"  {left}")
            left = ""
        lines.append(f"  {left:<{size}}  {first}".rstrip())
        lines += [" " * (size + 4) + line for line in more]
    return lines


def _main_flags(flag_values: Any) -> list[tuple[str, str]]:
    """Name, default and meaning of the flags that main.py defines."""
    if flag_values is None:
        from absl import flags

        flag_values = flags.FLAGS
    by_module = flag_values.flags_by_module_dict()
    found = [flag for name in (sys.argv[0], "__main__", "main") for flag in by_module.get(name, ())]
    return [
        # absl appends a second line to the help of flags that may be repeated.
        (
            f"--{flag.name}={'...' if flag.value in (None, []) else flag.value}",
            _first_line(flag.help),
        )
        for flag in dict.fromkeys(found)
    ]


def _first_line(text: str) -> str:
    return (text or "").strip().split("\n")[0].rstrip(";")


def _painter(color: bool) -> _Painter:
    """Terminal colours, or nothing."""
    return lambda text, code: f"\033[{code}m{text}\033[0m" if color and code and text else text
