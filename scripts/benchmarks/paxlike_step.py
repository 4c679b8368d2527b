"""paxlike's own training step at a shape of the benchmark, compiled as the training loop compiles it."""

from __future__ import annotations

import math

import jax

from paxlike import parallel
from paxlike.layers.attention import Attention
from paxlike.layers.block import Block
from paxlike.layers.embedding import Embedding, LearnedPosition
from paxlike.layers.feedforward import FeedForward
from paxlike.layers.norm import LayerNorm, RMSNorm
from paxlike.layers.stack import Stack
from paxlike.models.decoder import Decoder
from paxlike.ops.rope import Rope
from paxlike.tasks.language import CausalLanguage
from paxlike.train.optimizer import Optimizer, Schedule
from paxlike.train.state import StateFactory
from paxlike.train.step import TrainStep
from scripts.benchmarks import shapes


def model(
    shape: shapes.Shape, *, dtype="float32", scan=False, remat=False, implementation="auto"
) -> Decoder:
    """The GPT of `shape`."""
    linear = {"dtype": dtype}
    block = Block(
        mixer=Attention(
            num_heads=shape.heads,
            head_dim=shape.width // shape.heads,
            implementation=implementation,
            **linear,
        ),
        ffn=FeedForward(hidden=shape.hidden, **linear),
        mixer_norm=LayerNorm(dtype=dtype),
        ffn_norm=LayerNorm(dtype=dtype),
    )
    return Decoder(
        embedding=Embedding(shape.vocab, shape.width, dtype=dtype),
        position=LearnedPosition(shape.length, dtype=dtype),
        stack=Stack((block,), shape.layers, "SAVE_NOTHING" if remat else "SAVE_EVERYTHING", scan),
        norm=LayerNorm(dtype=dtype),
    )


def llama(shape: shapes.Shape) -> Decoder:
    """A LLaMA of `shape`: rotary positions, a key for two queries, gates, no biases, tables of their own."""
    block = Block(
        mixer=Attention(
            num_heads=shape.heads,
            head_dim=shape.width // shape.heads,
            num_kv_heads=shape.heads // 2,
            combine_qkv=False,
            rope=Rope(),
            use_bias=False,
        ),
        ffn=FeedForward(hidden=shape.hidden, activation="silu", gated=True, use_bias=False),
        mixer_norm=RMSNorm(),
        ffn_norm=RMSNorm(),
    )
    table = Embedding(shape.vocab, shape.width)
    return Decoder(
        embedding=table,
        stack=Stack((block,), shape.layers, "SAVE_EVERYTHING", True),
        norm=RMSNorm(),
        head=table.clone(),
    )


def make(shape: shapes.Shape, *, mesh_shape=(1, 1, 1), **options):
    """The compiled step, the first state and the batches on the devices; `options` are those of `model`."""
    mesh = parallel.Mesh(ici=tuple(mesh_shape)).build(jax.devices()[: math.prod(mesh_shape)])
    with parallel.activate(mesh):
        factory, jitted, spec = _step(shape, mesh, model(shape, **options))
        abstract = factory.abstract()
        compiled = jitted.lower(abstract, spec).compile()
        place = jax.tree.map(lambda leaf: leaf.sharding, abstract.params)
        params = jax.device_put(shapes.initial_parameters(shape), place)
        state = factory.initialize(0).replace(params=params)
        rows = parallel.named_sharding(mesh, ("batch", "length"))
        return compiled, state, [jax.device_put(batch, rows) for batch in shapes.batches(shape)]


def lower(shape: shapes.Shape, **options):
    """The step on one device, traced and not yet compiled."""
    mesh = parallel.Mesh().build(jax.devices()[:1])
    with parallel.activate(mesh):
        factory, jitted, spec = _step(shape, mesh, model(shape, **options))
        return jitted.lower(factory.abstract(), spec)


def _step(shape, mesh, net):
    optimizer = Optimizer(
        Schedule("constant", shapes.LEARNING_RATE),
        b1=shapes.B1,
        b2=shapes.B2,
        epsilon=shapes.EPSILON,
        weight_decay=shapes.WEIGHT_DECAY,
        clip_norm=shapes.CLIP_NORM,
    )
    rows = parallel.named_sharding(mesh, ("batch", "length"))
    spec = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows)
        for name, leaf in shapes.batches(shape, 1)[0].items()
    }
    factory = StateFactory(net, optimizer, spec, mesh)
    place = jax.tree.map(lambda leaf: leaf.sharding, factory.abstract())
    held = place.params if mesh.size > 1 else None
    step = TrainStep(net, CausalLanguage(), optimizer, shardings=held)
    return factory, jax.jit(step, donate_argnums=0, out_shardings=(place, None)), spec
