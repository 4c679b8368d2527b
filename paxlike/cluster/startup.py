"""The start-up check: are the processes of a run alike, and do their devices reach each other?

Facts go through the coordination service, before any device is made; then each mesh axis takes a small sum. A process
that differs is named in one line, in all processes, which end with the same error.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import socket
import statistics
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from paxlike.cluster import failure, processes

MAX_CLOCK_SECONDS = 5.0
"""Difference of clocks that is still accepted."""
_ALIKE = {
    "python": "Python",
    "jax": "jax",
    "jaxlib": "jaxlib",
    "cuda": "the CUDA plug-in of jax",
    "paxlike": "paxlike",
    "XLA_FLAGS": "XLA_FLAGS",
    "config": "a config whose digest is",
}
_PACKAGES = ("jax", "jaxlib")
_CUDA = ("jax-cuda13-plugin", "jax-cuda12-plugin")
_SEE_SECONDS = 10.0  # a shared folder may show new files late
_BYTES = {"cpu": 1 << 18}  # a device's part of the sum; elsewhere more
_BYTES_OTHERS = 1 << 24


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found: a line to read, and the facts of every process."""

    line: str
    facts: tuple[dict[str, Any], ...]


def compare_processes(directory: Path, config: str) -> Report:
    """Compares the processes and their devices; `config` is the resolved one, `directory` the run's folder.

    Raises:
      ValueError: one line that names the process that differs; the same in all processes.
    """
    facts = _gather("start", {**_facts(), "config": _digest(config)})
    _check_alike(facts)
    _check_clocks([each["clock"] for each in facts])
    _check_folder(directory)
    devices = _gather("devices", _devices())  # from here on jax waits for the devices of all
    facts = [one | other for one, other in zip(facts, devices, strict=True)]
    _check_devices(facts)
    return Report(_summary(facts), tuple(facts))


def measure_axes(mesh: jax.sharding.Mesh, hosts: Sequence[str]) -> list[str]:
    """Sums over each axis of the mesh; a line for each with what it crosses and how fast it is.

    `hosts` are those of the processes, by number.

    Raises:
      ValueError: a sum is wrong; the same in all processes.
    """
    lines = []
    for axis, size in mesh.shape.items():
        if size > 1:
            rate = _sum_over(mesh, axis)
            lines.append(f"axis {axis} ({size}) crosses {_crosses(mesh, axis, hosts)}: {rate}")
    return lines


def odd_one_out(values: Sequence[Any], describe: Callable[[int], str], what: str) -> str | None:
    """One line about the first process whose value is not that of most; None where all are equal.

    Example:
        >>> odd_one_out(["a", "a", "b"], lambda n: f"process {n}", "Python")
        'process 2 has Python b, the other 2 have a'
        >>> odd_one_out(["a", "b"], lambda n: f"process {n}", "Python")
        'process 0 has Python a, process 1 has b'
    """
    counts = collections.Counter(values)
    if len(counts) == 1:
        return None
    (usual, number), *_ = counts.most_common()
    odd = next(rank for rank, value in enumerate(values) if value != usual)
    if number == 1 or number * 2 == len(values):
        first = values.index(usual)
        return f"{describe(first)} has {what} {usual}, {describe(odd)} has {values[odd]}"
    rest = len(values) - number
    others = f"the other {number}" if rest == 1 else f"{number} others"
    return f"{describe(odd)} has {what} {values[odd]}, {others} have {usual}"


