"""Workers: processes that hold a compiled step and take as many as they are told to, so that sides can take turns.

A line with a number comes in, a JSON object goes out. Only one worker runs at a time; the others sleep in `read`.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent


def serve(step: Callable[[], float], about: Mapping[str, Any]) -> None:
    """In a worker: takes the first step (compilation and warm-up), says so, then obeys."""
    started = time.perf_counter()
    first = step()
    _say(
        {"ready": True, "first_step_seconds": time.perf_counter() - started, "loss": first, **about}
    )
    for line in sys.stdin:
        wall, cpu, loss = [], [], 0.0
        step()  # warms up again: whoever's turn comes first finds its memory cold, and would pay for the others
        for _ in range(int(line)):
            before = time.perf_counter(), cpu_seconds()
            loss = step()
            wall.append(time.perf_counter() - before[0])
            cpu.append(cpu_seconds() - before[1])
        _say({"wall": wall, "cpu": cpu, "loss": loss})


def cpu_seconds() -> float:
    """CPU time of this process so far, all threads. Less disturbed by other programs than the clock on the wall."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Worker:
    """The parent's end of a worker."""

    def __init__(self, name: str, command: list[str], *, devices: int = 1, platform: str = "cpu"):
        self.name, self.started = name, time.perf_counter()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment(devices=devices, platform=platform),
        )
        self.about = self._answer()
        self.startup_seconds = time.perf_counter() - self.started
        self.rounds: list[dict[str, Any]] = []

    def run(self, steps: int) -> dict[str, Any]:
        """Takes `steps` steps; the answer is kept as a round."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        self.rounds.append(self._answer())
        return self.rounds[-1]

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _answer(self) -> dict[str, Any]:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(
            f"the worker '{self.name}' ended with status {self.process.wait()}; its report is above"
        )


def environment(*, devices: int = 1, platform: str = "cpu") -> dict[str, str]:
    """Variables of a measured process: malloc as our scripts set it, no compilation cache, nothing printed by XLA.

    Devices allocate from threads of their own. What an arena of a thread frees is mapped anew in the next step, and to
    clear those pages takes a tenth of a second or half of one in turns: several devices share one arena.
    """
    env = dict(os.environ)
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    env |= {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": platform}
    if platform == "cpu":
        shared = ":glibc.malloc.arena_max=1" if devices > 1 else ""
        env |= {"JAX_NUM_CPU_DEVICES": str(devices), "GLIBC_TUNABLES": _tunables() + shared}
    return env


@functools.cache
def _tunables() -> str:
    """GLIBC_TUNABLES of the launch scripts."""
    script = f"source {shlex.quote(str(ROOT / 'scripts/lib/malloc.sh'))}; echo $GLIBC_TUNABLES"
    env = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    return subprocess.run(
        ["bash", "-c", script], env=env, capture_output=True, text=True, check=True
    ).stdout.strip()


def _say(message: Mapping[str, Any]) -> None:
    print(json.dumps(message), flush=True)
