"""Finds configs and fiddlers by name. There is nothing to register: the modules are the registry.

A name is a dotted path (`configs.gpt.Pile126M`, `gpt.Pile126M`, `my_project.my_configs.Tiny`) or
the unique last part of one in the `configs` package (`Pile126M`).
"""

import ast
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import pkgutil
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from configs.cli.values import UsageError
from configs.knobs import Knobs, is_config, knobs, title
from paxlike.nearest import ask, did_you_mean, nearest

_HOW_TO_LIST = "--fdl_list lists all"
_MACHINERY = (importlib.__file__, str(Path(__file__).parent), knobs.__code__.co_filename)
_SKIPPED = ("configs.cli", "configs.flags", "configs.knobs", "configs.fiddlers")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One config of a package: its class and all names it goes by, the class's own name first."""

    config_class: type[Knobs]
    names: tuple[str, ...]

    @property
    def path(self) -> str:
        return path_of(self.config_class)


def find_config(name: str, *, package: str = "configs") -> type[Knobs]:
    """The config class of that name; raises UsageError with the nearest names.

    Warns about modules of the package that cannot be imported when the name is in another.
    """
    found, broken = lookup(name, package=package)
    for line in broken:
        warnings.warn(line, stacklevel=2)
    return found


def lookup(name: str, *, package: str = "configs") -> tuple[type[Knobs], list[str]]:
    """As find_config, with the modules that cannot be imported as one-line strings."""
    if "." in name:
        return _by_path(name, package), []
    entries, broken = scan(package)
    matches = [entry for entry in entries if name in entry.names]
    if len(matches) == 1:
        return matches[0].config_class, broken
    if matches:
        paths = " or ".join(f"{entry.path.rpartition('.')[0]}.{name}" for entry in matches)
        raise UsageError(f"--fdl_config={name} is ambiguous; write {paths}")
    raise UsageError(_unknown(name, entries, broken, package))


def list_configs(*, package: str = "configs", width: int = 100) -> str:
    """One aligned line per config: its path, what its docstring says first, and its aliases."""
    entries, broken = scan(package)
    rows = []
    for entry in entries:
        aliases = f" (also {', '.join(entry.names[1:])})" if entry.names[1:] else ""
        rows.append(
            (entry.path, title(entry.config_class) if entry.config_class.__doc__ else "", aliases)
        )
    column = max((len(path) for path, *_ in rows), default=0)
    lines = []
    for path, summary, aliases in rows:
        room = max(20, width - column - 2 - len(aliases))
        if len(summary) > room:
            summary = summary[: room - 1].rstrip() + "…"
        lines.append(f"{path:<{column}}  {summary}{aliases}".rstrip())
    return "\n".join(lines + [f"not listed: {line}" for line in broken])


def scan(package: str = "configs") -> tuple[list[Entry], list[str]]:
    """All configs of a package, file by file, and the modules that cannot be imported."""
    root = importlib.import_module(package)
    names = [
        package,
        *(module.name for module in pkgutil.iter_modules(root.__path__, f"{package}.")),
    ]
    entries: list[Entry] = []
    broken: list[str] = []
    for module_name in names:
        if module_name in _SKIPPED:
            continue
        try:
            entries += _entries(_import(module_name))
        except UsageError as error:
            _, says, reason = str(error).partition(" cannot be imported")
            if not any(line.endswith(says + reason) for line in broken):  # one cause, one line
                broken.append(str(error))
    return entries, broken


def path_of(config_class: type) -> str:
    """`module.Class`, as --fdl_config takes it."""
    return f"{config_class.__module__}.{config_class.__qualname__}"


def find_fiddler(name: str, *, package: str = "configs") -> Callable[..., Any]:
    """The config -> config function `name` of `<package>.fiddlers`, or of a dotted path."""
    if "." in name:
        module, attribute = _resolve_path(name, package, kind="--fiddler")
    elif _exists(f"{package}.fiddlers"):
        module, attribute = _import(f"{package}.fiddlers"), name
    else:
        raise UsageError(f"--fiddler={name}: there is no {package}/fiddlers.py; give a dotted path")
    function = vars(module).get(attribute)
    if inspect.isfunction(function) and not attribute.startswith("_"):
        return function
    known = [
        key
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and key[0] != "_"
    ]
    remedy = did_you_mean(attribute, known) or f"; there are: {', '.join(known) or 'none'}"
    raise UsageError(f"--fiddler={name}: {module.__name__} has no function {attribute}{remedy}")


