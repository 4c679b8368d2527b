"""Which operating system process a rank is, and how it is, seen from a rank beside it.

Ranks that share a machine see each other's death at once, in `/proc`; others only by silence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import time
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Identity:
    """One process.

    Attributes:
      host: name of the machine.
      space: the namespace in which `pid` counts: containers of one machine have their own.
      pid: number of the process.
      started: clock ticks between the start of the machine and that of the process; tells it from a later process of
        the same number.
    """

    host: str
    space: str
    pid: int
    started: int

    @classmethod
    def here(cls) -> Identity:
        """That of this process."""
        found = _stat(os.getpid())
        return cls(socket.gethostname(), _space(), os.getpid(), found[1] if found else 0)

    @classmethod
    def of_json(cls, text: str) -> Identity:
        """What `json` wrote."""
        return cls(**json.loads(text))

    def json(self) -> str:
        """To send to other processes."""
        return json.dumps(dataclasses.asdict(self))

    def __str__(self) -> str:
        return f"host {self.host}, pid {self.pid}"

    @property
    def is_beside(self) -> bool:
        """Whether it runs where this process can see it."""
        return (self.host, self.space) == (socket.gethostname(), _space()) and self.started > 0

    def state(self) -> str:
        """`running`, `stopped` (SIGSTOP, a debugger) or `gone`; only for one `is_beside`."""
        found = _stat(self.pid)
        if found is None or found[1] != self.started or found[0] in "ZXx":
            return "gone"
        return "stopped" if found[0] in "Tt" else "running"

    def kill(self) -> None:
        """Ends it, if it is still there."""
        if self.is_beside and self.state() != "gone":
            with contextlib.suppress(OSError):  # gone by now, or another user's
                os.kill(self.pid, signal.SIGKILL)


def process_start_time() -> float:
    """Unix seconds at which this process was started; now, where the system does not tell."""
    found = _stat(os.getpid())
    if found is None:
        return time.time()
    try:
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - (uptime - found[1] / os.sysconf("SC_CLK_TCK"))
    except OSError:
        return time.time()


def _space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _stat(pid: int) -> tuple[str, int] | None:
    """(state, start) of a process from `/proc/PID/stat`; None where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()  # a name may hold spaces and brackets
    return fields[0], int(fields[19])
