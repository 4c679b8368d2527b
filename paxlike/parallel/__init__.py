"""Mesh, logical axis rules and sharding constraints: the only room that knows mesh axes."""

from paxlike.parallel.kernel import Kernel, kernel_init
from paxlike.parallel.mesh import AXES, BATCH_AXES, Mesh
from paxlike.parallel.rules import (
    DEFAULT_RULES,
    Rules,
    activate,
    check_axes,
    check_divisible,
    named_sharding,
    num_shards,
    shard,
    spec,
    towards,
)
from paxlike.parallel.zero import Zero

__all__ = [
    "AXES",
    "BATCH_AXES",
    "DEFAULT_RULES",
    "Kernel",
    "Mesh",
    "Rules",
    "Zero",
    "activate",
    "check_axes",
    "check_divisible",
    "kernel_init",
    "named_sharding",
    "num_shards",
    "shard",
    "spec",
    "towards",
]
