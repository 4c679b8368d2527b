"""Agreement between the processes of a run, over the coordination service of `jax.distributed`.

It never touches the accelerators: a decision (save now? stop now?) waits for the Python of the
other hosts, not for the steps queued on the devices. About a millisecond on one machine. It works
from `jax.distributed.initialize` on, before any device is made.
"""

from __future__ import annotations

import collections
import itertools
from typing import Any

import jax
from jax._src import distributed  # The client has no public name.

_rounds: dict[str, itertools.count] = collections.defaultdict(itertools.count)


def index() -> int:
    """The number of this process, from 0."""
    return distributed.global_state.process_id


def count() -> int:
    """How many processes the run has."""
    return distributed.global_state.num_processes


def alone() -> bool:
    """Whether this process is the only one of the run."""
    return count() == 1


def is_first() -> bool:
    """Whether this is process 0, which alone changes files that all share."""
    return index() == 0


def client() -> Any:
    """The client of the coordination service: keys and values that all processes see."""
    return distributed.global_state.client


def coordinator() -> str | None:
    """`host:port` of the coordination service, which process 0 runs; None in a run of one process."""
    return distributed.global_state.coordinator_address


def share(name: str, value: str | None, *, timeout_seconds: float = 600) -> list[str]:
    """What the processes offer under `name`, by process number; the same list on every process.

    Every process must call it, equally often; None offers nothing. Raises `TimeoutError`, which
    names them, when some do not come.
    """
    if alone():
        return [] if value is None else [value]
    number = next(_rounds[name])
    folder = f"paxlike/{name}/{number:012d}"
    # A letter before the value: who offers nothing has come, too.
    offer = "-" if value is None else f"={value}"
    client().key_value_set(f"{folder}/{index():06d}", offer)
    try:
        client().wait_at_barrier(f"paxlike/{name}", int(timeout_seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        came = {int(key.rsplit("/", 1)[1]) for key, _ in client().key_value_dir_get(folder)}
        missing = sorted(set(range(count())) - came)
        raise TimeoutError(
            f"process {index()} waited {timeout_seconds:g} s for the others at {name!r}; "
            f"missing: {name_processes(missing)}: {str(error).splitlines()[0]}"
        ) from error
    offered = [text[1:] for _, text in sorted(client().key_value_dir_get(folder)) if text[0] == "="]
    if is_first() and number:
        # Whoever passed this barrier has read the round before.
        client().key_value_delete(f"paxlike/{name}/{number - 1:012d}")
    return offered


def from_first(name: str, value: str, *, timeout_seconds: float = 600) -> str:
    """The `value` of process 0, on every process."""
    mine = value if is_first() else None
    return share(name, mine, timeout_seconds=timeout_seconds)[0]


def name_processes(numbers: list[int], *, most: int = 8) -> str:
    """Numbers of processes in words.

    Example:
        >>> name_processes([3]), name_processes([0, 2]), name_processes([])
        ('process 3', 'processes 0, 2', 'none')
    """
    if not numbers:
        return "none"
    shown = ", ".join(map(str, numbers[:most]))
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return f"process{'es' if len(numbers) > 1 else ''} {shown}{more}"
