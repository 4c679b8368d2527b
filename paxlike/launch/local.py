"""The stages one after the other on this machine, without Slurm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from paxlike.launch.job import Job, Stage


def run(job: Job, stages: list[Stage]) -> int:
    """Runs the stages that are not done; returns the exit code of the first that fails, 83 for one that was stopped."""
    environment = dict(os.environ) | {"PYTHON": job.python}
    environment |= {name: value for name, value in job.environment.items() if value is not None}
    for stage in stages:
        print(f"{stage.name} ...", file=sys.stderr)
        status = _run(job.command(stage), environment)
        if status:
            print(
                f"{stage.name} ended with {status}; the same command goes on there", file=sys.stderr
            )
            return status
    return 0


def _run(words: list[str], environment: dict[str, str]) -> int:
    """The exit status of a command, to which SIGTERM and Ctrl-C are handed on."""
    before = {}
    # A group of its own: Ctrl-C in a terminal would reach it twice, and the second one ends a run at once.
    with subprocess.Popen(words, env=environment, start_new_session=True) as child:

        def hand_on(number, frame):
            child.send_signal(signal.SIGTERM)

        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, hand_on)
        try:
            status = child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return status if status >= 0 else 128 - status
