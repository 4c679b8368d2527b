"""From what a person typed to the tree that a run builds.

    class of the config -> environment -> command line     the knobs, later ones win
    knobs -> experiment() -> fiddlers -> node overrides    the tree

A knob or a node given twice: the last one wins, and a notice says so.

A run writes what it resolved as text (to read) and as JSON (to reload). The JSON holds the recipe
(config, knobs, fiddlers, overrides) and the tree. On reload **the tree counts**: it is what the run
was, whatever the code says today. The recipe is expanded again beside it, and a notice tells where
today's code would give another tree. Only when the command line changes a knob or adds a fiddler is
the tree made anew, from the recipe. The environment does not count: the file has it.
"""

import copy
import dataclasses
import importlib.util
import inspect
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fiddle as fdl
from fiddle.experimental import serialization

from configs.bounds import complaint
from configs.cli import environment, registry, tree, values
from configs.cli.override import override
from configs.cli.request import Request
from configs.cli.values import UsageError
from configs.knobs import REQUIRED, Knobs, knobs
from paxlike.nearest import ask, nearest

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A config with everything decided; `fdl.build(resolved.tree)` makes the experiment."""

    config_class: type[Knobs] | None  # None: reloaded, and the class is gone
    name: str
    knobs: dict[str, Any]
    origins: dict[str, str]  # knob -> "class Pile5B", "environment VOCAB_PATH" or "command line"
    fiddlers: tuple[str, ...]
    nodes: tuple[tuple[str, str], ...]  # overrides of nodes as (path, text)
    tree: fdl.Config
    notices: tuple[str, ...]

    @property
    def command(self) -> str:
        """The flags that give the same config again, whatever the environment."""
        given = {name for name, source in self.origins.items() if not source.startswith("class ")}
        flags = [f"--fdl_config={self.name}"]
        flags += [
            f"--fdl.{name}={values.typed(self.knobs[name])}" for name in self.knobs if name in given
        ]
        flags += [f"--fiddler={fiddler}" for fiddler in self.fiddlers]
        flags += [f"--fdl.{path}={text}" for path, text in self.nodes]
        return " ".join(map(shlex.quote, flags))

    @property
    def text(self) -> str:
        """To read: each knob with its value and where it came from, then the tree."""
        shown = {name: values.show(value) for name, value in self.knobs.items()}
        wide = max((len(name) for name in shown), default=0)
        widest = min(40, max((len(text) for text in shown.values()), default=0))
        lines = [f"# {self.name}", f"# python main.py {self.command}", "", "# knobs"]
        lines += [
            f"{name:<{wide}} = {text:<{widest}}  [{self.origins[name]}]"
            for name, text in shown.items()
        ]
        lines += ["", "# tree", tree.flat_text(self.tree)]
        return "\n".join(lines)

    @property
    def json(self) -> str:
        """To reload with --fdl_config_file; see the module."""
        try:
            dumped = serialization.dump_json(self.tree)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UsageError(
                f"{self.name} cannot be written as JSON: {reason}; "
                "a config holds plain values and named functions"
            ) from error
        recipe = {
            "format": _FORMAT,
            "config": self.name,
            "knobs": self.knobs,
            "origins": self.origins,
            "fiddlers": self.fiddlers,
            "nodes": self.nodes,
        }
        return json.dumps({**recipe, "tree": json.loads(dumped)}, indent=1) + "\n"


def resolve(request: Request, environ: Mapping[str, str]) -> Resolved:
    """Decides everything; raises UsageError for any mistake, before any array is made."""
    if request.config and request.config_file:
        raise UsageError("--fdl_config and --fdl_config_file exclude each other; give one of them")
    if request.config_file:
        resolved = _from_file(request.config_file, request, environ)
    elif request.config:
        resolved = _from_config(request.config, request, environ)
    else:
        raise UsageError("no config; give --fdl_config=NAME (--fdl_list lists all)")
    notices = [*request.notices, *_given_twice(request), *resolved.notices]
    return dataclasses.replace(resolved, notices=tuple(notices))


def _from_config(call: str, request: Request, environ: Mapping[str, str]) -> Resolved:
    name, positional, keywords = registry.parse_call(call, "fdl_config")
    if positional:
        raise UsageError(
            f"--fdl_config={call}: knobs are given by name, as in {name}(NUM_LAYERS=2)"
        )
    cls, broken = registry.lookup(name)
    from_environment, unused = environment.environment_knobs(environ, cls)
    typed = keywords | _read_knobs(cls, request)
    sources = {name: environment.origin(name) for name in from_environment}
    sources |= dict.fromkeys(typed, "command line")
    return _expand(
        cls,
        from_environment | typed,
        sources,
        request.fiddlers,
        tuple(request.node_overrides),
        [*broken, *unused],
    )


def _from_file(file: str, request: Request, environ: Mapping[str, str]) -> Resolved:
    stored = _read_file(file)
    cls, today, changes, notices = _again(stored)
    remade = bool(request.knob_overrides or request.fiddlers)
    if changes:
        notices.append(_changed_since(file, changes, remade))
    if cls:
        notices += _overruled(environ, cls, today.knobs, file, request)
    nodes = (*stored.nodes, *request.node_overrides)
    if remade:
        if cls is None:
            raise UsageError(
                f"--fdl_config_file={file}: its knobs cannot be changed any more: {changes[0]}"
            )
        typed = _read_knobs(cls, request)
        sources = today.origins | dict.fromkeys(typed, "command line")
        fiddlers = (*stored.fiddlers, *request.fiddlers)
        return _expand(cls, today.knobs | typed, sources, fiddlers, nodes, notices)
    root = stored.tree
    for path, text in request.node_overrides:
        root = override(root, path, text, knob_names=stored.knobs)
    return dataclasses.replace(today, nodes=nodes, tree=root, notices=tuple(notices))


def _again(stored: Resolved) -> tuple[type[Knobs] | None, Resolved, list[str], list[str]]:
    """The recipe expanded by today's code: class, result, differences, notices.

    The class is None, and the result what was stored, when today's code cannot expand it.
    """
    try:
        cls, broken = registry.lookup(stored.name)
        names = {knob.name for knob in knobs(cls)}
        kept = {name: value for name, value in stored.knobs.items() if name in names}
        today = _expand(cls, kept, stored.origins, stored.fiddlers, stored.nodes, [])
    except UsageError as error:
        return None, stored, [str(error)], []
    return cls, today, tree.differences(stored.tree, today.tree), broken


def _expand(
    cls: type[Knobs],
    given: dict[str, Any],
    sources: dict[str, str],
    fiddlers: tuple[str, ...],
    nodes: tuple[tuple[str, str], ...],
    notices: list[str],
) -> Resolved:
    """knobs -> experiment() -> fiddlers -> node overrides."""
    name = registry.path_of(cls)
    root = experiment(cls, given)
    for fiddler in fiddlers:
        before, root = root, _fiddle(fiddler, copy.deepcopy(root))
        if not tree.differences(before, root):
            notices.append(f"--fiddler={fiddler} changed nothing")
    for path, text in nodes:
        root = override(root, path, text, knob_names=[knob.name for knob in knobs(cls)])
    config = cls(**given)
    return Resolved(
        config_class=cls,
        name=name,
        knobs={knob.name: getattr(config, knob.name) for knob in knobs(cls)},
        origins={
            knob.name: sources.get(knob.name, f"class {knob.defined_in}") for knob in knobs(cls)
        },
        fiddlers=fiddlers,
        nodes=nodes,
        tree=root,
        notices=tuple(notices),
    )


def experiment(cls: type[Knobs], given: dict[str, Any]) -> fdl.Config:
    """The tree that the knobs expand to; a ValueError on the way becomes a UsageError."""
    try:
        root = cls(**given).experiment()
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"{cls.__name__}: {' '.join(str(error).split())}") from error
    if not isinstance(root, fdl.Config):
        raise UsageError(
            f"{cls.__name__}.experiment() must return an fdl.Config, got {type(root).__name__}"
        )
    return root


def _fiddle(text: str, root: fdl.Config) -> fdl.Config:
    """Calls a fiddler; it may change the tree it is given or return another."""
    name, args, keywords = registry.parse_call(text, "fiddler")
    function = registry.find_fiddler(name)
    try:
        inspect.signature(function).bind(root, *args, **keywords)
    except TypeError as error:
        wanted = ", ".join(list(map(str, inspect.signature(function).parameters.values()))[1:])
        raise UsageError(f"--fiddler={text}: {error}; write {name}({wanted})") from error
    try:
        changed = function(root, *args, **keywords)
    except (
        ValueError,
        AttributeError,
    ) as error:  # AttributeError: Fiddle, for a field that is not there
        reason = " ".join(str(error).split())
        raise UsageError(f"--fiddler={text} does not fit this config: {reason}") from error
    return root if changed is None else changed


def _read_knobs(cls: type[Knobs], request: Request) -> dict[str, Any]:
    """The knobs on the command line, as their types want them."""
    by_name = {knob.name: knob for knob in knobs(cls)}
    typed = {}
    for name, text in request.knob_overrides:
        flag = f"--fdl.{name}={text}"
        if name not in by_name:
            raise UsageError(f"{flag}: {cls.__name__} has no knob {name}{_instead(cls, name)}")
        knob = by_name[name]
        default = (
            "" if knob.default is REQUIRED else f"; the default is {values.show(knob.default)}"
        )
        try:
            typed[name] = values.parse(text, knob.type)
        except values.WrongType as error:
            raise UsageError(f"{flag}: {error}{default} ({knob.meaning})") from error
        if wrong := complaint(typed[name], knob.bounds):
            raise UsageError(f"{flag} {wrong}{default} ({knob.meaning})")
    return typed


def _instead(cls: type[Knobs], name: str) -> str:
    """Near knobs, and the node of the tree that is spelt like `name`."""
    candidates = [f"--fdl.{near}" for near in nearest(name, [knob.name for knob in knobs(cls)])]
    try:
        paths = tree.settable_paths(experiment(cls, {}))
    except UsageError:  # a config that needs knobs first
        paths = []
    same = [path for path in paths if path.rpartition(".")[2].lower() == name.lower()]
    candidates += [f"--fdl.{path} (a node of the tree)" for path in same[:1]]
    return ask(candidates) or f"; --fdl_help --fdl_config={registry.path_of(cls)} lists its knobs"


class _OwnNames(serialization.DefaultPyrefPolicy):
    """What a config.json may name: classes of paxlike, configs, code of the user, and a few functions.

    The file says what is called when the tree is built, so with any name in it, it could run anything.
    """

    def allows_import(self, module: str, symbol: str) -> bool:
        if (module, symbol) in _NAMES:
            return True
        if module in ("builtins", "fiddle._src.config", "fiddle._src.partial"):
            return "." not in symbol  # of builtins, Fiddle itself allows containers only
        pure = module.startswith(_PURE)
        if not pure and not _is_own(module):
            return False
        value: Any = importlib.import_module(module)
        for part in symbol.split("."):
            value = getattr(value, part)
            if inspect.ismodule(value):
                return False  # a way round: paxlike.experiment, os.system
        if not callable(value):
            return True
        home = getattr(value, "__module__", None) or ""
        if pure:
            return home.startswith(_PURE)
        if module.partition(".")[0] == "paxlike" and not inspect.isclass(value):
            return False  # its functions start programs and write files
        return _is_own(home)


# Libraries that neither start programs nor touch files.
_PURE = ("jax.nn.", "jax._src.nn.", "flax.linen.", "optax.")
# Functions that configs call and that the rules above would refuse.
_NAMES = {
    ("jax.nn.initializers", "normal"),
    ("paxlike.data.open_tokenizer", "open_tokenizer"),
    ("paxlike.parallel.rules", "rules_with"),
}


def _is_own(module: str) -> bool:
    """Whether it is of paxlike, or code of the user's, and not of a library."""
    top = module.partition(".")[0]
    if top in ("paxlike", "configs"):
        return True
    spec = None if not top or top in sys.stdlib_module_names else importlib.util.find_spec(top)
    places = [] if spec is None else [*(spec.submodule_search_locations or []), spec.origin or ""]
    return bool(places) and not any("-packages" in place for place in places)


