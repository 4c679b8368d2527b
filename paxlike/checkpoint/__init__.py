"""Checkpoints of a run: atomic, asynchronous, checked, readable on any mesh and process count."""

from paxlike.checkpoint.arrays import named_leaves, nested, with_leaves
from paxlike.checkpoint.checkpointer import Checkpointer, Restored
from paxlike.checkpoint.follow import (
    clear_finished,
    finished_step,
    mark_finished,
    wait_for_new_checkpoint,
)
from paxlike.checkpoint.options import CheckpointOptions
from paxlike.checkpoint.reading import ModelMismatch
from paxlike.checkpoint.termination import EXIT_PREEMPTED, TerminationSignal
from paxlike.checkpoint.weights import (
    Use,
    Weights,
    read_metadata,
    restore_params,
    restore_variables,
)

__all__ = [
    "EXIT_PREEMPTED",
    "CheckpointOptions",
    "Checkpointer",
    "ModelMismatch",
    "Restored",
    "TerminationSignal",
    "Use",
    "Weights",
    "clear_finished",
    "finished_step",
    "mark_finished",
    "named_leaves",
    "nested",
    "read_metadata",
    "restore_params",
    "restore_variables",
    "wait_for_new_checkpoint",
    "with_leaves",
]
