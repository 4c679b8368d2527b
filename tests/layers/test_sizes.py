"""Numbers that no layer can have, in one line."""

import jax
import jax.numpy as jnp
import pytest

from paxlike.layers.attention import Attention
from paxlike.layers.embedding import Embedding, LearnedPosition
from paxlike.layers.feedforward import FeedForward
from paxlike.layers.moe import MoE
from paxlike.layers.norm import LayerNorm, RMSNorm
from paxlike.layers.sequence import Sequence
from paxlike.layers.stack import Stack


@pytest.mark.parametrize(
    ("layer", "line"),
    [
        (Attention(0, 4), "Attention.num_heads=0 must be at least 1"),
        (Attention(2, 4, num_kv_heads=-1), "Attention.num_kv_heads=-1 must be at least 1"),
        (Attention(2, 4, window=0), "Attention.window=0 must be at least 1"),
        (FeedForward(hidden=0), "FeedForward.hidden=0 must be at least 1"),
        (MoE(num_experts=0, hidden=8), "MoE.num_experts=0 must be at least 1"),
        (LayerNorm(epsilon=-1.0), "LayerNorm.epsilon=-1.0 must be at least 0"),
        (RMSNorm(epsilon=float("nan")), "RMSNorm.epsilon=nan must be at least 0"),
        (LearnedPosition(0), "LearnedPosition.max_length=0 must be at least 1"),
        (Embedding(16, 0), "Embedding.features=0 must be at least 1"),
        (Stack((), repeats=0), "Stack.repeats=0 must be at least 1"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_a_layer_without_size_is_refused(layer, line):
    takes_tokens = isinstance(layer, Embedding)
    x = jnp.zeros((1, 4), jnp.int32) if takes_tokens else jnp.zeros((1, 4, 8))
    alone = isinstance(layer, Embedding | LearnedPosition | LayerNorm | RMSNorm)
    rest = () if alone else (Sequence(),)
    with pytest.raises(ValueError, match="must be at least") as error:
        jax.eval_shape(layer.init, jax.random.key(0), x, *rest)
    assert str(error.value) == line
