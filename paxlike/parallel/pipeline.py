"""Pipeline parallelism: the layers of a stack spread over the mesh axis `pipeline`, microbatches passed along it.

The schedule is the collective one of GPipe (Huang et al. 2019) and, with `repeats` above 1, of the interleaved pipeline
(Narayanan et al. 2021, section 2.2; Pax calls it circular): every stage computes at every tick, and hands its result to
the next one on a ring. With S stages, M microbatches and R repeats there are M R + S - 1 ticks, of which S - 1 find a
stage with nothing to do: a bubble of (S - 1) / (M R + S - 1).

Everything here is manual over `pipeline` and, where weights are gathered once a step, over the axes that rows are
spread over; the other axes stay the compiler's.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from paxlike import compat
from paxlike.parallel import rules as _rules
from paxlike.scoped import Scoped

AXIS = "pipeline"
LAYER_INPUT = (
    "pipeline_layer_input"  # a stage gives this name (`checkpoint_name`) to what each layer reads
)
PyTree = Any

_off = Scoped("off", False)


def without_pipeline() -> contextlib.AbstractContextManager[None]:
    """Inside it stacks are traced as one loop over their layers: FLOPs are counted on that, without the bubble."""
    return _off.set(True)


def num_stages() -> int:
    """Stages of the mesh in force; 1 inside a stage and outside a mesh."""
    return 1 if _off.get() else compat.current_mesh_shape().get(AXIS, 1)


def check_pipeline(stages: int, *, layers: int, microbatches: int, repeats: int = 1) -> None:
    """Raises one line where layers or microbatches do not fit the stages."""
    if repeats < 1:
        raise ValueError(f"CIRCULAR_REPEAT={repeats} must be at least 1")
    if stages == 1:
        if repeats > 1:
            raise ValueError(
                f"CIRCULAR_REPEAT={repeats} needs a pipeline: give the mesh an axis '{AXIS}' (NUM_STAGES)"
            )
        return
    if layers % (stages * repeats):
        down = max(n for n in range(1, stages + 1) if layers % (n * repeats) == 0 or n == 1)
        raise ValueError(
            f"{layers} repeats of the stack's blocks do not divide over NUM_STAGES={stages} x "
            f"CIRCULAR_REPEAT={repeats}; use a multiple of {stages * repeats}, or {down} stages"
        )
    if microbatches % stages:
        up = -(-microbatches // stages) * stages
        raise ValueError(
            f"NUM_MICROBATCHES={microbatches} is not a multiple of NUM_STAGES={stages}; use {up}, or more: of "
            f"{stages} stages a share of {stages - 1} / (NUM_MICROBATCHES x {repeats} + {stages - 1}) stands idle"
        )


def bubble(stages: int, microbatches: int, repeats: int = 1) -> float:
    """Share of the ticks in which a stage has nothing to do."""
    return (stages - 1) / (microbatches * repeats + stages - 1)


def pipeline(
    stage: Callable[[PyTree, PyTree, jax.Array, jax.Array, PyTree], tuple[jax.Array, PyTree]],
    weights: PyTree,
    x: jax.Array,
    extras: PyTree,
    *,
    num_microbatches: int,
    repeats: int = 1,
    policy: Callable[..., Any] | None = None,
    names: PyTree = None,
    observed: PyTree = None,
    copies: Callable[[PyTree, int], PyTree] | None = None,
) -> tuple[jax.Array, PyTree]:
    """`x` (b, ...) through all layers, b rows in `num_microbatches` parts, and what the layers said, by layer.

    Args:
      stage: `(weights of some layers, observed of them, number of the first, x, extras) -> (x, said)` of one
        microbatch; `said` is a tree of arrays whose first dimension counts these layers. The mean over microbatches
        and batch shards is what comes out of the pipeline.
      weights: of all layers, stacked in a leading dimension that is spread over the axis; with `repeats` above 1 they
        change places once a step, so that what is stored, and saved, is in the order of the layers.
      extras: arrays of b rows that each stage needs beside `x` (positions, segments).
      policy: what the backward pass keeps, as in `jax.checkpoint`; None keeps everything.
      names: logical names of the dimensions of one layer's weights (tuples, in a tree like `weights`). With them
        weights are gathered over the axes of the batch once a step, and their gradients reduced once; each device holds
        its stage's weights and gradients whole, in their own dtype. None gathers and reduces in every tick.
      observed: small arrays of all layers, stacked like `weights`, whose cotangents are not to be added up but combined
        by `copies(observed, n)`: it gives each a dimension of n behind that of the layers, one for each part of the
        batch that is worked on at a time, and takes back a cotangent for each; zeros where there is nothing to say.
    """
    stages = num_stages()
    layers = jax.tree.leaves(weights)[0].shape[0]
    check_pipeline(stages, layers=layers, microbatches=num_microbatches, repeats=repeats)
    rows_over = tuple(axis for axis in _rules.mesh_axes("batch") if axis != AXIS)
    by_hand = () if names is None else rows_over
    if names is not None:
        # Outside: a gather inside the map would make whole what the other axes share.
        weights = jax.tree.map(functools.partial(_gathered, rows_over), weights, names)
    rows = P(AXIS, None, by_hand)
    local = functools.partial(
        _local,
        stage,
        stages=stages,
        num_microbatches=num_microbatches,
        repeats=repeats,
        policy=policy,
    )
    run = jax.shard_map(
        local,
        in_specs=(P(AXIS), P(AXIS), P(AXIS, by_hand), rows, rows),
        out_specs=(rows, P((AXIS, *by_hand))),
        axis_names={AXIS, *by_hand},
        check_vma=False,
    )
    ticks, shards = num_microbatches * repeats + stages - 1, 1
    for axis in by_hand:
        shards *= compat.current_mesh_shape()[axis]
    if copies is not None:
        observed = jax.tree.map(
            lambda a: a.reshape(a.shape[0], shards, ticks, *a.shape[2:]),
            copies(observed, shards * ticks),
        )
    at_each = lambda a: _copies(a, stages)
    # Each stage is told its number: an axis index cannot be lowered where other axes are the compiler's.
    outputs, said = run(
        jnp.arange(stages), weights, observed, at_each(x), jax.tree.map(at_each, extras)
    )

    def by_layer(a):
        """(stages x shards, repeats, layers of a round, ...) -> (layers, ...)."""
        a = jnp.mean(a.reshape(stages, -1, *a.shape[1:]), axis=1)
        return a.swapaxes(0, 1).reshape(layers, *a.shape[3:])

    # Those of the last stage: the others are zero.
    return jnp.sum(outputs, axis=0).reshape(x.shape), jax.tree.map(by_layer, said)


def _gathered(rows_over: tuple[str, ...], weight: jax.Array, names: tuple[str | None, ...]):
    """The layers of a weight, whole along the axes of the rows and spread over the others as they were."""
    axes_of = [() if name is None else _rules.mesh_axes(name) for name in names]
    over = [tuple(axis for axis in axes if axis not in rows_over) for axes in axes_of]
    return jax.lax.with_sharding_constraint(weight, P(AXIS, *(axes or None for axes in over)))


def _copies(x: jax.Array, stages: int) -> jax.Array:
    """(b, ...), rows over stages and batch axes -> (stages, stages, b / stages, ...), all rows at each stage."""
    parts = x.reshape(stages, x.shape[0] // stages, *x.shape[1:])
    return jnp.broadcast_to(parts, (stages, *parts.shape))


def _local(
    stage, number, weights, observed, x, extras, *, stages, num_microbatches, repeats, policy
):
    """What one stage does: `weights` are its layers; `x` and `extras` (1, stages, b, ...) the rows.

    `observed` are (layers, 1, ticks, ...): a shard of the rows has its own.
    """
    me = number[0]
    observed = _exchange(jax.tree.map(lambda a: a[:, 0], observed), me, stages, repeats)
    observed = jax.tree.map(lambda a: jnp.moveaxis(a, 2, 0), observed)  # (ticks, repeats, ...)
    rounds = _exchange(weights, me, stages, repeats)
    per_round = jax.tree.leaves(rounds)[0].shape[1]
    mine = num_microbatches // stages
    inputs = _split(x, mine)
    beside = jax.tree.map(lambda a: _split(a, mine), extras)
    to_next = [(i, (i + 1) % stages) for i in range(stages)]
    group = stages * repeats  # work that a stage does on as many microbatches as there are stages

    def compute(rounds, observed, turn, first, state, extra):
        own = jax.tree.map(
            lambda w: jax.lax.dynamic_index_in_dim(w, turn, keepdims=False), (rounds, observed)
        )
        return stage(*own, first, state, extra)

    compute = jax.checkpoint(compute, policy=functools.partial(_keeps, policy), prevent_cse=False)

    def tick(carry, time_and_observed):
        state, outputs, said = carry
        time, observed = time_and_observed
        # What a stage sees while it has nothing to do does not count.
        working = (time >= me) & (time - me < num_microbatches * repeats)
        observed = jax.tree.map(lambda a: jnp.where(working, a, jax.lax.stop_gradient(a)), observed)
        # Microbatches come in groups of as many as there are stages: what the last stage ends in one tick, the first
        # one takes up again, one repeat further, in the next.
        work = jnp.clip(time - me, 0, num_microbatches * repeats - 1)
        turn = (work % group) // stages
        which = (work // group) * stages + work % stages
        fresh = jax.lax.dynamic_index_in_dim(inputs, which, keepdims=False)
        state = jnp.where((me == 0) & (turn == 0), fresh, state)
        extra = jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, which, keepdims=False), beside
        )
        state, more = compute(
            rounds, observed, turn, (turn * stages + me) * per_round, state, extra
        )
        share = jnp.where(working, 1.0 / num_microbatches, 0.0)
        said = jax.tree.map(lambda a, b: a.at[turn].add(share * b), said, more)
        done = (me == stages - 1) & (turn == repeats - 1) & (time >= me)
        before = jax.lax.dynamic_index_in_dim(outputs, which, keepdims=False)
        outputs = jax.lax.dynamic_update_index_in_dim(
            outputs, jnp.where(done, state, before), which, 0
        )
        return (jax.lax.ppermute(state, AXIS, to_next), outputs, said), None

    first, seen = jax.tree.map(lambda a: a[0], ((inputs, beside), observed))
    _, silent = jax.eval_shape(compute, rounds, seen, me, me, *first)
    silent = jax.tree.map(lambda a: jnp.zeros((repeats, *a.shape), jnp.float32), silent)
    start = (jnp.zeros_like(inputs[0]), jnp.zeros_like(inputs), silent)
    ticks = jnp.arange(num_microbatches * repeats + stages - 1)
    (_, outputs, said), _ = jax.lax.scan(tick, start, (ticks, observed))
    outputs = outputs.reshape(stages, mine, *outputs.shape[1:])
    outputs = jnp.moveaxis(outputs, 1, 2).reshape(x.shape)
    return outputs, jax.tree.map(lambda a: a[None], said)


def _keeps(policy, primitive, *operands, **options):
    """What is kept of a tick: what `policy` says and where each layer starts, but no copy of the weights.

    They are there for all ticks; the slices of them that one tick reads are taken again.
    """
    if primitive.name in ("dynamic_slice", "squeeze"):
        return False
    if primitive.name == "name" and options["name"] == LAYER_INPUT:
        return True
    return True if policy is None else policy(primitive, *operands, **options)


def _split(x: jax.Array, parts: int) -> jax.Array:
    """(1, stages, b, ...) -> (stages * parts, b / parts, ...), in the layout that layers have.

    Every parts-th row is in one part, so that each spans all batch shards.
    """
    _, stages, b, *rest = x.shape
    if b % parts:
        raise ValueError(f"{b} rows of a pipeline stage do not divide into {parts} microbatches")
    split = jnp.moveaxis(x.reshape(stages, b // parts, parts, *rest), 2, 1)
    split = split.reshape(stages * parts, b // parts, *rest)
    names = ("batch", "residual_length", "act_embed") if len(rest) == 2 else ("batch", "length")
    return _rules.shard(split, None, *names[: split.ndim - 1])


def _exchange(weights: PyTree, me: jax.Array, stages: int, repeats: int) -> PyTree:
    """(layers of this shard, ...) -> (repeats, layers per round, ...): those that this stage computes with.

    Stored, a shard has consecutive layers; in round r, stage s computes group r * stages + s of them.
    """
    parts = jax.tree.map(lambda w: w.reshape(repeats, -1, *w.shape[1:]), weights)
    if repeats == 1:
        return parts
    sends = _rounds_of_sends(stages, repeats)

    def move(w):
        received = jnp.zeros_like(w)
        for pairs in sends:  # (source, destination, slot at the source, slot at the destination)
            source_slot = jnp.array([slot for _, _, slot, _ in sorted(pairs)])[me]
            target_slot = jnp.array([s for _, s in sorted((p[1], p[3]) for p in pairs)])[me]
            sent = jax.lax.dynamic_index_in_dim(w, source_slot, keepdims=False)
            sent = jax.lax.ppermute(sent, AXIS, [(a, b) for a, b, _, _ in pairs])
            received = jax.lax.dynamic_update_index_in_dim(received, sent, target_slot, 0)
        return received

    return jax.tree.map(move, parts)


@functools.cache
def _rounds_of_sends(
    stages: int, repeats: int
) -> tuple[tuple[tuple[int, int, int, int], ...], ...]:
    """The exchange as `repeats` permutations: a regular bipartite graph falls apart into them (König 1916)."""
    left = [
        (group // repeats, group % stages, group % repeats, group // stages)
        for group in range(stages * repeats)
    ]
    rounds = []
    for _ in range(repeats):
        sends = _one_to_one(left, stages)
        rounds.append(tuple(sorted(sends)))
        left = [send for send in left if send not in sends]
    return tuple(rounds)


def _one_to_one(sends: list[tuple[int, int, int, int]], stages: int):
    """Of `sends`, one from and one to each stage, by augmenting paths."""
    taken: dict[int, tuple[int, int, int, int]] = {}  # destination -> send

    def place(source: int, tried: set[int]) -> bool:
        for send in sends:
            if send[0] == source and send[1] not in tried:
                tried.add(send[1])
                if send[1] not in taken or place(taken[send[1]][0], tried):
                    taken[send[1]] = send
                    return True
        return False

    for source in range(stages):
        place(source, set())
    return taken.values()
