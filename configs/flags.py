"""The command line of the configs, in front of absl's.

    --fdl_config=NAME          the config: configs.gpt.Pile126M, Pile126M, Pile126M(NUM_LAYERS=2)
    --fdl_config_file=FILE     or one that a run wrote (DIR/config.json)
    --fdl.KNOB=VALUE           upper case: a knob of the config
    --fdl.path.to.node=VALUE   lower case: a node of the tree that the knobs expand to
    --fiddler=NAME             a change from configs/fiddlers.py, `NAME` or `NAME(x=1)`; repeatable
    --fdl_help, --fdl_list     the knobs and the tree of a config; all configs

`split` takes these out of argv, `parse_absl` gives the rest to absl, `resolve` makes the tree. A
mistake is a UsageError: one line with what was given, what is wanted, and the nearest right name.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from configs.cli import resolve as _resolve
from configs.cli.environment import environment_knobs, job_end_time
from configs.cli.help import help_text, usage_text
from configs.cli.registry import find_config, list_configs
from configs.cli.request import FLAGS, Request, split
from configs.cli.resolve import Resolved
from configs.cli.tree import flat_text
from configs.cli.values import UsageError
from paxlike.nearest import ask, nearest

__all__ = [
    "Request",
    "Resolved",
    "UsageError",
    "environment_knobs",
    "find_config",
    "flat_text",
    "help_page",
    "help_text",
    "job_end_time",
    "list_configs",
    "parse_absl",
    "resolve",
    "split",
    "usage_text",
]


def resolve(request: Request | Sequence[str], environ: Mapping[str, str] = os.environ) -> Resolved:
    """The config that a request (or a whole argv) asks for, with everything decided.

    Raises UsageError before anything is built; `fdl.build(resolved.tree)` makes the experiment.
    """
    if not isinstance(request, Request):
        request, _ = split(request)
    return _resolve.resolve(request, environ)


def help_page(
    request: Request, environ: Mapping[str, str] = os.environ, *, color: bool = False
) -> str:
    """What --fdl_help prints: the config that the request names, or how to name one."""
    if request.help == "config" and (request.config or request.config_file):
        return help_text(resolve(request, environ), color=color)
    return usage_text(color=color)


def parse_absl(argv: Sequence[str], flag_values: Any = None) -> list[str]:
    """Lets absl parse what `split` left; its errors become a UsageError with the nearest flag.

    Returns the positional arguments, of which there may be none.
    """
    from absl import flags as absl_flags

    flag_values = absl_flags.FLAGS if flag_values is None else flag_values
    try:
        positional = flag_values(list(argv))
    except absl_flags.UnrecognizedFlagError as error:
        raise UsageError(_unknown_flag(error.flagname, flag_values)) from error
    except absl_flags.Error as error:
        text = " ".join(str(error).split())
        # absl shows the arguments of its own exception.
        text = re.sub(
            r"\('Non-boolean argument to boolean flag', '(.*)'\)",
            r"true or false wanted, got \1",
            text,
        )
        raise UsageError(text + _nearest_choice(error, flag_values)) from error
    if positional[1:]:
        raise UsageError(
            f"unexpected argument {positional[1]!r}; flags are written --name=value (see --help)"
        )
    return positional[1:]


def _unknown_flag(name: str, flag_values: Any) -> str:
    known = [*flag_values, *(ours for ours in FLAGS if "." not in ours)]
    if name.isupper():
        return f"unknown flag --{name}; a knob is written --fdl.{name}=VALUE"
    found = [f"--{flag}" for flag in nearest(name, known)]
    if "." in name:
        found = [f"--fdl.{name}"]
    return f"unknown flag --{name}{ask(found) or '; --help lists all'}"


def _nearest_choice(error: Exception, flag_values: Any) -> str:
    """`; did you mean train?` when absl refused a value of a flag with a list of choices."""
    for name in flag_values:
        choices = getattr(flag_values[name].parser, "enum_values", None)
        given = str(error).partition(f"flag --{name}=")[2].partition(":")[0]
        if choices and given:
            return ask(nearest(given, choices))
    return ""
