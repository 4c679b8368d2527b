"""What a compiled program sends between devices, read from its text."""

import collections
import dataclasses
import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_LINE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\((.*)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One of a program.

    Attributes:
      kind: one of `KINDS`.
      sizes: elements of each of its results on a device.
      name: of the operation that it was made for, a path of functions; empty where it has none.
      in_loop: whether it is in the body of a loop.
    """

    kind: str
    sizes: tuple[int, ...]
    name: str
    in_loop: bool

    @property
    def size(self) -> int:
        """Elements of its largest result."""
        return max(self.sizes)


def collectives(compiled) -> dict[str, list[Collective]]:
    """kind -> all of that kind in a compiled program, those of a loop once; [] for a kind that is not there."""
    text = compiled.as_text()
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    found, current = collections.defaultdict(list), ""
    for line in text.splitlines():
        if match := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            current = match.group(1)
        if match := _LINE.search(line):
            shapes, kind, rest = match.groups()
            sizes = re.findall(r"\w+\[([\d,]*)\]", shapes)
            name = re.search(r'op_name="([^"]*)"', rest)
            found[kind].append(
                Collective(
                    kind,
                    tuple(math.prod(int(n) for n in dims.split(",") if n) for dims in sizes),
                    name.group(1) if name else "",
                    current in bodies,
                )
            )
    return found