def _read_file(file: str) -> Resolved:
    """What a run resolved and wrote."""
    flag = f"--fdl_config_file={file}"
    try:
        stored = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{flag}: cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error
    except json.JSONDecodeError as error:
        raise UsageError(f"{flag}: is not JSON: {error}") from error
    if not isinstance(stored, dict) or stored.get("format") != _FORMAT:
        raise UsageError(
            f"{flag}: is not a config that a run of this version wrote (format {_FORMAT})"
        )
    keys = ("config", "knobs", "origins", "fiddlers", "nodes", "tree")
    if missing := [key for key in keys if key not in stored]:
        raise UsageError(f"{flag}: lacks {', '.join(map(repr, missing))}; the file is damaged")
    try:
        then = serialization.load_json(json.dumps(stored["tree"]), _OwnNames())
    except Exception as error:  # whatever importing and calling the names in the file can raise
        reason = " ".join(str(error).split())
        raise UsageError(
            f"{flag}: today's code cannot load its tree ({type(error).__name__}: {reason}); "
            f"start from --fdl_config={stored['config']}"
        ) from error
    return Resolved(
        config_class=None,
        name=stored["config"],
        knobs=stored["knobs"],
        origins=stored["origins"],
        fiddlers=tuple(stored["fiddlers"]),
        nodes=tuple((path, text) for path, text in stored["nodes"]),
        tree=then,
        notices=(),
    )


