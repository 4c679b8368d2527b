"""What is known of each chip that a plan can be made for: the one table of memory, bandwidths and links.

Peak rates of matrix units are in `paxlike.log.throughput`. Sources: the makers' data sheets (H100 SXM5 80 GB, A100 SXM4
80 GB; Cloud TPU documentation). Rates are per device and in one direction.
"""

from __future__ import annotations

import dataclasses

from paxlike.log.throughput import peak_flops
from paxlike.nearest import did_you_mean

USABLE_MEMORY = 0.92  # share of a chip's memory that a program may take; the rest is the runtime's


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of device.

    Attributes:
      kind: what jax calls the device, by which the table of peak rates knows it.
      platform: `cuda`, `tpu` or `cpu`.
      memory_bytes: of one device, as the compiler is told.
      memory_bandwidth, link_bandwidth, network_bandwidth: bytes per second of one device: to its memory, to others of
        its node (of a torus: along one axis), across nodes.
      link_seconds, network_seconds: what a collective takes before the first byte has arrived.
      operation_seconds: what starting an operation takes.
      per_node: devices that the fast links join.
      target: description that the GPU compiler takes in place of a device.
      topologies: number of devices -> name of a TPU slice.
      peak: FLOP/s by compute type, where the table of peak rates has none.
    """

    name: str
    kind: str
    platform: str
    memory_bytes: int
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    link_seconds: float
    network_seconds: float
    operation_seconds: float
    per_node: int
    compute_capability: float = 0.0
    target: str = ""
    topologies: tuple[tuple[int, str], ...] = ()
    peak: tuple[tuple[str, float], ...] = ()

    def peak_flops(self, dtype: str) -> float:
        """Dense rate of the matrix unit in FLOP/s for operands of this type."""
        found = peak_flops(self.kind, dtype) or dict(self.peak).get(dtype)
        if found is None:  # a narrow type that the chip multiplies as another one
            found = peak_flops(self.kind, "float32") or dict(self.peak)["float32"]
        return found


_GPU_TARGET = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared} threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {cache} clock_rate_ghz: {clock} device_memory_size: {memory}
  shared_memory_per_block_optin: {optin} cuda_compute_capability {{ major: {major} minor: 0 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }} device_description_str: "{description}"
"""

_H100: dict[str, float] = {"shared": 233472, "optin": 232448, "cores": 132, "fpus": 128, "major": 9}
_H100 |= {"bandwidth": 3352320000000, "cache": 52428800, "clock": 1.98, "memory": 84942979072}
_A100: dict[str, float] = {"shared": 167936, "optin": 166912, "cores": 108, "fpus": 64, "major": 8}
_A100 |= {"bandwidth": 2039000000000, "cache": 41943040, "clock": 1.41, "memory": 84987740160}

_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")


def _slices(name: str, shapes: tuple[str, ...]) -> tuple[tuple[int, str], ...]:
    def count(shape: str) -> int:
        total = 1
        for size in shape.split("x"):
            total *= int(size)
        return total

    return tuple((count(shape), f"{name}:{shape}") for shape in shapes)


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            name="h100",
            kind="NVIDIA H100 80GB HBM3",
            platform="cuda",
            memory_bytes=int(_H100["memory"]),
            memory_bandwidth=3.35e12,
            link_bandwidth=450e9,  # NVLink 4: 900 GB/s in both directions
            network_bandwidth=50e9,  # one 400 Gb/s adapter for each GPU
            link_seconds=15e-6,
            network_seconds=40e-6,
            operation_seconds=3e-6,
            per_node=8,
            compute_capability=9.0,
            target=_GPU_TARGET.format(description="NVIDIA H100 80GB HBM3", **_H100),
        ),
        Chip(
            name="a100",
            kind="NVIDIA A100-SXM4-80GB",
            platform="cuda",
            memory_bytes=int(_A100["memory"]),
            memory_bandwidth=2.039e12,
            link_bandwidth=300e9,  # NVLink 3
            network_bandwidth=25e9,  # one 200 Gb/s adapter for each GPU
            link_seconds=15e-6,
            network_seconds=40e-6,
            operation_seconds=3e-6,
            per_node=8,
            compute_capability=8.0,
            target=_GPU_TARGET.format(description="NVIDIA A100-SXM4-80GB", **_A100),
        ),
        Chip(
            name="v5p",
            kind="TPU v5p",
            platform="tpu",
            memory_bytes=95 * 2**30,
            memory_bandwidth=2.765e12,
            link_bandwidth=180e9,  # two links of 90 GB/s along an axis of the torus
            network_bandwidth=6.25e9,
            link_seconds=5e-6,
            network_seconds=50e-6,
            operation_seconds=1e-6,
            per_node=8960,
            topologies=_slices("v5p", _CUBES),
        ),
        Chip(
            name="v5e",
            kind="TPU v5e",
            platform="tpu",
            memory_bytes=16 * 2**30,
            memory_bandwidth=0.819e12,
            link_bandwidth=90e9,
            network_bandwidth=6.25e9,
            link_seconds=5e-6,
            network_seconds=50e-6,
            operation_seconds=1e-6,
            per_node=256,
            topologies=_slices("v5e", _SQUARES),
        ),
        Chip(
            name="v6e",
            kind="TPU v6e",
            platform="tpu",
            memory_bytes=32 * 2**30,
            memory_bandwidth=1.638e12,
            link_bandwidth=180e9,
            network_bandwidth=12.5e9,
            link_seconds=5e-6,
            network_seconds=50e-6,
            operation_seconds=1e-6,
            per_node=256,
            topologies=_slices("v6e", _SQUARES),
        ),
        # No processor in particular: a quarter of a small machine, as four virtual devices have it.
        Chip(
            name="cpu",
            kind="cpu",
            platform="cpu",
            memory_bytes=4 * 2**30,
            memory_bandwidth=4e9,
            link_bandwidth=1.5e9,
            network_bandwidth=1.5e9,
            link_seconds=100e-6,
            network_seconds=100e-6,
            operation_seconds=5e-6,
            per_node=1 << 30,
            peak=(("float32", 80e9), ("bfloat16", 60e9), ("float8", 40e9)),
        ),
    )
}


def find_chip(name: str) -> Chip:
    """The chip of this name; ValueError that lists them."""
    if name not in CHIPS:
        raise ValueError(f"--chip={name} is none of {', '.join(CHIPS)}{did_you_mean(name, CHIPS)}")
    return CHIPS[name]


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """What share of each peak well-made programs reach: the assumptions of an estimate.

    Attributes:
      matmul: large matrix products (an H100 lowers its clock under them).
      attention: fused attention.
      memory: passes over memory.
      links: collectives.
    """

    matmul: float = 0.70
    attention: float = 0.50
    memory: float = 0.85
    links: float = 0.80


ASSUMED = Efficiency()
