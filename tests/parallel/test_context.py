"""Rows spread over devices: the same loss and gradients as on one device, what travels, and what is refused."""

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
from paxlike.ops import attention as ops
from paxlike.ops.context_attention import context_attention
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
    return tiny.model(layers=2, width=32, **{"remat": "SAVE_EVERYTHING", **options})


def llama(*, window=None, remat="SAVE_EVERYTHING", scan=True, context="ring"):
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
        stack=Stack((block,), 2, remat, scan),
        norm=RMSNorm(),
        context=context,
    )


def batch(*, packed=False, rows=2):
    """Random tokens, some of weight 0; `packed` rows are several documents and padding."""
    made = tiny.batches(1, rows=rows)[0]
    if packed:
        segments = np.sort(np.random.default_rng(1).integers(0, 4, made["tokens"].shape), axis=1)
        segments = np.roll(segments, -np.sum(segments == 0, axis=1)[0], axis=1)
        starts = np.diff(segments, axis=1, prepend=-1) != 0
        places = np.arange(tiny.LENGTH)[None]
        positions = places - np.maximum.accumulate(np.where(starts, places, 0), axis=1)
        made |= {"segments": segments.astype(np.int32), "positions": positions.astype(np.int32)}
    return made


def run(net, data, shape=(1, 1, 1, 1), rules=None, *, chunk=None):
    """Loss, gradients by name, and the compiled program."""
    task = CausalLanguage(chunk=chunk)
    params = nn.unbox(net.init(jax.random.key(0), jnp.zeros((1, tiny.LENGTH), jnp.int32)))["params"]
    mesh = parallel.Mesh(ici=shape, axes=AXES).build(jax.devices()[: math.prod(shape)])
    with parallel.activate(mesh, rules):
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract_variables(net, mesh)["params"])
        params = jax.device_put(params, places)
        rows = parallel.named_sharding(mesh, ("batch", "length"))
        data = {name: jax.device_put(x, rows) for name, x in data.items()}

        def loss(params, data):
            rngs = {"dropout": jax.random.key(1)}
            return task.loss(net, {"params": params}, data, rngs).objective / task.weight(data)

        function = jax.jit(jax.value_and_grad(loss), out_shardings=(None, places))
        compiled = function.lower(params, data).compile(FAST)
        value, gradients = jax.block_until_ready(compiled(params, data))
    named = {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)
    }
    return float(value), named, compiled


CASES = {
    "gpt, context 2, scan": (gpt(), {}, CONTEXT_2, None),
    "gpt, context 4, packed, unrolled, remat, chunked loss": (
        gpt(scan=False, remat="SAVE_NOTHING"),
        {"packed": True, "chunk": 4},
        CONTEXT_4,
        None,
    ),
    "gpt, context x tensor, sequence parallel, dropout": (gpt(dropout=0.2), {}, WITH_TENSOR, SEQUENCE),
    "gpt, tensor, sequence parallel, unrolled, remat": (
        gpt(scan=False, remat="SAVE_NOTHING"),
        {"packed": True},
        TENSOR_2,
        SEQUENCE,
    ),
    "llama, context 4, window, remat of what is not named": (
        llama(window=7, remat="SAVE_CONTEXT"),
        {"packed": True},
        CONTEXT_4,
        None,
    ),
    "llama, context x tensor, sequence parallel": (
        llama(remat="SAVE_DOT_ONLY"),
        {"packed": True},
        WITH_TENSOR,
        SEQUENCE,
    ),
    "llama, context x fsdp, unrolled": (llama(scan=False), {}, WITH_FSDP, None),
    "llama, context x data, gathered": (
        llama(window=11, context="all_gather"),
        {"packed": True},
        WITH_DATA,
        None,
    ),
    "llama, context 2, all to all": (
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
    expected, wanted, _ = run(net, data, chunk=chunk)
    got, gradients, _ = run(net, data, shape, rules, chunk=chunk)
    assert got == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == wanted.keys()
    for key, gradient in gradients.items():  # entries near 0 are held to the size of their tensor
        np.testing.assert_allclose(
            gradient, wanted[key], rtol=1e-5, atol=1e-5 * np.abs(wanted[key]).max(), err_msg=key
        )
