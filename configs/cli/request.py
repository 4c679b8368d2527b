"""Takes the flags of the configs out of a command line; what they mean is decided later."""

import dataclasses
import re
from collections.abc import Sequence

from configs.cli.values import UsageError, unquote
from paxlike.nearest import did_you_mean

FLAGS = {
    "fdl_config": ("NAME", "the config: configs.gpt.Pile126M, Pile126M or Pile126M(NUM_LAYERS=2)"),
    "fdl_config_file": ("FILE", "or the config.json that a run wrote"),
    "fdl.KNOB": ("VALUE", "sets a knob of the config (upper case)"),
    "fdl.path.to.node": ("VALUE", "sets a node of the tree that the knobs expand to (lower case)"),
    "fiddler": ("NAME", "a change from configs/fiddlers.py: NAME or NAME(x=1); may be repeated"),
    "fdl_list": ("", "prints all configs, one line each"),
    "fdl_help": ("", "prints the knobs of the config and its tree"),
}
_SWITCHES = ("fdl_list", "fdl_help", "help", "h")
# Flags of Fiddle and Pax that have another form here.
_ELSEWHERE = {
    "fdl": "--fdl_config=NAME, --fiddler=NAME and --fdl.path=VALUE",
    "fdl_set": "--fdl.path=VALUE",
    "fdl_tags_set": "a function in configs/fiddlers.py and --fiddler=NAME",
    "fdl_tag": "a function in configs/fiddlers.py and --fiddler=NAME",
    "exp": "--fdl_config=NAME",
}


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asks of the configs, still as text."""

    config: str | None = None  # NAME or NAME(KNOB=value)
    config_file: str | None = None
    overrides: tuple[tuple[str, str], ...] = ()  # (knob or path, text), in the order given
    fiddlers: tuple[str, ...] = ()
    help: str = ""  # "config" for --fdl_help, "usage" for --help
    list: bool = False
    notices: tuple[str, ...] = ()

    @property
    def knob_overrides(self) -> tuple[tuple[str, str], ...]:
        return tuple((name, text) for name, text in self.overrides if _is_knob(name))

    @property
    def node_overrides(self) -> tuple[tuple[str, str], ...]:
        return tuple((path, text) for path, text in self.overrides if not _is_knob(path))


def split(argv: Sequence[str]) -> tuple[Request, list[str]]:
    """The request, and the arguments that are left for absl (the program's name first).

    >>> request, rest = split(["main.py", "--fdl_config=Tiny", "--mode=eval", "--fdl.NUM_LAYERS=2"])
    >>> request.config, request.overrides, rest
    ('Tiny', (('NUM_LAYERS', '2'),), ['main.py', '--mode=eval'])
    """
    rest, found = list(argv[:1]), []
    words = iter(_with_flag_files(argv)[1:])
    for word in words:
        if word == "--":
            rest += [word, *words]
            break
        name, equals, text = word.lstrip("-").partition("=")
        if not word.startswith("-") or not _is_ours(name):
            rest.append(word)
        elif name in _SWITCHES:
            found.append((name, text or "true"))
        else:
            found.append((name, text if equals else _next_word(words, name)))
    return _request(found), rest


def _request(found: list[tuple[str, str]]) -> Request:
    once: dict[str, str] = {}
    notices = []
    for name, text in found:
        if name in once and once[name] != text and name in ("fdl_config", "fdl_config_file"):
            notices.append(f"--{name} is given more than once; the last counts: {text}")
        once[name] = text
    on = {name: once.get(name, "false").lower() not in ("false", "0") for name in _SWITCHES}
    return Request(
        config=_bare(once["fdl_config"]) if "fdl_config" in once else None,
        config_file=_bare(once["fdl_config_file"]) if "fdl_config_file" in once else None,
        overrides=tuple((name[4:], text) for name, text in found if name.startswith("fdl.")),
        fiddlers=tuple(_bare(text) for name, text in found if name == "fiddler"),
        help="config" if on["fdl_help"] else "usage" if on["help"] or on["h"] else "",
        list=on["fdl_list"],
        notices=tuple(notices),
    )


def _is_ours(name: str) -> bool:
    """Whether the flag is one of the configs'; raises UsageError for a misspelt or foreign one."""
    if name in _SWITCHES or (name in FLAGS and "." not in name) or re.match(r"fdl\.[^.]", name):
        return True
    start = "fdl_tag" if name.startswith("fdl_tag.") else name
    if start in _ELSEWHERE:
        raise UsageError(f"--{name} does not exist here; write {_ELSEWHERE[start]}")
    if name.startswith("fdl") or name.lower() in FLAGS:
        nearest = did_you_mean(name, FLAGS, prefix="--")
        raise UsageError(f"unknown flag --{name}{nearest or '; --help lists all'}")
    return False


def _next_word(words, name: str) -> str:
    text = next(words, None)
    if text is None or text.startswith("--"):
        raise UsageError(f"--{name} needs a value: --{name}=...")
    return text


def _with_flag_files(argv: Sequence[str]) -> list[str]:
    """absl's --flagfile=FILE may hold our flags too."""
    if not any(re.match(r"--?flagfile\b", word) for word in argv):
        return list(argv)
    from absl import flags

    try:
        return flags.FlagValues().read_flags_from_files(list(argv), force_gnu=True)
    except flags.Error as error:
        raise UsageError(f"--flagfile: {' '.join(str(error).split())}") from error


def _bare(text: str) -> str:
    return unquote(text.strip())


def _is_knob(name: str) -> bool:
    return re.fullmatch(r"[A-Z][A-Z0-9_]*", name) is not None
