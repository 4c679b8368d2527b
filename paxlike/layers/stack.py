"""A stack of blocks: a period of different blocks, repeated, with rematerialisation.

The parameters of the repeats are stacked along a leading `layers` dimension whether the repeats are scanned (compile
time that does not grow with depth) or unrolled (a little faster): both give the same numbers and read the same
checkpoints.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from paxlike import parallel
from paxlike.layers.dropout import Noise, current_noise, noise
from paxlike.layers.remat import Policy, choice_of, keep_all, policy_of
from paxlike.layers.sequence import Sequence
from paxlike.layers.sizes import check_at_least
from paxlike.ops import fp8, platform
from paxlike.ops.sown import SOWN

PyTree = Any


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
      gather_once: a stage gathers its weights, and reduces their gradients, once a step, not for each microbatch.
    """

    num_microbatches: int = 1
    repeats: int = 1
    gather_once: bool = True

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
      remat: what the backward pass finds kept (`layers.remat`).
      scan: compile one repeat and loop over it, rather than compile all of them.
      pipeline: how the repeats are passed through on a mesh with a pipeline; None: all stages compute all repeats, each
        for its part of the rows (layers in front of a pipeline).
      remat_layers: which repeats `remat` holds for; the others keep everything.
    """

    period: tuple[nn.Module, ...]
    repeats: int
    remat: str = "SAVE_EVERYTHING"
    scan: bool = True
    pipeline: Pipeline | None = Pipeline()
    remat_layers: str = "all"

    def setup(self):
        policy_of(self.remat)
        check_at_least(1, self, "repeats")
        choice_of(self.remat_layers, self.repeats)
        self.layers = Period(tuple(self.period))

    def __call__(self, x: Float[Array, "b s d"], sequence: Sequence) -> Float[Array, "b s d"]:
        # Each repeat has a key of its own, the same whether it is scanned, unrolled or in a pipeline.
        there = current_noise() or Noise(None, x.shape[:2])
        key = self.make_rng("dropout") if sequence.train and self.has_rng("dropout") else None
        noise_ = dataclasses.replace(there, key=key, depth=len(self.path))
        staged = self.pipeline if parallel.num_stages() > 1 else None
        if staged is not None and not self.is_initializing() and not sequence.cache_length:
            pipeline = staged.fitting(x.shape[0])
            if pipeline is None and sequence.train:
                raise ValueError(
                    f"{x.shape[0]} rows do not make NUM_MICROBATCHES={staged.num_microbatches} parts over "
                    f"{parallel.num_stages()} pipeline stages and {parallel.num_shards('batch')} batch shards"
                )
            if pipeline is not None:
                return self._pipelined(x, sequence, noise_, pipeline)
        some = self.remat_layers != "all" and policy_of(self.remat) is not None
        # Who asks for what is sown in the layers (a replay) gets it from the form that carries collections.
        some = some and not self.is_mutable_collection("intermediates")
        if some and sequence.train and not self.is_initializing():
            return self._some_again(x, sequence, noise_)
        if sequence.cache_length and self._may_lay_apart():
            return self._apart(x, sequence, noise_)
        return self._in_turn(x, sequence, noise_)

    def _may_lay_apart(self) -> bool:
        """Whether tokens are generated with a copy of the weights, and a cache, of each repeat by itself.

        A CPU's products read whole arrays: in a loop over stacked ones each weight of each layer is copied for every
        token, which takes longer than the products. An accelerator reads them where they are.
        """
        if self.is_initializing() or not self.is_mutable_collection("cache"):
            return False
        if not platform.is_cpu() or set(self.variables) - {"params", "cache"}:
            return False
        return platform.may_copy(self.variables["params"])

    def _apart(self, x, sequence: Sequence, noise_: Noise):
        """All repeats written out; what the first pass laid apart stands in the cache, for all tokens that follow."""
        period = Period(tuple(block.unbind()[0] for block in self.period), parent=None)
        layers, new = self.get_variable("cache", "apart"), []
        if layers is None:
            weights = self.variables["params"]
            cut = lambda n: jax.tree.map(lambda a: a[n], weights)
            layers = [{"params": cut(n)} for n in range(self.repeats)]
        with noise(dataclasses.replace(noise_, depth=0)):
            for layer in layers:
                x, cache = period.apply(layer, x, sequence, mutable=["cache"])
                new.append({**layer, **cache})
        self.put_variable("cache", "apart", tuple(new))
        return x

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
                **dict.fromkeys(SOWN, 0),
                "_overwrite_with_gradient": 0,
                fp8.STATE: 0,
                "intermediates": 0,
            },
            variable_carry="cache" if in_place else False,
            split_rngs={"params": True, "dropout": True},
            length=self.repeats,
            unroll=1 if self.scan else self.repeats,
            metadata_params={
                nn.PARTITION_NAME: "whole_layers" if self.pipeline is None else "layers"
            },
        )(self.layers, x, jnp.arange(self.repeats) if counts else None)
        return x

    def _policy(self) -> Policy | None:
        return policy_of(self.remat) or keep_all(self.scan)

    def _layers_apart(self, what: str) -> tuple[Period, PyTree, PyTree]:
        """The blocks by themselves, and stacked parameters and FP8 histories of all repeats: those of `_in_turn`."""
        others = sorted(name for name in self.variables if name not in ("params", fp8.STATE))
        if others:
            raise ValueError(
                f"{what} does not carry the state in {', '.join(others)}: train without {what}"
            )
        blocks = Period(tuple(block.unbind()[0] for block in self.period), parent=None)
        return blocks, self.variables["params"], self.variables.get(fp8.STATE, {})

    def _some_again(self, x, sequence: Sequence, noise_: Noise):
        """All repeats one after another, only some of which are computed again in the backward pass."""
        period, *variables = self._layers_apart("CHECKPOINT_LAYERS")
        inside = dataclasses.replace(noise_, depth=0)

        wanted = self._wanted()

        def layer(x, weights, history, index):
            with noise(_of_layer(inside, index)):
                variables = {"params": weights, fp8.STATE: history}
                return period.apply(variables, x, sequence, mutable=wanted)

        def loop(x, start, end, pattern):
            """Repeats from `start` to `end`, in groups that are treated as `pattern` says."""
            kinds = [
                layer if policy is None else jax.checkpoint(layer, policy=policy, prevent_cse=False)
                for policy in pattern
            ]
            cut = lambda a: a[start:end].reshape(-1, len(kinds), *a.shape[1:])

            def group(x, of_group):
                said = []
                for number, one in enumerate(kinds):
                    x, more = one(x, *jax.tree.map(lambda a, n=number: a[n], of_group))
                    said.append(more)
                return x, jax.tree.map(lambda *parts: jnp.stack(parts), *said)

            xs = jax.tree.map(cut, (*variables, jnp.arange(self.repeats)))
            unroll = 1 if self.scan else (end - start) // len(kinds)
            x, said = jax.lax.scan(group, x, xs, unroll=unroll)
            return x, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), said)

        again, kept = policy_of(self.remat), keep_all(self.scan)
        kind, count = choice_of(self.remat_layers, self.repeats)
        if kind == "every":
            x, said = loop(x, 0, self.repeats, [*[kept] * (count - 1), again])
        else:
            x, said = loop(x, 0, count, [again])
            if count < self.repeats:
                x, more = loop(x, count, self.repeats, [kept])
                said = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), said, more)
        self._say(said)
        return x

    def _wanted(self) -> list[str]:
        """Collections that layers sow into and that the caller asks for."""
        return [name for name in SOWN if self.is_mutable_collection(name)]

    def _say(self, said: PyTree) -> None:
        """Sows what the layers of all repeats have sown, stacked, as if they had done so in place."""
        for collection, blocks in said.items():
            for name, value in blocks.items():
                self.scope.put_variable(collection, name, value)

    def _pipelined(self, x, sequence: Sequence, noise_: Noise, pipeline: Pipeline):
        """The repeats spread over the stages of the mesh."""
        period, weights, history = self._layers_apart("a pipeline")
        rows = jnp.arange(x.shape[0]) if noise_.rows is None else noise_.rows
        of_rows = {"positions": sequence.positions, "segments": sequence.segments}
        extras = (of_rows, None if noise_.key is None else rows)

        policy, wanted = self._policy(), self._wanted()

        def stage(weights, history, first, x, extras):
            of_rows, rows = extras
            own = dataclasses.replace(sequence, **of_rows)
            mine = dataclasses.replace(noise_, shape=x.shape[:2], depth=0, rows=rows)

            def layer(x, of_layer):
                weights, history, index = of_layer
                x = checkpoint_name(x, parallel.LAYER_INPUT)
                with noise(_of_layer(mine, index)):
                    variables = {"params": weights, fp8.STATE: history}
                    return period.apply(variables, x, own, mutable=wanted)

            if policy is not None and sequence.train:
                layer = jax.checkpoint(layer, policy=policy, prevent_cse=not self.scan)
            count = jax.tree.leaves(weights)[0].shape[0]
            unroll = 1 if self.scan else count
            layers = (weights, history, first + jnp.arange(count))
            return jax.lax.scan(layer, x, layers, unroll=unroll)

        x, said = parallel.pipeline(
            stage,
            weights,
            x,
            extras,
            num_microbatches=pipeline.num_microbatches,
            repeats=pipeline.repeats,
            policy=policy,
            names=_names(period, x, sequence) if pipeline.gather_once else None,
            observed=history,
            copies=fp8.copies,
        )
        self._say(said)
        return parallel.shard(x, "batch", "residual_length", "act_embed")


def _names(period: Period, x, sequence: Sequence) -> PyTree:
    """Logical names of the dimensions of the parameters of one repeat."""
    here = dataclasses.replace(sequence, train=False)
    start = lambda: period.init(jax.random.key(0), x, here)["params"]
    is_box = lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)
    boxed = jax.eval_shape(start)
    return jax.tree.map(lambda box: box.names if is_box(box) else (), boxed, is_leaf=is_box)


def _of_layer(noise_: Noise, index: jax.Array | None) -> Noise:
    if noise_.key is None:
        return noise_
    assert index is not None  # repeats are counted where there is a key
    return dataclasses.replace(noise_, key=jax.random.fold_in(noise_.key, index))
