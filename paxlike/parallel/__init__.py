"""Mesh, logical axis rules and sharding constraints: the only room that knows mesh axes."""

from paxlike.parallel.context import (
    Context,
    check_current_length,
    check_length,
    current_context,
    gather_length,
    scatter_length,
)
from paxlike.parallel.experts import AXIS as EXPERT
from paxlike.parallel.experts import (
    check_experts,
    expert_axes,
    from_experts,
    on_experts,
    over_groups,
    to_experts,
)
from paxlike.parallel.kernel import Kernel, kernel_init
from paxlike.parallel.mesh import AXES, BATCH_AXES, Mesh
from paxlike.parallel.pipeline import AXIS as PIPELINE_AXIS
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
    STACKED,
    Rules,
    activate,
    check_axes,
    check_divisible,
    mesh_axes,
    named_sharding,
    num_shards,
    rules_with,
    shard,
    spec,
    towards,
    whole_rows,
)
from paxlike.parallel.zero import Zero

__all__ = [
    "AXES",
    "BATCH_AXES",
    "DEFAULT_RULES",
    "EXPERT",
    "LAYER_INPUT",
    "PIPELINE_AXIS",
    "STACKED",
    "Context",
    "Kernel",
    "Mesh",
    "Rules",
    "Zero",
    "activate",
    "bubble",
    "check_axes",
    "check_current_length",
    "check_divisible",
    "check_experts",
    "check_length",
    "check_pipeline",
    "current_context",
    "expert_axes",
    "from_experts",
    "gather_length",
    "kernel_init",
    "mesh_axes",
    "named_sharding",
    "num_shards",
    "num_stages",
    "on_experts",
    "over_groups",
    "pipeline",
    "rules_with",
    "scatter_length",
    "shard",
    "spec",
    "to_experts",
    "towards",
    "whole_rows",
    "without_pipeline",
]
