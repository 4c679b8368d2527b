"""Mesh, logical axis rules and sharding constraints: the only room that knows mesh axes."""

from paxlike.parallel.mesh import AXES, BATCH_AXES, Mesh
from paxlike.parallel.pipeline import (
    LAYER_INPUT,
    bubble,
    check_pipeline,
    num_stages,
    pipeline,
    without_pipeline,
)
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
)

__all__ = [
    "AXES",
    "BATCH_AXES",
    "DEFAULT_RULES",
    "LAYER_INPUT",
    "Mesh",
    "Rules",
    "activate",
    "bubble",
    "check_axes",
    "check_divisible",
    "check_pipeline",
    "named_sharding",
    "num_shards",
    "num_stages",
    "pipeline",
    "shard",
    "spec",
    "without_pipeline",
]
