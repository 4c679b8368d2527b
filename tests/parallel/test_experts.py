"""Layers of experts on every mesh: loss (auxiliary losses included) and gradients are those of one device."""

import numpy as np
import pytest

from paxlike import parallel
from paxlike.layers.attention import Attention
from paxlike.layers.block import Block
from paxlike.layers.embedding import Embedding
from paxlike.layers.feedforward import FeedForward
from paxlike.layers.moe import MoE, Router
from paxlike.layers.norm import RMSNorm
from paxlike.layers.stack import Pipeline, Stack
from paxlike.models.decoder import Decoder
from paxlike.ops.routing import Choice
from paxlike.plan import hlo
from tests.parallel import meshes

VOCAB, LENGTH, ROWS, WIDTH, EXPERTS = 48, 8, 8, 16, 4
FSDP = parallel.rules_with(expert="fsdp", expert_embed=None)
BOTH = parallel.rules_with(expert=("fsdp", "expert"), expert_embed=None)


def model(
    *, layers=2, first=0, factor=None, dispatch="index", group=LENGTH, context="ring", **pipeline
):
    norm = RMSNorm
    attention = lambda: Attention(2, 8, use_bias=False)
    router = Router(Choice(k=2), "tokens", factor, group, balance_weight=0.1, z_loss_weight=0.01)
    experts = MoE(
        EXPERTS, 24, router=router, dispatch=dispatch, gated=True, activation="silu", use_bias=False
    )
    dense = lambda: Block(attention(), FeedForward(24, use_bias=False), norm(), norm())
    period = (Block(attention(), experts, norm(), norm()), dense())
    stack = Stack(period, layers, pipeline=Pipeline(**pipeline) if pipeline else Pipeline())
    prefix = Stack((dense(),), first, pipeline=None) if first else None
    return Decoder(Embedding(VOCAB, WIDTH), stack, norm(), context=context, prefix=prefix)


def batch():
    rng = np.random.default_rng(0)
    return {
        "tokens": rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32),
        "targets": rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32),
        "weights": np.ones((ROWS, LENGTH), np.float32),
        "segments": np.repeat([[1, 1, 1, 1, 2, 2, 0, 0]], ROWS, axis=0).astype(np.int32),
    }


_EXPECTED = {}


def expected(**options):
    """Of one device; with its parameters."""
    key = tuple(sorted(options.items()))
    if key not in _EXPECTED:
        net = model(**options)
        params = meshes.init(net, LENGTH)
        _EXPECTED[key] = params, meshes.loss_and_gradients(net, params, batch(), {"data": 1})
    return _EXPECTED[key]


TIGHT = {
    "factor": 1.0
}  # four places in a group of eight tokens with two experts each: some are dropped


@pytest.mark.parametrize(
    ("sizes", "rules", "options"),
    [
        ({"expert": 4}, None, TIGHT),
        ({"fsdp": 2, "expert": 2}, BOTH, {}),
        ({"fsdp": 2, "expert": 2}, None, TIGHT),
        ({"fsdp": 2, "tensor": 2}, FSDP, {}),
        ({"tensor": 2, "expert": 2}, None, TIGHT),
        ({"data": 2, "fsdp": 2}, None, {}),
        ({"data": 2, "fsdp": 2}, None, {**TIGHT, "dispatch": "einsum"}),
    ],
    ids=str,
)
def test_loss_and_gradients_equal_one_device(sizes, rules, options):
    params, one = expected(**options)
    found = meshes.loss_and_gradients(model(**options), params, batch(), sizes, rules)
    meshes.assert_same(found, one, 2e-5)


@pytest.mark.parametrize("options", [{"factor": 4.0}], ids=str)
def test_rows_spread_over_devices(options):
    # Who queues first depends on the devices then: with places for all it makes no difference.
    options = {**options, "group": None}
    params, one = expected(**options)
    found = meshes.loss_and_gradients(
        model(**options), params, batch(), {"expert": 2, "context": 2}
    )
    meshes.assert_same(found, one, 2e-5)


@pytest.mark.parametrize(
    ("sizes", "gather_once", "options"),
    [
        ({"pipeline": 2, "expert": 2}, True, TIGHT),
        ({"pipeline": 2, "expert": 2}, False, {}),
        ({"pipeline": 2, "tensor": 2}, True, {}),
    ],
    ids=str,
)
def test_a_pipeline_says_what_its_layers_say(sizes, gather_once, options):
    params, one = expected(**options)
    net = model(**options, num_microbatches=2, gather_once=gather_once)
    meshes.assert_same(meshes.loss_and_gradients(net, params, batch(), sizes), one, 2e-5)


def test_interleaved_stages_say_it_in_the_order_of_the_layers():
    # One dense layer in front of them, which no number of stages divides.
    params, one = expected(layers=4, first=1)
    net = model(layers=4, first=1, num_microbatches=2, repeats=2)
    meshes.assert_same(meshes.loss_and_gradients(net, params, batch(), {"pipeline": 2}), one, 2e-5)


@pytest.mark.parametrize(
    ("sizes", "rules", "axis"),
    [({"data": 2, "expert": 2}, None, "expert"), ({"fsdp": 4}, FSDP, "fsdp")],
    ids=str,
)
def test_all_to_alls_send_what_arithmetic_says(sizes, rules, axis):
    net = model(layers=1, factor=1.0)
    module = hlo.parse(meshes.compiled(net, batch(), sizes, rules).as_text())
    # 8 groups over 4 devices; each expert has 8 x 1 / 4 = 2, up to 4 places for a group; rows of 16 floats. There and
    # back, forward and backward: four times a device sends all of its rows but those that stay.
    places, groups = 4, ROWS // 4
    held = groups * EXPERTS * places * WIDTH * 4
    sent = [
        (found, times)
        for found, times in module.collectives()
        # The token table goes over fsdp, too; it has another size.
        if found.kind == "all-to-all" and found.axes(sizes) == (axis,) and found.bytes == held
    ]
    parts = sizes[axis]
    assert sum(times for _, times in sent) == 4
    assert sum(found.sent_bytes * times for found, times in sent) == 4 * held * (parts - 1) // parts