def parse_call(text: str, flag: str) -> tuple[str, list[Any], dict[str, Any]]:
    """`Name` or `a.Name(1, x=2)` as (name, positional, keyword) with literal arguments."""
    name, bracket, _ = text.partition("(")
    if not bracket:
        return text.strip(), [], {}
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call):
            raise ValueError("not a call")
        args = [ast.literal_eval(arg) for arg in call.args]
        keywords = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise UsageError(
            f"--{flag}={text}: write NAME or NAME(ARGUMENT=value, ...), strings in quotes"
        ) from error
    return name.strip(), args, keywords


def _entries(module: ModuleType) -> list[Entry]:
    names: dict[type, list[str]] = {}
    for name, value in vars(module).items():
        # A class imported from elsewhere is listed there.
        if is_config(value) and value.__module__ == module.__name__ and not name.startswith("_"):
            names.setdefault(value, []).append(name)
    own_name_first = functools.partial(sorted, key=lambda name: name)
    return [
        Entry(cls, (cls.__name__, *own_name_first(name for name in found if name != cls.__name__)))
        for cls, found in names.items()
    ]


def _by_path(path: str, package: str) -> type[Knobs]:
    module, attribute = _resolve_path(path, package, kind="--fdl_config")
    found = vars(module).get(attribute)
    if isinstance(found, type) and issubclass(found, Knobs):
        if is_config(found):
            return found
        concrete = [
            entry.names[0] for entry in _entries(module) if issubclass(entry.config_class, found)
        ]
        instead = (
            f"; configs made of it: {', '.join(concrete)}" if concrete else f"; {_HOW_TO_LIST}"
        )
        raise UsageError(f"--fdl_config={path} is a set of knobs, not a config{instead}")
    if isinstance(found, ModuleType) and (inside := _entries(found)):
        listed = ", ".join(name for entry in inside for name in entry.names)
        raise UsageError(f"--fdl_config={path} is a module; the configs in it: {listed}")
    known = [name for entry in _entries(module) for name in entry.names]
    what = f"is no config but {_article(found)}" if attribute in vars(module) else "does not exist"
    remedy = did_you_mean(attribute, known, prefix=f"{module.__name__}.") or f"; {_HOW_TO_LIST}"
    raise UsageError(f"--fdl_config={path} {what}{remedy}")


def _resolve_path(path: str, package: str, *, kind: str) -> tuple[ModuleType, str]:
    """The module and the attribute of a dotted path, looked for in the package first."""
    module_name, _, attribute = path.rpartition(".")
    for candidate in (f"{package}.{module_name}", module_name):
        if _exists(candidate):
            return _import(candidate), attribute
    entries, _ = scan(package)
    last = path.rpartition(".")[2]
    same = [entry.path for entry in entries if last in entry.names]
    if kind == "--fdl_config" and same:
        raise UsageError(
            f"{kind}={path}: there is no module {module_name}; did you mean {' or '.join(same)}?"
        )
    modules = {entry.config_class.__module__ for entry in entries}
    short = {module.removeprefix(f"{package}."): module for module in sorted(modules)}
    found = [short[name] for name in nearest(module_name.removeprefix(f"{package}."), short)]
    remedy = ask(found) or "; Python finds modules in PYTHONPATH"
    raise UsageError(f"{kind}={path}: there is no module {module_name}{remedy}")


def _unknown(name: str, entries: list[Entry], broken: list[str], package: str) -> str:
    by_name = {known: entry for entry in entries for known in entry.names}
    remedy = did_you_mean(name, by_name) or f"; {_HOW_TO_LIST}"
    if broken and remedy.endswith(_HOW_TO_LIST):  # it is probably in there
        return f"--fdl_config={name}: not found, but {'; '.join(broken)}"
    return f"--fdl_config={name}: no config of that name in {package}{remedy}"


def _exists(module_name: str) -> bool:
    try:
        return importlib.util.find_spec(module_name) is not None
    except (ModuleNotFoundError, ValueError):
        return False


def _import(module_name: str) -> ModuleType:
    """The module; an error inside it becomes one line that names the file and line."""
    try:
        return importlib.import_module(module_name)
    except Exception as error:
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if not frame.filename.startswith(("<frozen", *_MACHINERY))
        ]
        where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
        kind = "" if isinstance(error, UsageError) else f"{type(error).__name__}: "
        message = " ".join(str(error).split())
        raise UsageError(f"{module_name} cannot be imported: {kind}{message}{where}") from error


def _article(value: Any) -> str:
    kind = "module" if isinstance(value, ModuleType) else type(value).__name__
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
