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
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from paxlike import parallel
from paxlike.layers.dropout import Noise, current_noise, noise, noisy
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

    period: tuple[nn.Module, ...]

    def __call__(self, x: Float[Array, "b s d"], sequence: Sequence) -> Float[Array, "b s d"]:
        for block in self.period:
            x = block(x, sequence)
        return x


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """How a stack runs where the mesh has an axis `pipeline`.

    Attributes:
      num_microbatches: parts of the batch that follow one another; a multiple of the stages.
      repeats: how often the pipeline is run through, each time with other layers (Pax's CIRCULAR_REPEAT).
    """

    num_microbatches: int = 1
    repeats: int = 1

    def fitting(self, rows: int) -> Pipeline | None:
        """This pipeline with as many microbatches as `rows` rows allow; None where they allow none."""
        stages = parallel.num_stages()
        shards = parallel.num_shards("batch")
        counts = range(stages, self.num_microbatches + 1, stages)
        fits = [n for n in counts if rows % n == 0 and (rows // n) % (shards // stages) == 0]
        return dataclasses.replace(self, num_microbatches=max(fits)) if fits else None


class Stack(nn.Module):
    """`repeats` times the blocks of `period`.

    Attributes:
      period: the blocks of one repeat; one block for GPT, two for a model that alternates.
      repeats: how often the period comes; the number of layers is repeats x len(period).
      remat: a key of `REMAT_POLICIES`.
      scan: compile one repeat and loop over it, rather than compile all of them.
      pipeline: how the repeats are passed through on a mesh with a pipeline.
    """

    period: tuple[nn.Module, ...]
    repeats: int
    remat: str = "SAVE_EVERYTHING"
    scan: bool = True
    pipeline: Pipeline = Pipeline()

    def setup(self):
        if self.remat not in REMAT_POLICIES:
            raise ValueError(
                f"CHECKPOINT_POLICY='{self.remat}' is none of {', '.join(REMAT_POLICIES)}"
            )
        self.layers = Period(tuple(self.period))

    def __call__(self, x: Float[Array, "b s d"], sequence: Sequence) -> Float[Array, "b s d"]:
        # Each repeat has a key of its own, the same whether it is scanned, unrolled or in a pipeline.
        there = current_noise() or Noise(None, x.shape[:2])
        key = self.make_rng("dropout") if noisy() else None
        noise_ = dataclasses.replace(there, key=key, depth=len(self.path))
        if parallel.num_stages() > 1 and not self.is_initializing() and not sequence.cache_length:
            pipeline = self.pipeline.fitting(x.shape[0])
            if pipeline is None and sequence.train:
                raise ValueError(
                    f"{x.shape[0]} rows do not make NUM_MICROBATCHES={self.pipeline.num_microbatches} parts over "
                    f"{parallel.num_stages()} pipeline stages and {parallel.num_shards('batch')} batch shards"
                )
            if pipeline is not None:
                return self._pipelined(x, sequence, noise_, pipeline)
        return self._in_turn(x, sequence, noise_)

    def _in_turn(self, x, sequence: Sequence, noise_: Noise):
        """All repeats one after another, as one loop or written out."""
        # While tokens are generated, each repeat updates its part of one array in place: as a scanned input and output
        # the cache would be copied three times for every token. The first pass, without offset, makes the array.
        in_place = sequence.offset is not None
        counts = in_place or noise_.key is not None

        def repeat(layers, x, index):
            own = dataclasses.replace(sequence, repeat=index) if in_place else sequence
            with noise(_of_layer(noise_, index)):
                return layers(x, own), None

        policy = self._policy()
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
        )(self.layers, x, jnp.arange(self.repeats) if counts else None)
        return x

    def _policy(self):
        policy = REMAT_POLICIES[self.remat]
        if policy is None and self.scan and parallel.num_shards("embed") > 1:
            # A scan would keep the weights of all layers, gathered, until the backward pass.
            return _all_but_moved
        return policy

    def _pipelined(self, x, sequence: Sequence, noise_: Noise, pipeline: Pipeline):
        """The repeats spread over the stages of the mesh; their parameters are those of `_in_turn`."""
        others = sorted(name for name in self.variables if name != "params")
        if others:
            raise ValueError(
                f"a pipeline does not carry the state in {', '.join(others)} (FP8 scales and the like): "
                "train without USE_FP8, or without the mesh axis 'pipeline'"
            )
        period = Period(tuple(block.unbind()[0] for block in self.period), parent=None)
        rows = jnp.arange(x.shape[0]) if noise_.rows is None else noise_.rows
        extras = {
            "positions": sequence.positions,
            "segments": sequence.segments,
            "rows": None if noise_.key is None else rows,
            "places": None if noise_.key is None else noise_.places,
        }

        policy = self._policy()

        def stage(weights, first, x, extras):
            own = dataclasses.replace(sequence, **extras)
            mine = dataclasses.replace(
                noise_, shape=x.shape[:2], depth=0, rows=own.rows, places=own.places
            )

            def layer(x, weights_and_index):
                weights, index = weights_and_index
                x = checkpoint_name(x, parallel.LAYER_INPUT)
                with noise(_of_layer(mine, index)):
                    return period.apply({"params": weights}, x, own), None

            if policy is not None and sequence.train:
                layer = jax.checkpoint(layer, policy=policy, prevent_cse=not self.scan)
            count = jax.tree.leaves(weights)[0].shape[0]
            unroll = 1 if self.scan else count
            return jax.lax.scan(layer, x, (weights, first + jnp.arange(count)), unroll=unroll)[0]

        x = parallel.pipeline(
            stage,
            self.variables["params"],
            x,
            extras,
            num_microbatches=pipeline.num_microbatches,
            repeats=pipeline.repeats,
            policy=policy,
        )
        return parallel.shard(x, "batch", "length", "act_embed")


def _of_layer(noise_: Noise, index: jax.Array | None) -> Noise:
    if noise_.key is None:
        return noise_
    return dataclasses.replace(noise_, key=jax.random.fold_in(noise_.key, index))
