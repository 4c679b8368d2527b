"""Agreement between the processes of a run, over the coordination service of `jax.distributed`.

It never touches the accelerators: a decision (save now? stop now?) waits for the Python of the
other hosts, not for the steps queued on the devices. About a millisecond on one machine.
"""

from __future__ import annotations

import collections
import itertools

import jax
from jax._src import distributed  # The client has no public name.

_rounds: dict[str, itertools.count] = collections.defaultdict(itertools.count)


def share(name: str, value: str | None, *, timeout_seconds: float = 600) -> list[str]:
    """What the processes offer under `name`, by process number; the same list on every process.

    Every process must call it, equally often; None offers nothing. Raises `TimeoutError` when one
    does not come.
    """
    if jax.process_count() == 1:
        return [] if value is None else [value]
    client = distributed.global_state.client
    number = next(_rounds[name])
    folder = f"paxlike/{name}/{number:012d}"
    if value is not None:
        client.key_value_set(f"{folder}/{jax.process_index():06d}", value)
    try:
        client.wait_at_barrier(f"paxlike/{name}", int(timeout_seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        line = str(error).splitlines()[0]
        raise TimeoutError(
            f"process {jax.process_index()} waited {timeout_seconds:g} s for the others "
            f"at {name!r}: {line}"
        ) from error
    offered = [text for _, text in sorted(client.key_value_dir_get(folder))]
    if jax.process_index() == 0 and number:
        # Whoever passed this barrier has read the round before.
        client.key_value_delete(f"paxlike/{name}/{number - 1:012d}")
    return offered


def from_first(name: str, value: str, *, timeout_seconds: float = 600) -> str:
    """The `value` of process 0, on every process."""
    mine = value if jax.process_index() == 0 else None
    return share(name, mine, timeout_seconds=timeout_seconds)[0]


def alone() -> bool:
    """Whether this process is the only one of the run."""
    return jax.process_count() == 1


def is_first() -> bool:
    """Whether this is process 0, which alone changes files that all share."""
    return jax.process_index() == 0
