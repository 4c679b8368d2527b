"""Rows spread over devices: the same loss and gradients as on one device, what travels, and what is refused."""

import collections
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

from paxlike import parallel
from paxlike.layers.attention import Attention
from paxlike.layers.block import Block
from paxlike.layers.embedding import Embedding
from paxlike.layers.feedforward import FeedForward
from paxlike.layers.norm import RMSNorm
from paxlike.layers.stack import Stack
from paxlike.models.decoder import Decoder
from paxlike.ops.rope import Rope
from paxlike.tasks.language import CausalLanguage
from paxlike.train.state import abstract_variables

# Compiles in half of the time; the collectives and the buffers are the same.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
AXES = ("data", "fsdp", "context", "tensor")
SEQUENCE = parallel.rules_with(residual_length=("context", "tensor"))
CONTEXT_2, CONTEXT_4, TENSOR_2 = (1, 1, 2, 1), (1, 1, 4, 1), (1, 1, 1, 2)
WITH_TENSOR, WITH_FSDP, WITH_DATA = (1, 1, 2, 2), (1, 2, 2, 1), (2, 1, 2, 1)


def gpt(**options):
    """Learned positions."""
    return tiny.model(**{"layers": 2, "width": 32, "remat": "SAVE_EVERYTHING", **options})


def llama(*, window=None, remat="SAVE_EVERYTHING", scan=True, context="ring", layers=2):
    """Rotary positions, grouped keys, gated feed-forward, a norm behind each half."""
    attention = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "combine_qkv": False}
    block = Block(
        mixer=Attention(**attention, rope=Rope(), window=window, use_bias=False),
        ffn=FeedForward(hidden=64, gated=True, activation="silu", use_bias=False),
        mixer_norm=RMSNorm(),
        ffn_norm=RMSNorm(),
        mixer_post_norm=RMSNorm(),
        ffn_post_norm=RMSNorm(),
    )
    return Decoder(
        embedding=Embedding(tiny.VOCAB, 32),
        stack=Stack((block,), layers, remat, scan),
        norm=RMSNorm(),
        context=context,
    )


