"""Models and batches that every side builds alike. Imports numpy only: PyTorch's process reads it too."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1e-3, 0.1, 1.0
B1, B2, EPSILON = 0.9, 0.999, 1e-8


@dataclasses.dataclass(frozen=True)
class Shape:
    """A GPT and its batch: pre-norm blocks, tied embedding, learned positions, tanh GELU, biases everywhere."""

    layers: int
    width: int
    heads: int
    hidden: int
    length: int
    rows: int
    vocab: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.rows * self.length

    def forward_flops(self) -> int:
        """FLOPs of the forward pass of a step: matrix products, half of the scores (causal)."""
        weights = self.layers * (4 * self.width**2 + 2 * self.width * self.hidden)
        products = 2 * self.tokens * (weights + self.vocab * self.width)
        return products + 2 * self.layers * self.tokens * self.length * self.width


SHAPES = {
    "smoke": Shape(layers=2, width=32, heads=4, hidden=64, length=32, rows=4, vocab=64),
    "host": Shape(layers=12, width=32, heads=2, hidden=64, length=8, rows=1, vocab=64),
    "tiny": Shape(layers=4, width=256, heads=4, hidden=1024, length=256, rows=8, vocab=8192),
    "512": Shape(layers=8, width=512, heads=8, hidden=2048, length=256, rows=8, vocab=8192),
    "126m-slice": Shape(
        layers=2, width=768, heads=12, hidden=3072, length=512, rows=2, vocab=50304
    ),
    "126m-slice-4": Shape(  # rows enough for four devices
        layers=2, width=768, heads=12, hidden=3072, length=256, rows=4, vocab=50304
    ),
    "126m": Shape(layers=12, width=768, heads=12, hidden=3072, length=2048, rows=4, vocab=50304),
}


def batches(shape: Shape, number: int = 4) -> list[dict[str, np.ndarray]]:
    """Random tokens, the same for everybody."""
    rng = np.random.default_rng(0)
    result = []
    for _ in range(number):
        row = rng.integers(0, shape.vocab, (shape.rows, shape.length + 1)).astype(np.int32)
        weights = np.ones((shape.rows, shape.length), np.float32)
        result.append(
            {"tokens": row[:, :-1].copy(), "targets": row[:, 1:].copy(), "weights": weights}
        )
    return result


def initial_parameters(shape: Shape) -> dict[str, Any]:
    """Weights from N(0, 0.02), in paxlike's tree; norm gains are stored as their distance from 1."""
    rng = np.random.default_rng(1)
    n, d, h, f = shape.layers, shape.width, shape.heads, shape.hidden
    k = d // h
    draw = lambda *size: (0.02 * rng.standard_normal(size)).astype(np.float32)
    zeros = lambda *size: np.zeros(size, np.float32)
    norm = lambda *lead: {"scale": zeros(*lead, d), "bias": zeros(*lead, d)}
    block = {
        "mixer_norm": norm(n),
        "mixer": {
            "qkv": {"kernel": draw(n, d, 3, h, k), "bias": zeros(n, 3, h, k)},
            "out": {"kernel": draw(n, h, k, d), "bias": zeros(n, d)},
        },
        "ffn_norm": norm(n),
        "ffn": {
            "ffn1": {"kernel": draw(n, d, f), "bias": zeros(n, f)},
            "ffn2": {"kernel": draw(n, f, d), "bias": zeros(n, d)},
        },
    }
    return {
        "embedding": {"table": draw(shape.vocab, d)},
        "position": {"table": draw(shape.length, d)},
        "stack": {"period_0": block},
        "norm": norm(),
    }
