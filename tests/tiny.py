"""A tiny GPT and its data, for tests that need a model but care about something else."""

import jax
import numpy as np

from paxlike import parallel
from paxlike.layers.attention import Attention
from paxlike.layers.block import Block
from paxlike.layers.embedding import Embedding, LearnedPosition
from paxlike.layers.feedforward import FeedForward
from paxlike.layers.norm import LayerNorm
from paxlike.layers.stack import Stack
from paxlike.models.decoder import Decoder
from paxlike.tasks.language import CausalLanguage
from paxlike.train.optimizer import Optimizer, Schedule
from paxlike.train.state import StateFactory
from paxlike.train.step import TrainStep

VOCAB, LENGTH, ROWS = 256, 32, 8


def model(
    *,
    layers=4,
    width=64,
    heads=4,
    scan=True,
    remat="SAVE_NOTHING",
    dropout=0.0,
    dtype="float32",
    **attention,
):
    """A GPT of 4 layers and 64 wide."""
    block = Block(
        mixer=Attention(
            num_heads=heads, head_dim=width // heads, dropout=dropout, dtype=dtype, **attention
        ),
        ffn=FeedForward(hidden=4 * width, dropout=dropout, dtype=dtype),
        mixer_norm=LayerNorm(dtype=dtype),
        ffn_norm=LayerNorm(dtype=dtype),
    )
    return Decoder(
        embedding=Embedding(VOCAB, width, dtype=dtype),
        position=LearnedPosition(LENGTH, dtype=dtype),
        stack=Stack((block,), layers, remat, scan),
        norm=LayerNorm(dtype=dtype),
        embedding_dropout=dropout,
    )


def batches(number=4, *, rows=ROWS, seed=0, weights=True):
    """Random rows; a quarter of the tokens has weight 0."""
    rng = np.random.default_rng(seed)
    shape = (rows, LENGTH)
    return [
        {
            "tokens": rng.integers(0, VOCAB, shape).astype(np.int32),
            "targets": rng.integers(0, VOCAB, shape).astype(np.int32),
            "weights": (rng.random(shape) > (0.25 if weights else -1)).astype(np.float32),
        }
        for _ in range(number)
    ]


def optimizer(**changes):
    """AdamW at a constant rate with every part switched on."""
    return Optimizer(
        **{"schedule": Schedule("constant", 1e-3), "weight_decay": 0.1, "clip_norm": 1.0, **changes}
    )


class Trainer:
    """A model, state and compiled step on a mesh; `step(batch)` returns the step's metrics."""

    def __init__(
        self,
        shape=(1, 1, 1),
        *,
        net=None,
        opt=None,
        task=None,
        microbatches=1,
        data=None,
        seed=0,
        zero=None,
        offload=False,
        accumulation_dtype="float32",
        compiler_options=None,
    ):
        count = int(np.prod(shape))
        self.mesh = parallel.Mesh(ici=shape).build(jax.devices()[:count])
        self.data = data or batches()
        self.model, self.optimizer, self.task = (
            net or model(),
            opt or optimizer(),
            task or CausalLanguage(),
        )
        zero = zero or parallel.Zero()
        self.rules = zero.parameter_rules(None)
        with parallel.activate(self.mesh, self.rules):
            names = {k: ("batch", "length")[: v.ndim] for k, v in self.data[0].items()}
            self.place = {k: parallel.named_sharding(self.mesh, n) for k, n in names.items()}
            spec = {
                k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=self.place[k])
                for k, v in self.data[0].items()
            }
            self.factory = StateFactory(
                self.model,
                self.optimizer,
                spec,
                self.mesh,
                rules=zero.state_rules(None),
                gradient_rules=zero.gradient_rules(None),
                offload=offload,
            )
            self.abstract = self.factory.abstract()
            self.shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
            function = TrainStep.of(
                self.factory,
                self.task,
                num_microbatches=microbatches,
                accumulation_dtype=accumulation_dtype,
            )
            jitted = jax.jit(function, donate_argnums=0, out_shardings=(self.shardings, None))
            lowered = jitted.lower(self.abstract, spec)
            self.compiled = lowered.compile(compiler_options)
            self.state = self.factory.initialize(seed)

    def step(self, batch):
        """Takes one step and waits for it."""
        with parallel.activate(self.mesh, self.rules):
            self.state, metrics = self.compiled(
                self.state, {k: jax.device_put(v, self.place[k]) for k, v in batch.items()}
            )
            return jax.block_until_ready(metrics)

    def losses(self):
        """Losses of the steps over all batches."""
        return [self.step(batch)["loss"].value() for batch in self.data]
