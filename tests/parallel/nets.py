"""The two kinds of blocks that every axis is held to, and rows for them."""

import numpy as np
import tiny

from paxlike.layers.attention import Attention
from paxlike.layers.block import Block
from paxlike.layers.embedding import Embedding
from paxlike.layers.feedforward import FeedForward
from paxlike.layers.norm import RMSNorm
from paxlike.layers.stack import Pipeline, Stack
from paxlike.models.decoder import Decoder
from paxlike.ops.rope import Rope


def gpt(pipeline=Pipeline(), **options):  # noqa: B008
    """Learned positions, dense attention, 32 wide."""
    net = tiny.model(**{"width": 32, **options})
    return net.clone(stack=net.stack.clone(pipeline=pipeline))


def llama(
    *,
    windows=(None,),
    post_norms=False,
    tied=True,
    repeats=2,
    context="ring",
    remat="SAVE_EVERYTHING",
    **options,
):
    """Rotary positions, grouped keys, gates; a block for each of `windows`, then all of them again, `repeats` times."""

    def block(window):
        attention = Attention(
            num_heads=4,
            head_dim=8,
            num_kv_heads=2,
            combine_qkv=False,
            rope=Rope(),
            window=window,
            use_bias=False,
        )
        behind = {"mixer_post_norm": RMSNorm(), "ffn_post_norm": RMSNorm()} if post_norms else {}
        ffn = FeedForward(hidden=48, activation="silu", gated=True, use_bias=False)
        return Block(mixer=attention, ffn=ffn, mixer_norm=RMSNorm(), ffn_norm=RMSNorm(), **behind)

    table = Embedding(tiny.VOCAB, 32)
    return Decoder(
        embedding=table,
        stack=Stack(tuple(block(window) for window in windows), repeats, remat, **options),
        norm=RMSNorm(),
        head=None if tied else table.clone(),
        context=context,
    )


def plain(rows=tiny.ROWS, length=tiny.LENGTH):
    """Random tokens, some of weight 0."""
    batch = tiny.batches(1, rows=rows)[0]
    return {name: np.tile(x, (1, length // tiny.LENGTH)) for name, x in batch.items()}


def packed(rows=tiny.ROWS):
    """The same, in rows of several documents and padding."""
    batch = plain(rows)
    segments = np.sort(np.random.default_rng(1).integers(0, 4, batch["tokens"].shape), axis=1)
    segments = np.roll(segments, -np.sum(segments == 0, axis=1)[0], axis=1)
    starts = np.diff(segments, axis=1, prepend=-1) != 0
    places = np.arange(tiny.LENGTH)[None]
    positions = places - np.maximum.accumulate(np.where(starts, places, 0), axis=1)
    return {
        **batch,
        "segments": segments.astype(np.int32),
        "positions": positions.astype(np.int32),
    }
