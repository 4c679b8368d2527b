"""Devices that are not there: what the compiler is given in place of a machine.

XLA compiles for a description of a chip; the devices that jax makes of it have numbers and nodes, but no memory, so
nothing can be put on them. For NVIDIA GPUs the compiler is that of jax's CUDA plugin, for TPUs that of libtpu; virtual
devices of the CPU are real ones and need neither.
"""

from __future__ import annotations

import importlib.metadata
import math
import warnings
from collections.abc import MutableMapping, Sequence

import jax
from jax.experimental import topologies

from paxlike import parallel
from paxlike.plan.chips import Chip

_PLUGINS = {
    "cuda": ("jax-cuda13-plugin", "jax-cuda12-plugin"),
    "tpu": ("libtpu",),
}
# As scripts/lib/launch.sh sets them for runs; autotuning needs the device.
_GPU_FLAGS = (
    "--xla_gpu_autotune_level=0",
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    "--xla_gpu_enable_triton_gemm=false",
)


def prepare_environment(chip: Chip, environ: MutableMapping[str, str]) -> None:
    """Sets what the compiler for the chip reads from the environment, before jax uses any device.

    jax's own platform must be the CPU (`jax_platforms`): plug-ins look for their devices otherwise. Raises ValueError
    in one line where the compiler is not installed.
    """
    check_compiler(chip)
    if chip.platform == "cuda":
        given = environ.get("XLA_FLAGS", "")
        names = {flag.partition("=")[0] for flag in given.split()}
        added = [flag for flag in _GPU_FLAGS if flag.partition("=")[0] not in names]
        environ["XLA_FLAGS"] = " ".join([*added, given]).strip()
    if chip.platform == "tpu":
        environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        environ.setdefault(
            "TPU_WORKER_HOSTNAMES", "localhost"
        )  # or libtpu looks for them, and complains
        environ.setdefault("TPU_ACCELERATOR_TYPE", chip.name)


def check_compiler(chip: Chip) -> None:
    """Raises ValueError, in one line that says what to install, where the compiler for the chip is missing."""
    names = _PLUGINS.get(chip.platform)
    if names is None:
        return
    version = importlib.metadata.version("jax")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if chip.platform == "tpu":
        if not found:
            raise ValueError(
                f'--chip={chip.name} needs libtpu: pip install "jax[tpu]=={version}", or plan with --chip=cpu, whose '
                "temporary memory is not to be trusted"
            )
        return
    if version not in found.values():
        there = "; ".join(f"{name} {its} is there" for name, its in found.items())
        raise ValueError(
            f"--chip={chip.name} needs the compiler of jax's CUDA plugin{f' ({there})' if there else ''}: pip install "
            f"jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version}, or plan with --chip=cpu, whose temporary memory "
            "is not to be trusted"
        )


def devices_per_node(mesh: parallel.Mesh, chip: Chip) -> int:
    """Devices that share fast links: of the mesh's shape inside a node what fits into one of the chip's nodes."""
    inside = math.prod(mesh.ici) if math.prod(mesh.dcn) > 1 else mesh.num_devices
    return max(n for n in range(1, min(inside, chip.per_node) + 1) if inside % n == 0)


def make_devices(mesh: parallel.Mesh, chip: Chip) -> list[jax.Device]:
    """As many devices of the chip as the mesh takes, in nodes as a run has them.

    Raises ValueError where the compiler knows no such group of devices.
    """
    count = mesh.num_devices
    if chip.platform == "cpu":
        if jax.device_count() != count:
            raise ValueError(
                f"the mesh takes {count} devices and jax was started with {jax.device_count()} virtual ones: set "
                f"JAX_NUM_CPU_DEVICES={count}"
            )
        return jax.devices()
    if chip.platform == "cuda":
        per_node = devices_per_node(mesh, chip)
        described = topologies.get_topology_desc(
            chip.name,
            platform="cuda",
            target_config=chip.target,
            topology=f"{count // per_node}x1x{per_node}",
        )
        return list(described.devices)
    names = dict(chip.topologies)
    if count not in names:
        raise ValueError(
            f"--chip={chip.name} is planned in slices of {', '.join(map(str, names))} chips, and the mesh takes {count}"
        )
    if math.prod(mesh.dcn) > 1:
        raise ValueError(
            f"DCN_MESH_SHAPE={list(mesh.dcn)}: a plan for {chip.name} is of one slice; put the whole mesh into "
            "ICI_MESH_SHAPE"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(topologies.get_topology_desc(names[count], platform="tpu").devices)


def node_numbers(devices: Sequence[jax.Device], mesh: parallel.Mesh, chip: Chip) -> list[int]:
    """The node of each device, in the order given (`mesh.devices.flat`)."""
    per_node = devices_per_node(mesh, chip)
    ranks = {number: rank for rank, number in enumerate(sorted(device.id for device in devices))}
    return [ranks[device.id] // per_node for device in devices]