def batch(*, packed=False, rows=2, length=tiny.LENGTH):
    """Random tokens, some of weight 0; `packed` rows are several documents and padding."""
    made = tiny.batches(1, rows=rows)[0]
    made = {name: np.tile(x, (1, length // tiny.LENGTH)) for name, x in made.items()}
    if packed:
        segments = np.sort(np.random.default_rng(1).integers(0, 4, made["tokens"].shape), axis=1)
        segments = np.roll(segments, -np.sum(segments == 0, axis=1)[0], axis=1)
        starts = np.diff(segments, axis=1, prepend=-1) != 0
        places = np.arange(tiny.LENGTH)[None]
        positions = places - np.maximum.accumulate(np.where(starts, places, 0), axis=1)
        made |= {"segments": segments.astype(np.int32), "positions": positions.astype(np.int32)}
    return made


def compile_step(net, data, shape=(1, 1, 1, 1), rules=None, *, chunk=None):
    """The compiled loss and gradients, and what it takes: parameters and batch on the mesh."""
    task = CausalLanguage(chunk=chunk)
    start = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    mesh = parallel.Mesh(ici=shape, axes=AXES).build(jax.devices()[: math.prod(shape)])
    with parallel.activate(mesh, rules):
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract_variables(net, mesh)["params"])
        params = jax.device_put(nn.unbox(start)["params"], places)
        rows = parallel.named_sharding(mesh, ("batch", "length"))
        data = {name: jax.device_put(x, rows) for name, x in data.items()}

        def loss(params, data):
            rngs = {"dropout": jax.random.key(1)}
            return task.loss(net, {"params": params}, data, rngs).objective / task.weight(data)

        function = jax.jit(jax.value_and_grad(loss), out_shardings=(None, places))
        return function.lower(params, data).compile(FAST), params, data


def run(*args, **options):
    """Loss, and gradients by name."""
    compiled, params, data = compile_step(*args, **options)
    value, gradients = jax.block_until_ready(compiled(params, data))
    named = {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)
    }
    return float(value), named


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


def travels(compiled):
    """kind of collective -> (elements of its largest operand, name of the operation) of each in the program."""
    found = collections.defaultdict(list)
    pattern = r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\((.*)"
    for shapes, kind, rest in re.findall(pattern, compiled.as_text()):
        sizes = re.findall(r"\w+\[([\d,]*)\]", shapes)
        size = max(math.prod(int(n) for n in dims.split(",") if n) for dims in sizes)
        name = re.search(r'op_name="([^"]*)"', rest)
        found[kind].append((size, name.group(1) if name else ""))
    return found


def test_ring_passes_keys_on_and_gathers_nothing_but_token_ids():
    compiled, *_ = compile_step(llama(), batch(packed=True), CONTEXT_4)
    found = travels(compiled)
    assert set(found) == {"all-gather", "all-reduce", "collective-permute"}
    assert max(size for size, _ in found["all-gather"]) <= 2 * tiny.LENGTH  # of 2 rows
    assert not any("period_0" in name for _, name in found["all-gather"])
    keys = 2 * tiny.LENGTH // 4 * 2 * 8  # of this device: rows, tokens, heads, head size
    passed = [size for size, name in found["collective-permute"] if "shard_map" in name]
    # Keys and values: to the next device before and in the loop of both passes. Their gradients: likewise, and home.
    assert passed.count(keys) == 4 + 4 + 6
    assert set(passed) == {keys, 2 * tiny.LENGTH // 4}, "and the documents"


def test_memory_of_a_ring_is_that_of_the_tokens_on_a_device():
    """Twice the row on twice the devices takes the same: nothing is kept of the turns, whatever the policy keeps."""
    net = llama(layers=1, remat="SAVE_DOT_ONLY")
    temporary = []
    for length, shape in ((512, CONTEXT_2), (1024, CONTEXT_4)):
        compiled, *_ = compile_step(net, batch(rows=1, length=length), shape, chunk=0)
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    assert temporary[1] < 1.06 * temporary[0]  # the loop over turns has two buffers more


def test_sequence_parallelism_moves_activations_and_keeps_a_part_of_the_residual_stream():
    net, data, shape = gpt(layers=8, remat="SAVE_NOTHING"), batch(rows=8), (1, 1, 1, 4)
    plain, *_ = compile_step(net, data, shape)
    spread, *_ = compile_step(net, data, shape, SEQUENCE)
    activation = 8 * tiny.LENGTH * 32
    found = travels(spread)
    inside = {
        kind: [(size, name) for size, name in found[kind] if "stack" in name and size > 8 * 32]
        for kind in ("all-gather", "all-reduce")
    }
    # No weight: it would be of another size. A CPU reduces and takes a slice where others reduce and scatter.
    assert {size for sizes in inside.values() for size, _ in sizes} == {activation}
    forward = {
        kind: [name for _, name in sizes if "transpose" not in name]
        for kind, sizes in inside.items()
    }
    assert len(forward["all-gather"]) == len(forward["all-reduce"]) == 2
    assert len(inside["all-gather"]) == 2 + 2 + 2  # forward, forward again, backward
    memory = [c.memory_analysis().temp_size_in_bytes for c in (plain, spread)]
    residuals = 8 * activation * 4  # of 8 layers
    assert memory[0] - memory[1] > 0.7 * 3 / 4 * residuals


def test_all_to_all_hands_over_what_attention_reads_and_returns():
    compiled, *_ = compile_step(llama(context="all_to_all"), batch(), CONTEXT_2)
    found = travels(compiled)
    assert len(found["all-to-all"]) == 2 * 4  # q, k, v and the result, forward and backward
    assert not found["all-gather"] and not found["collective-permute"]


def test_evaluation_and_logits_are_those_of_the_rows_in_order():
    net, data = gpt(layers=1), jax.tree.map(jnp.asarray, batch())
    alternatives = np.full((2, tiny.LENGTH), -1, np.int32)
    alternatives[0, [5, 9]] = alternatives[1, 30] = 3  # the first in the row counts
    data |= {"alternatives": jnp.asarray(alternatives), "whole_answer": jnp.ones(2)}
    variables = nn.unbox(jax.jit(net.init)(jax.random.key(0), data["tokens"]))

    def evaluate(variables, data):
        metrics = CausalLanguage().evaluate(net, variables, data)
        return metrics, net.apply(variables, data["tokens"]).logits()

    def both():
        return jax.jit(evaluate).lower(variables, data).compile(FAST)(variables, data)

    metrics, logits = both()
    mesh = parallel.Mesh(ici=(2,), axes=("context",)).build(jax.devices()[:2])
    with parallel.activate(mesh):
        there, logits_there = both()
    assert there.keys() == metrics.keys() >= {"boolq_acc", "acc_strict", "accuracy"}
    for name, metric in metrics.items():
        assert there[name].value() == pytest.approx(metric.value(), rel=1e-5), name
    np.testing.assert_allclose(logits_there, logits, rtol=1e-4, atol=1e-5)


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
