"""A tiny model with learned positions, random and sharp enough to have opinions, and a tokenizer of printable ASCII."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from paxlike.layers.attention import Attention
from paxlike.layers.block import Block
from paxlike.layers.embedding import Embedding, LearnedPosition
from paxlike.layers.feedforward import FeedForward
from paxlike.layers.norm import LayerNorm
from paxlike.layers.stack import Stack
from paxlike.models.decoder import Decoder

MAX_LENGTH = 48


@dataclasses.dataclass(frozen=True)
class Ascii:
    """Real, if small: bos 0, eos 1, then the 95 printable characters."""

    vocab_size: int = 97
    bos_id: int = 0
    eos_id: int = 1
    pad_id: int = 0

    def encode(self, text):
        return [ord(c) - 30 for c in text]

    def decode(self, ids):
        return "".join(chr(int(i) + 30) for i in ids if 2 <= i < 97)

    def digest(self):
        return "ascii"


def tiny_decoder(*, vocab_size=100, scan=True, kv_heads=None, dtype="float32") -> Decoder:
    init = nn.initializers.normal(0.3)
    attention = Attention(
        num_heads=4, head_dim=8, num_kv_heads=kv_heads, kernel_init=init, dtype=dtype
    )
    ffn = FeedForward(64, kernel_init=init, dtype=dtype)
    return Decoder(
        Embedding(vocab_size, 32, table_init=init, dtype=dtype),
        Stack(
            (Block(attention, ffn, LayerNorm(dtype=dtype), LayerNorm(dtype=dtype)),), 2, scan=scan
        ),
        LayerNorm(dtype=dtype),
        LearnedPosition(MAX_LENGTH, table_init=init, dtype=dtype),
    )


def tiny_variables(model):
    return nn.unbox(jax.jit(model.init)(jax.random.key(1), jnp.zeros((4, 4), jnp.int32)))


@pytest.fixture(scope="session")
def tokenizer():
    return Ascii()


@pytest.fixture(scope="session")
def decoder():
    """Makes tiny decoders."""
    return tiny_decoder


@pytest.fixture(scope="session")
def model():
    return tiny_decoder()


@pytest.fixture(scope="session")
def variables(model):
    return tiny_variables(model)
