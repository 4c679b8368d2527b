"""The processes of a run: agreement, start-up check, watch over each other, time limits."""

from paxlike.cluster.failure import EXIT_HUNG, EXIT_LOST
from paxlike.cluster.job import ClusterOptions, Deadline, Job
from paxlike.cluster.watchdog import HangOptions, Watchdog

__all__ = [
    "EXIT_HUNG",
    "EXIT_LOST",
    "ClusterOptions",
    "Deadline",
    "HangOptions",
    "Job",
    "Watchdog",
]