def _changed_since(file: str, changes: list[str], remade: bool) -> str:
    use = "made anew by today's code" if remade else "used as it was written"
    more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
    return (
        f"{file}: the code has changed since this config was written; the config is {use} "
        f"(then -> now: {'; '.join(changes[:3])}{more})"
    )


def _overruled(
    environ: Mapping[str, str], cls: type[Knobs], now: dict[str, Any], file: str, request: Request
) -> list[str]:
    """A line for each environment variable that says something else than the file."""
    wanted, notices = environment.environment_knobs(environ, cls)
    typed = {name for name, _ in request.knob_overrides}
    for name, value in wanted.items():
        if value != now.get(name) and name not in typed:
            notices.append(
                f"{environment.origin(name)} has no effect: {file} says "
                f"{name}={values.show(now.get(name))}; --fdl.{name}= changes it"
            )
    return notices


def _given_twice(request: Request) -> list[str]:
    texts: dict[str, list[str]] = {}
    if request.config:
        _, _, keywords = registry.parse_call(request.config, "fdl_config")
        texts = {name: [values.show(value)] for name, value in keywords.items()}
    for name, text in request.overrides:
        texts.setdefault(name, []).append(text)
    return [
        f"--fdl.{name} is given {len(given)} times; the last counts: {given[-1]}"
        for name, given in texts.items()
        if len(set(given)) > 1
    ]
