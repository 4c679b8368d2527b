"""Writes the tables of docs/attention.md: which kernel of attention serves what, and which one `auto` takes where.

    python scripts/attention_table.py          # renews docs/attention.md
    python scripts/attention_table.py --check  # ends with 1 where it is not up to date

Asks the kernels themselves (`paxlike.ops.attention_kernels`); nothing runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from paxlike.arguments import ArgumentParser  # noqa: E402
from paxlike.ops import attention_kernels as kernels  # noqa: E402
from paxlike.ops import platform  # noqa: E402
from paxlike.ops.scores import Scores  # noqa: E402
from scripts.lib import page  # noqa: E402

PAGE = ROOT / "docs" / "attention.md"
HARDWARE = {
    "H100": platform.Hardware("cuda", 9.0),
    "A100": platform.Hardware("cuda", 8.0),
    "TPU": platform.Hardware("tpu"),
    "CPU": platform.Hardware("cpu"),
}
WANTED: dict[str, dict[str, Any]] = {
    "causal": {},
    "not causal": {"causal": False},
    "packed rows (segments)": {"segments": True},
    "sliding window": {"window": 1024},
    "cap of the scores": {"logit_cap": 50.0},
    "grouped heads": {"kv_heads": 2},
    "heads of 256": {"head_dim": 256},
    "heads of 80": {"head_dim": 80},
    "float32": {"dtype": "float32"},
    "a cache (decoding)": {"cache": True, "length": 1},
}


def request(length: int, changes: dict[str, Any]) -> kernels.Request:
    """Of a row of this length, bfloat16, 8 heads of 128, with changes."""
    given: dict[str, Any] = {"rows": 1, "length": length, "keys": length, "heads": 8, "kv_heads": 8}
    given |= {"head_dim": 128, "dtype": "bfloat16", "causal": True, **changes}
    scores = Scores(
        given["head_dim"] ** -0.5, given.pop("window", None), given.pop("logit_cap", None)
    )
    return kernels.Request(**given, scores=scores)


def tables() -> dict[str, str]:
    """Markdown of each table, by its name."""
    able, taken = [], []
    for label, changes in WANTED.items():
        cells = []
        for kernel in kernels.KERNELS:
            with platform.traced_for(HARDWARE["H100"]):
                cells.append("no" if kernel.lacks(request(8192, changes)) else "yes")
        able.append([label, *cells])
        cells = []
        for hardware in HARDWARE.values():
            with platform.traced_for(hardware):
                short, long = (
                    kernels.choose(request(length, changes)).kernel.title for length in (2048, 8192)
                )
            cells.append(short if short == long else f"{short}; long rows: {long}")
        taken.append([label, *cells])
    titles = [f"`{kernel.name}`" for kernel in kernels.KERNELS]
    return {
        "kernels": _markdown(["", *titles], able),
        "choice": _markdown(["", *HARDWARE], taken),
    }


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args()
    return page.renew(PAGE, "attention_table.py", tables(), check=options.check)


if __name__ == "__main__":
    sys.exit(main())
