"""Progress of long data jobs: a bar on a terminal, else a plain line every few seconds."""

import sys
import time
from typing import TextIO

import tqdm


class Progress:
    """Counts `unit`s of a job called `name`; `total` may be unknown.

    On a terminal it is a tqdm bar. Elsewhere (a log file, a batch job) it writes one line every
    `seconds` seconds and one at the end, so that a log stays short and a watcher sees life.
    """

    def __init__(
        self,
        name: str,
        *,
        unit: str,
        total: int | None = None,
        file: TextIO | None = None,
        seconds: float = 5.0,
    ):
        self._file = file or sys.stderr
        self._name, self._unit, self._total, self._seconds = name, unit, total, seconds
        self._start = self._shown = time.monotonic()
        self._count = 0
        self._note = ""
        self._bar = None
        if self._file.isatty():
            self._bar = tqdm.tqdm(
                desc=name, unit=f" {unit}", unit_scale=True, total=total, file=self._file
            )

    def set(self, count: int, note: str = "") -> None:
        """Shows that `count` units are done by now."""
        step, self._count, self._note = count - self._count, count, note
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(step)
        elif time.monotonic() - self._shown >= self._seconds:
            self._shown = time.monotonic()
            self._print()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        else:
            self._print(end=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _print(self, *, end: bool = False) -> None:
        seconds = max(time.monotonic() - self._start, 1e-9)
        parts = [f"{self._count:,}{f' of {self._total:,}' if self._total else ''} {self._unit}"]
        parts.append(f"{self._count / seconds:,.0f} {self._unit}/s")
        if self._note:
            parts.append(self._note)
        if self._total and self._count and not end:
            left = seconds * max(self._total - self._count, 0) / self._count
            parts.append(f"about {left:,.0f} s left")
        if end:
            parts.append(f"took {seconds:,.1f} s")
        print(f"{self._name}: {', '.join(parts)}", file=self._file, flush=True)
