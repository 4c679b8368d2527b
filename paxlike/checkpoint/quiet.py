"""Nothing but our own line about a save that fails.

Orbax writes with tasks of `asyncio`. Where one fails (a full disk), the others are left alone: asyncio logs a traceback
for each that nobody waits for, and TensorStore prints one for each that ends after its event loop was closed. How many
there are is a matter of timing. The cause is raised by the checkpointer.
"""

from __future__ import annotations

import logging
import sys
import traceback
from types import TracebackType

_LIBRARIES = ("orbax", "tensorstore")


def quiet_orbax() -> None:
    """Drops the log lines of Orbax and what its abandoned tasks print; everything else is shown as before."""
    for name in ("absl", "asyncio"):
        logger = logging.getLogger(name)
        if not any(isinstance(each, _NotOrbax) for each in logger.filters):
            logger.addFilter(_NotOrbax())
    if not isinstance(sys.unraisablehook, _Hook):
        sys.unraisablehook = _Hook(sys.unraisablehook)


class _NotOrbax(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        trace = record.exc_info[2] if record.exc_info else None
        places = [record.pathname, *_files(trace)]
        if record.name == "asyncio":  # tells in its message where the task was defined
            places.append(record.getMessage())
        return not any(library in place for place in places for library in _LIBRARIES)


class _Hook:
    """Shows an exception that no caller can get, but for those of a closed event loop."""

    def __init__(self, show):
        self._show = show

    def __call__(self, args) -> None:
        late = args.exc_type is RuntimeError and str(args.exc_value) == "Event loop is closed"
        files = _files(args.exc_traceback)
        # From C++, without an object: a caller in Python would be among the frames.
        if late and args.object is None and all("asyncio" in file for file in files):
            return
        self._show(args)


def _files(trace: TracebackType | None) -> list[str]:
    return [frame.filename for frame in traceback.extract_tb(trace)]
