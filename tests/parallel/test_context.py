"""Rows spread over devices: the same loss and gradients as on one device, what travels, and what is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from collectives import collectives
from parallel import meshes, nets

from paxlike import parallel

AXES = ("data", "fsdp", "context", "tensor")
SEQUENCE = parallel.rules_with(residual_length=("context", "tensor"))
CONTEXT_2, CONTEXT_4, TENSOR_2 = (1, 1, 2, 1), (1, 1, 4, 1), (1, 1, 1, 2)
WITH_TENSOR, WITH_FSDP, WITH_DATA = (1, 1, 2, 2), (1, 2, 2, 1), (2, 1, 2, 1)


def gpt(**options):
    return nets.gpt(**{"layers": 2, "remat": "SAVE_EVERYTHING", **options})


def llama(*, window=None, layers=2, **options):
    """A norm behind each half."""
    return nets.llama(windows=(window,), post_norms=True, repeats=layers, **options)


def batch(*, packed=False):
    return nets.packed(2) if packed else nets.plain(2)


def compiled(net, data, shape, rules=None, **options):
    return meshes.compiled(net, data, dict(zip(AXES, shape, strict=True)), rules, **options)


def run(net, data, shape=(1, 1, 1, 1), rules=None, **options):
    """Loss, and gradients by name."""
    sizes = dict(zip(AXES, shape, strict=True))
    loss, gradients = meshes.loss_and_gradients(
        net, meshes.init(net), data, sizes, rules, **options
    )
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    return float(loss), {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


CASES = {
    "gpt, context 4, packed, remat, chunked loss": (
        gpt(remat="SAVE_NOTHING"),
        {"packed": True, "chunk": 4},
        CONTEXT_4,
        None,
    ),
    "gpt, context x tensor, sequence parallel, dropout": (
        gpt(dropout=0.2),
        {},
        WITH_TENSOR,
        SEQUENCE,
    ),
    "gpt, tensor, sequence parallel, unrolled, remat, packed": (
        gpt(scan=False, remat="SAVE_NOTHING"),
        {"packed": True},
        TENSOR_2,
        SEQUENCE,
    ),
    "llama, context 4, window, packed, remat of what is not named": (
        llama(window=7, remat="SAVE_CONTEXT"),
        {"packed": True},
        CONTEXT_4,
        None,
    ),
    "llama, context x tensor, sequence parallel, packed": (
        llama(remat="SAVE_DOT_ONLY"),
        {"packed": True},
        WITH_TENSOR,
        SEQUENCE,
    ),
    "llama, context x fsdp, unrolled": (llama(scan=False), {}, WITH_FSDP, None),
    "llama, context x data, gathered, window, packed": (
        llama(window=11, context="all_gather"),
        {"packed": True},
        WITH_DATA,
        None,
    ),
    "llama, context 2, all to all, packed, chunked loss": (
        llama(context="all_to_all"),
        {"packed": True, "chunk": 4},
        CONTEXT_2,
        None,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_every_gradient_equal_those_of_one_device(name):
    net, options, shape, rules = CASES[name]
    chunk = options.get("chunk")
    data = batch(packed=options.get("packed", False))
    expected, wanted = run(net, data, chunk=chunk)
    got, gradients = run(net, data, shape, rules, chunk=chunk)
    assert got == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == wanted.keys()
    for key, gradient in gradients.items():  # entries near 0 are held to the size of their tensor
        np.testing.assert_allclose(
            gradient, wanted[key], rtol=1e-5, atol=1e-5 * np.abs(wanted[key]).max(), err_msg=key
        )


def test_ring_passes_keys_on_and_gathers_nothing_but_token_ids():
    found = collectives(compiled(llama(), batch(packed=True), CONTEXT_4))
    assert set(found) == {"all-gather", "all-reduce", "collective-permute"}
    assert max(one.size for one in found["all-gather"]) <= 2 * tiny.LENGTH  # of 2 rows
    assert not any("period_0" in one.name for one in found["all-gather"])
    keys = 2 * tiny.LENGTH // 4 * 2 * 8  # of this device: rows, tokens, heads, head size
    passed = [one.size for one in found["collective-permute"] if "shard_map" in one.name]
    # Keys and values: to the next device before and in the loop of both passes. Their gradients: likewise, and home.
    assert passed.count(keys) == 4 + 4 + 6
    assert set(passed) == {keys, 2 * tiny.LENGTH // 4}, "and the documents"


def test_memory_of_a_ring_is_that_of_the_tokens_on_a_device():
    """Twice the row on twice the devices takes the same: nothing is kept of the turns, whatever the policy keeps."""
    net = llama(layers=1, remat="SAVE_DOT_ONLY")
    temporary = []
    for length, shape in ((512, CONTEXT_2), (1024, CONTEXT_4)):
        program = compiled(net, nets.plain(1, length), shape, chunk=0)
        temporary.append(program.memory_analysis().temp_size_in_bytes)
    assert temporary[1] < 1.06 * temporary[0]  # the loop over turns has two buffers more


def test_sequence_parallelism_moves_activations_and_keeps_a_part_of_the_residual_stream():
    net, data, shape = gpt(layers=8, remat="SAVE_NOTHING"), nets.plain(8), (1, 1, 1, 4)
    plain, spread = (compiled(net, data, shape, rules) for rules in (None, SEQUENCE))
    activation = 8 * tiny.LENGTH * 32
    found = collectives(spread)
    inside = {
        kind: [one for one in found[kind] if "stack" in one.name and one.size > 8 * 32]
        for kind in ("all-gather", "all-reduce")
    }
    # No weight: it would be of another size. A CPU reduces and takes a slice where others reduce and scatter.
    assert {one.size for kind in inside for one in inside[kind]} == {activation}
    forward = {
        kind: [one for one in inside[kind] if "transpose" not in one.name] for kind in inside
    }
    assert len(forward["all-gather"]) == len(forward["all-reduce"]) == 2
    assert len(inside["all-gather"]) == 2 + 2 + 2  # forward, forward again, backward
    memory = [c.memory_analysis().temp_size_in_bytes for c in (plain, spread)]
    residuals = 8 * activation * 4  # of 8 layers
    assert memory[0] - memory[1] > 0.7 * 3 / 4 * residuals


def test_all_to_all_hands_over_what_attention_reads_and_returns():
    found = collectives(compiled(llama(context="all_to_all"), batch(), CONTEXT_2))
    assert len(found["all-to-all"]) == 2 * 4  # q, k, v and the result, forward and backward
    assert not found["all-gather"] and not found["collective-permute"]


def test_rows_that_do_not_divide_are_refused_when_shapes_are_asked_for():
    def shapes(length, shape, rules=None, **options):
        mesh = parallel.Mesh(ici=shape, axes=AXES).build(jax.devices()[: math.prod(shape)])
        with parallel.activate(mesh, rules):
            tokens = jnp.zeros((2, length), jnp.int32)
            return jax.eval_shape(lambda: llama(**options).init(jax.random.key(0), tokens))

    message = "MAX_SEQ_LEN={} does not divide into {} parts .{}.; the nearest that does is {}"
    ring = message.format(36, "2 x context = 8", "CONTEXT_PARALLEL=ring", 32)
    with pytest.raises(ValueError, match=ring):
        shapes(36, CONTEXT_4)
    shapes(36, CONTEXT_4, context="all_to_all")
    both = message.format(34, "context x tensor = 4", "SEQUENCE_PARALLEL", 32)
    with pytest.raises(ValueError, match=both):
        shapes(34, WITH_TENSOR, SEQUENCE, context="all_to_all")
    with pytest.raises(ValueError, match="'ulysses' is none of ring, all_gather, all_to_all"):
        shapes(32, CONTEXT_4, context="ulysses")


def test_what_a_spread_row_cannot_do_is_refused():
    mesh = parallel.Mesh(ici=CONTEXT_4, axes=AXES).build(jax.devices()[:4])
    tokens, key = jnp.zeros((1, 32), jnp.int32), jax.random.key(0)

    def apply(net, like=None, **options):
        variables = jax.eval_shape((like or net).init, key, tokens)
        jax.eval_shape(lambda v: net.apply(v, tokens, mutable=["cache"], **options), variables)

    with parallel.activate(mesh):
        with pytest.raises(
            ValueError, match="NUM_KV_HEADS=2 does not divide over context x tensor = 4"
        ):
            apply(llama(context="all_to_all"))
        with pytest.raises(
            ValueError, match="cuDNN attention does not serve CONTEXT_PARALLEL=ring"
        ):
            apply(gpt(implementation="cudnn"), gpt())
        with pytest.raises(ValueError, match="rows are whole while decoding, .* context = 4"):
            apply(gpt(), cache_length=32)
