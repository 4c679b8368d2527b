"""Shows that something is going on: one line that changes on a terminal, plain lines elsewhere.

In a batch system the output is a file that people follow: there a line appears every few seconds,
and always for the first and the last step, so that a hanging run and a finished one look different.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TextIO, TypeVar

T = TypeVar("T")

_TERMINAL_INTERVAL_SECONDS = 0.1
_BUSY_LINE_SECONDS = 30.0


class Progress:
    """Counts to `total` and shows it; safe to call every step, printing only when a line is due."""

    def __init__(
        self,
        total: int | None,
        *,
        description: str = "train",
        unit: str = "step",
        interval_seconds: float = 5.0,
        stream: TextIO | None = None,
        enabled: bool = True,
    ):
        """Shows nothing yet.

        Args:
            total: the count that means complete; None where nobody knows.
            description: the first word of the line.
            unit: what is counted, singular.
            interval_seconds: between two plain lines where `stream` is no terminal.
            stream: standard error when None.
            enabled: when False only `eta_seconds` works, and nothing is printed.
        """
        self._total, self._description, self._unit = total, description, unit
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = bool(getattr(self._stream, "isatty", lambda: False)())
        self._interval = _TERMINAL_INTERVAL_SECONDS if self._is_terminal else interval_seconds
        self._enabled = enabled
        self._lock = threading.RLock()
        self._first: tuple[float, int] | None = None  # time and count of the first update
        self._latest: tuple[float, int] | None = None
        self._shown_at: float | None = None
        self._shown = ""  # the line that a terminal shows now
        self._unseen: tuple[int, str] | None = None  # the last update, when it was not shown

    def due(self, done: int) -> bool:
        """Whether `update(done)` would print: ask before computing something costly to show."""
        if not self._enabled:
            return False
        if self._shown_at is None or done == self._total:
            return True
        return time.monotonic() - self._shown_at >= self._interval

    def update(self, done: int, detail: str = "") -> None:
        """`done` of `total` are complete; `detail` goes beside the count."""
        now = time.monotonic()
        is_due = self.due(done)
        self._latest = (now, done)
        self._first = self._first or self._latest
        self._unseen = None if is_due else (done, detail)
        if is_due:
            self._show(self._line(done, detail))
            self._shown_at = now

    def eta_seconds(self) -> float | None:
        """Seconds to go at the mean pace since the first update; None before there is a pace."""
        if self._total is None or self._first is None or self._latest is None:
            return None
        (start, first), (now, done) = self._first, self._latest
        if done >= self._total:
            return 0.0
        return (now - start) / (done - first) * (self._total - done) if done > first else None

    @contextlib.contextmanager
    def busy(self, message: str) -> Iterator[None]:
        """Says `message` and the time while the block runs, and afterwards how long it took."""
        start, is_over = time.monotonic(), threading.Event()
        self._show(f"{message} ...")

        def tick() -> None:
            while not is_over.wait(1.0 if self._is_terminal else _BUSY_LINE_SECONDS):
                self._show(f"{message} ... {duration(time.monotonic() - start)}")

        ticker = threading.Thread(target=tick, daemon=True, name="progress")
        ticker.start()
        try:
            yield
        finally:
            is_over.set()
            ticker.join()
            self._clear()
        self.write(f"{message}: {duration(time.monotonic() - start)}")

    def write(self, line: str) -> None:
        """Prints a line that stays, above the one that changes."""
        with self._lock:
            shown = self._shown
            self._clear()
            self._print(line + "\n")
            if shown:
                self._show(shown)

    def close(self) -> None:
        """Shows the last update if it was not shown, and leaves the cursor on a fresh line."""
        if self._unseen:
            self._show(self._line(*self._unseen))
            self._unseen = None
        if self._shown:
            self._print("\n")
            self._shown = ""

    def _line(self, done: int, detail: str) -> str:
        parts = [f"{self._description}: {self._unit} {done:,}"]
        if self._total is not None:
            parts[0] += f"/{self._total:,} ({done / max(self._total, 1):.0%})"
        parts += [detail] if detail else []
        eta = self.eta_seconds()
        if eta:
            parts.append(f"{duration(eta)} left")
        elif self._first and done != self._first[1] and done == self._total:
            parts.append(f"took {duration(time.monotonic() - self._first[0])}")
        return " | ".join(parts)

    def _show(self, text: str) -> None:
        with self._lock:
            if not self._is_terminal:
                self._print(text + "\n")
                return
            width = shutil.get_terminal_size().columns - 1
            self._print(f"\r\x1b[K{text[:width]}")
            self._shown = text

    def _clear(self) -> None:
        with self._lock:
            if self._shown:
                self._print("\r\x1b[K")
                self._shown = ""

    def _print(self, text: str) -> None:
        if not self._enabled:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # the terminal is gone; the run need not go with it
            self._enabled = False


def progress_lines(
    iterable: Iterable[T],
    description: str,
    total: int | None = None,
    *,
    unit: str = "item",
    stream: TextIO | None = None,
    enabled: bool = True,
) -> Iterator[T]:
    """Yields from `iterable` and shows how far it is; `total` is its length unless given."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    progress = Progress(total, description=description, unit=unit, stream=stream, enabled=enabled)
    done = 0
    progress.update(0)
    try:
        for done, item in enumerate(iterable, start=1):
            yield item
            progress.update(done)
    finally:
        progress.close()


def duration(seconds: float) -> str:
    """Seconds in words of one glance.

    Example:
        >>> [duration(x) for x in (4.26, 200, 3900, 183000)]
        ['4.3s', '3m20s', '1h05m', '2d02h']
    """
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def quantity(number: float) -> str:
    """A number with three digits and k, M, G or T.

    Example:
        >>> [quantity(x) for x in (7, 45210, 1.3e6)]
        ['7.00', '45.2k', '1.30M']
    """
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, "")):
        # Half a unit in the third digit, so that 999,700 is 1.00M and not 1000k.
        if abs(number) >= factor * 0.9995:
            return f"{number / factor:#.3g}".rstrip(".") + letter  # zeros kept: no flicker
    return f"{number:.3g}"
