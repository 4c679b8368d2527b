"""A stack of blocks: a period of different blocks, repeated, with rematerialisation.

The parameters of the repeats are stacked along a leading `layers` dimension whether the repeats are scanned (compile
time that does not grow with depth) or unrolled (a little faster): both give the same numbers and read the same
checkpoints.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from paxlike import parallel
from paxlike.layers.sequence import Sequence

_QKV = ("combined_qkv_proj", "query_proj", "key_proj", "value_proj")
_MLPERF = (*_QKV, "context", "out_proj")
_policies = jax.checkpoint_policies

# What the backward pass keeps, by Pax's names. None: everything is kept (no rematerialisation).
REMAT_POLICIES = {
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
    "SAVE_TRANSFORMER_LAYER_OUTPUT": _policies.save_only_these_names("transformer_layer_out"),
}


def _all_but_moved(primitive, *_, **__) -> bool:
    """A policy that keeps what was computed, not what was only gathered or given another shape or name."""
    return primitive.name not in ("sharding_constraint", "name", "reshape", "transpose", "squeeze")


class Period(nn.Module):
    """The blocks of one repeat, in order."""

    blocks: tuple[nn.Module, ...]

    def __call__(self, x: Float[Array, "b s d"], sequence: Sequence) -> Float[Array, "b s d"]:
        for block in self.blocks:
            x = block(x, sequence)
        return x


class Stack(nn.Module):
    """`repeats` times the blocks of `period`.

    Attributes:
      period: the blocks of one repeat; one block for GPT, two for a model that alternates.
      repeats: how often the period comes; the number of layers is repeats x len(period).
      remat: a key of `REMAT_POLICIES`.
      scan: compile one repeat and loop over it, rather than compile all of them.
    """

    period: tuple[nn.Module, ...]
    repeats: int
    remat: str = "SAVE_EVERYTHING"
    scan: bool = True

    def setup(self):
        if self.remat not in REMAT_POLICIES:
            raise ValueError(
                f"CHECKPOINT_POLICY='{self.remat}' is none of {', '.join(REMAT_POLICIES)}"
            )
        self.layers = Period(tuple(self.period))

    def __call__(self, x: Float[Array, "b s d"], sequence: Sequence) -> Float[Array, "b s d"]:
        # While tokens are generated, each repeat updates its part of one array in place: as a scanned input and output
        # the cache would be copied three times for every token. The first pass, without offset, makes the array.
        in_place = sequence.offset is not None

        def repeat(layers, x, index):
            own = dataclasses.replace(sequence, repeat=index) if in_place else sequence
            return layers(x, own), None

        policy = REMAT_POLICIES[self.remat]
        if policy is None and self.scan and parallel.num_shards("embed") > 1:
            # A scan would keep the weights of all layers, gathered, until the backward pass.
            policy = _all_but_moved
        if policy is not None and sequence.train:
            # Inside a loop the compiler cannot merge the two passes again, and the barrier against it costs time.
            repeat = nn.remat(repeat, policy=policy, prevent_cse=not self.scan)
        x, _ = nn.scan(
            repeat,
            variable_axes={
                "params": 0,
                **({} if in_place else {"cache": 0}),
                "losses": 0,
                "_overwrite_with_gradient": 0,
                "intermediates": 0,
            },
            variable_carry="cache" if in_place else False,
            split_rngs={"params": True, "dropout": True},
            length=self.repeats,
            unroll=1 if self.scan else self.repeats,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.layers, x, jnp.arange(self.repeats) if in_place else None)
        return x
