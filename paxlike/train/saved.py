"""What of a run is in a checkpoint: the trained part of the state, and the position in the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paxlike.train.optimizer import merge
from paxlike.train.state import TrainState

if TYPE_CHECKING:
    from paxlike.experiment import Experiment


def saves_trained_only(experiment: Experiment) -> bool:
    """Whether frozen weights stay where they were read, and checkpoints hold the trained part alone."""
    return experiment.optimizer.trainable is not None and experiment.initial_weights is not None


def saved_part(experiment: Experiment, state: TrainState) -> TrainState:
    """What of the state, or of its abstract form, is in a checkpoint."""
    if not saves_trained_only(experiment):
        return state
    return dataclasses.replace(state, params=experiment.optimizer.select(state.params))


def with_frozen(experiment: Experiment, abstract: TrainState, state: TrainState) -> TrainState:
    """The state of a checkpoint with the frozen weights that it does not hold."""
    if not saves_trained_only(experiment):
        return state
    whole = experiment.read_initial_params(abstract.params, abstract.params)
    return dataclasses.replace(state, params=merge(state.params, whole))


def data_position(experiment: Experiment, directory: Path, saved: Mapping[str, Any]) -> int:
    """Number of the row to go on with; ValueError where the data is not what the checkpoint was made with."""
    here = experiment.train_data.fingerprint()
    changed = [name for name in here if here[name] != saved["fingerprint"].get(name)]
    if changed:
        name = changed[0]
        raise ValueError(
            f"the training data is not that of the checkpoint in {directory}: {name} was "
            f"{saved['fingerprint'].get(name)} and is {here[name]}; go on with the same data, or start another "
            f"job_log_dir from these weights with CHECKPOINT_RESTORE_PATH={directory}"
        )
    return saved["rows"]
