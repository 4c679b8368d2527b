"""argparse for the commands beside main.py: what is wrong with a command line is one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from paxlike.nearest import did_you_mean


class ArgumentParser(argparse.ArgumentParser):
    """Flags in full only; an error is `error: ...` on one line, without the usage, and exit status 2."""

    def __init__(self, **keywords: Any):
        super().__init__(**{"allow_abbrev": False} | keywords)

    def error(self, message: str) -> NoReturn:
        """Ends the process."""
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's, with the nearest right name beside an unknown flag."""
        flags, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self.unknown(unknown[0]))
        return flags

    def unknown(self, word: str) -> str:
        """The line for an argument that this command does not have."""
        options = [name for action in self._actions for name in action.option_strings]
        near = did_you_mean(word.partition("=")[0], [name for name in options if len(name) > 2])
        return f"unknown argument {word!r}{near or '; --help lists all'}"