def _gather(name: str, mine: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The facts of every process, by number: the one place where they are exchanged."""
    processes.share(f"{name}_now", None)  # so that clocks are read at the same moment
    texts = processes.share(f"{name}_facts", json.dumps({**mine, "clock": time.time()}))
    return [json.loads(text) for text in texts]


def _facts() -> dict[str, Any]:
    cuda = [f"{name} {_version(name)}" for name in _CUDA if _version(name)]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "cuda": ", ".join(cuda) or "not installed",
        "paxlike": f"{_version('paxlike') or 'uninstalled'}, sources {_sources()}",
        "XLA_FLAGS": repr(os.environ.get("XLA_FLAGS", "")),
        "memory_gib": round(memory / 2**30, 1),
    }


def _sources() -> str:
    """A digest of this package's files: the same commit may have been edited on one node."""
    folder = Path(__file__).resolve().parent.parent
    found = 0
    for path in sorted(folder.rglob("*.py")):
        found = zlib.crc32(
            path.read_bytes(), zlib.crc32(str(path.relative_to(folder)).encode(), found)
        )
    return f"{found:08x}"


def _devices() -> dict[str, Any]:
    local = jax.local_devices()
    return {"num_devices": len(local), "kind": local[0].device_kind}


def _check_alike(facts: Sequence[Mapping[str, Any]]) -> None:
    for key, what in _ALIKE.items():
        line = odd_one_out([each[key] for each in facts], lambda rank: _name(facts, rank), what)
        if line:
            raise ValueError(f"the processes differ: {line}")


def _check_clocks(clocks: Sequence[float]) -> None:
    usual = statistics.median(clocks)
    worst = max(range(len(clocks)), key=lambda rank: abs(clocks[rank] - usual))
    away = max(clocks) - min(clocks)
    if away > MAX_CLOCK_SECONDS:
        raise ValueError(
            f"the clock of process {worst} is {away:.1f} s away from the others': at most "
            f"{MAX_CLOCK_SECONDS:g} s are accepted; synchronise it (chrony, ntp)"
        )


def _check_devices(facts: Sequence[Mapping[str, Any]]) -> None:
    found = [f"{each['num_devices']} x {each['kind']}" for each in facts]
    line = odd_one_out(found, lambda rank: _name(facts, rank), "the devices")
    if line:
        raise ValueError(f"the processes differ: {line}")


def _check_folder(directory: Path) -> None:
    """Every process writes a file; every process must see what process 0 wrote, and process 0 all of them."""
    folder = failure.processes_folder(directory)
    token = processes.from_first("folder", secrets.token_hex(8))
    mine = folder / f"check_{token}_{processes.index():05d}"
    problem = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mine.write_text(token)
    except OSError as error:
        problem = f"cannot write in {folder}: {error.strerror or error}"
    processes.share("folder_written", None)
    wanted = range(processes.count()) if processes.is_first() else [0]
    paths = {rank: folder / f"check_{token}_{rank:05d}" for rank in wanted}
    problems = processes.share("folder_problem", json.dumps(problem))
    for rank, text in enumerate(problems):
        if json.loads(text):
            _remove(mine)
            raise ValueError(f"process {rank} {json.loads(text)}")
    deadline = time.monotonic() + _SEE_SECONDS
    unseen = list(paths)
    while unseen and time.monotonic() < deadline:
        unseen = [rank for rank in unseen if not paths[rank].exists()]
        time.sleep(0.0 if not unseen else 0.1)
    seen = [json.loads(text) for text in processes.share("folder_seen", json.dumps(unseen))]
    _remove(mine)
    blind = [rank for rank, each in enumerate(seen) if each and rank] or seen[0]
    if blind:
        raise ValueError(
            f"{directory} is not the same folder in {processes.name_processes(blind)} as in process 0: "
            "job_log_dir must be on a file system that all nodes share"
        )


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # it was never there
        path.unlink()


def _sum_over(mesh: jax.sharding.Mesh, axis: str) -> str:
    """Sums what is different on each device; returns the rate in words."""
    everything = PartitionSpec(mesh.axis_names)
    platform_name = mesh.devices.flat[0].platform
    width = _BYTES.get(platform_name, _BYTES_OTHERS) // 4
    number = mesh.devices.size
    shape = (number, width)

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # jax's types allow None, no sharding gives it
        rows = np.arange(number, dtype=np.float32)[index[0]]
        return np.repeat(rows[:, None], width, axis=1)

    place = NamedSharding(mesh, everything)
    values = jax.make_array_from_callback(shape, place, part)
    summed = jax.jit(
        jax.shard_map(
            lambda x: jax.lax.psum(x, axis),
            mesh=mesh,
            in_specs=everything,
            out_specs=everything,
            check_vma=False,
        )
    )
    found = jax.block_until_ready(summed(values))
    times = []
    for _ in range(3):
        began = time.perf_counter()
        jax.block_until_ready(summed(values))
        times.append(time.perf_counter() - began)
    position = mesh.axis_names.index(axis)
    numbers = np.arange(number, dtype=np.float32).reshape(mesh.devices.shape)
    expected = np.broadcast_to(numbers.sum(axis=position, keepdims=True), numbers.shape).reshape(-1)
    wrong = [
        shard.device.id
        for shard in found.addressable_shards
        if not (np.asarray(shard.data) == expected[shard.index[0]][:, None]).all()
    ]
    everyone = [json.loads(t) for t in processes.share(f"sum_{axis}", json.dumps(wrong))]
    for rank, devices in enumerate(everyone):
        if devices:
            raise ValueError(
                f"a sum over the mesh axis {axis} is wrong on device {devices[0]} of process {rank}: the devices or "
                "the network between them are at fault"
            )
    seconds = max(statistics.median(times), 1e-9)
    return f"sum right, {width * 4 / seconds / 1e9:.3g} GB/s of {_mebibytes(width * 4)} a device"


def _crosses(mesh: jax.sharding.Mesh, axis: str, hosts: Sequence[str]) -> str:
    """The widest border between devices along an axis."""
    position = mesh.axis_names.index(axis)
    lines = np.moveaxis(mesh.devices, position, 0).reshape(mesh.devices.shape[position], -1).T
    owners = [{device.process_index for device in line} for line in lines]
    if any(len({hosts[owner] for owner in each}) > 1 for each in owners):
        return "nodes"
    return "processes" if any(len(each) > 1 for each in owners) else "devices of a process"


def _summary(facts: Sequence[Mapping[str, Any]]) -> str:
    nodes = len({each["host"] for each in facts})
    first, memories = facts[0], [each["memory_gib"] for each in facts]
    line = (
        f"{nodes} node{'s' * (nodes > 1)}, {len(facts)} process{'es' * (len(facts) > 1)}, "
        f"{first['num_devices']} x {first['kind']} each; jax {first['jax']}, Python {first['python']}"
    )
    if min(memories) < 0.75 * max(memories):
        line += f"; host memory differs, {min(memories):g} to {max(memories):g} GiB"
    return line


def _name(facts: Sequence[Mapping[str, Any]], rank: int) -> str:
    return f"process {rank} (host {facts[rank]['host']}, pid {facts[rank]['pid']})"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _mebibytes(number: int) -> str:
    return f"{number / 2**20:g} MiB"
