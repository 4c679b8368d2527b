"""Rematerialisation: what the backward pass finds kept, what it computes again, and in which layers.

Chen et al. 2016. A policy is one of Pax's names, or a list of tensors by the names that layers give them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax

from paxlike import parallel

Policy = Callable[..., Any]

_QKV = ("combined_qkv_proj", "query_proj", "key_proj", "value_proj")
_MLPERF = (*_QKV, "context", "out_proj")
_policies = jax.checkpoint_policies

# What the backward pass keeps, by Pax's names. None: everything is kept (no rematerialisation).
REMAT_POLICIES: dict[str, Policy | None] = {
    "SAVE_EVERYTHING": None,
    "SAVE_NOTHING": _policies.nothing_saveable,
    "SAVE_DOT_ONLY": _policies.dots_saveable,
    "SAVE_DOT_WITH_NO_BATCH_DIM": _policies.dots_with_no_batch_dims_saveable,
    "SAVE_QKV_OUT_PROJ": _policies.save_only_these_names("combined_qkv_proj", "out_proj"),
    "SAVE_QKV_OUT_PROJ_SEPARATE": _policies.save_only_these_names(*_QKV[1:], "out_proj"),
    "SAVE_CONTEXT": _policies.save_only_these_names("context"),
    "SAVE_OUT_PROJ": _policies.save_only_these_names("out_proj"),
    "SAVE_CONTEXT_AND_OUT_PROJ": _policies.save_only_these_names("context", "out_proj"),
    "SAVE_DOT_FOR_MLPERF_200B": _policies.save_only_these_names(*_MLPERF),
    "SAVE_DOT_EXCEPT_LOGITS_FFN1": _policies.save_only_these_names(*_MLPERF, "ffn2"),
    "SAVE_DOT_EXCEPT_LOGITS": _policies.save_only_these_names(
        *_MLPERF, "ffn2", "ffn1", "ffn1_gate"
    ),
    # In Pax the input of each turn of a loop; here a loop over layers keeps it under any policy, in a pipeline too.
    "SAVE_ITERATION_INPUT": _policies.nothing_saveable,
    # In Pax the operands of integer products too, which do not exist here.
    "SAVE_QUANTIZED": _policies.save_only_these_names("combined_qkv_proj", "context", "out_proj"),
    "SAVE_TRANSFORMER_LAYER_OUTPUT": _policies.save_only_these_names("transformer_layer_out"),
}

# The tensors of a block that a list may name.
TENSOR_NAMES = (*_MLPERF, "ffn1", "ffn1_gate", "ffn2", "expert_rows", "transformer_layer_out")
EXPERT_ROWS = "expert_rows"  # what each expert was given
HOST = "host:"  # before the name of a tensor that is kept in the memory of the host


def policy_of(text: str) -> Policy | None:
    """The policy called `text`, or that keeps the tensors that `text` lists (`context,host:ffn1`).

    Raises:
      ValueError: no such policy, no such tensor.
    """
    if text in REMAT_POLICIES:
        return REMAT_POLICIES[text]
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name.removeprefix(HOST) not in TENSOR_NAMES]
    if unknown:
        raise ValueError(
            f"CHECKPOINT_POLICY='{text}' is none of {', '.join(REMAT_POLICIES)}, and '{unknown[0]}' is no tensor of a "
            f"block: {', '.join(TENSOR_NAMES)}; with {HOST} before it, one is kept on the host"
        )
    on_host = [name.removeprefix(HOST) for name in names if name.startswith(HOST)]
    on_device = [name for name in names if not name.startswith(HOST)]
    if not on_host:
        return _policies.save_only_these_names(*on_device)
    return _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=on_device,
        names_which_can_be_offloaded=on_host,
        offload_src="device",
        offload_dst="pinned_host",
    )


def keep_all(scan: bool) -> Policy | None:
    """The policy of layers that are not computed again."""
    if scan and parallel.num_shards("embed") > 1:
        # A scan would keep the weights of all layers, gathered, until the backward pass.
        return _all_but_moved
    return None


def choice_of(text: str, layers: int) -> tuple[str, int]:
    """Which repeats of a stack are computed again: `all`, `first:K` or `every:K`, as (kind, K).

    Raises:
      ValueError: none of these, or a K that `layers` repeats do not have.
    """
    if text == "all":
        return "all", 1
    found = re.fullmatch(r"(first|every):(\d+)", text)
    if not found:
        raise ValueError(
            f"CHECKPOINT_LAYERS='{text}' is none of all, first:K (the first K repeats of the stack's blocks) and "
            "every:K (each K-th one)"
        )
    kind, count = found[1], int(found[2])
    if not 1 <= count <= layers or (kind == "every" and layers % count):
        fits = "a divisor of" if kind == "every" else "at most"
        raise ValueError(
            f"CHECKPOINT_LAYERS='{text}': K must be at least 1 and {fits} the {layers} repeats of the stack's blocks"
        )
    return kind, count


def _all_but_moved(primitive, *_, **options) -> bool:
    """A policy that keeps what was computed, not what was only gathered or given another shape or name.

    What experts were sent is kept, too: it would be sent twice.
    """
    if primitive.name == "name" and options["name"] == EXPERT_ROWS:
        return True
    return primitive.name not in ("sharding_constraint", "name", "reshape", "transpose", "squeeze")
