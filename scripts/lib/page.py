"""Tables that a script makes and a page of the docs shows, between two comments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

END = "<!-- end -->"


def renew(page: Path, script: str, tables: Mapping[str, str], *, check: bool) -> int:
    """Puts each table (name -> Markdown) behind its comment in `page`; with `check` it changes nothing.

    Returns 1 where it only checked and the page has other tables, else 0.
    """
    old = text = page.read_text()
    for name, table in tables.items():
        begin = f"<!-- {name}: made by scripts/{script} -->\n"
        before, rest = text.split(begin)
        text = f"{before}{begin}{table}\n{rest[rest.index(END) :]}"
    if check:
        return int(text != old)
    page.write_text(text)
    return 0
