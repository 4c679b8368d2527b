"""What travels beside the hidden states through every block: where each token stands, and what may be cached."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Int

from paxlike import parallel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sequence:
    """Facts about the rows of a batch that attention and positions need.

    Attributes:
      positions: position of each token in its document; None counts from 0 in each row.
      segments: document number of each token, 0 for padding; None where a row is one document.
      offset: number of tokens of each row that the cache holds already; None while nothing is cached.
      repeat: which part of a cache that holds all repeats of a stack is this layer's; None where it holds one layer.
      train: dropout and other noise are active.
      context: how rows are spread over devices, None where they are whole.
      cache_length: size of the key/value cache to keep, 0 for none.
    """

    positions: Int[Array, "b s"] | None = None
    segments: Int[Array, "b s"] | None = None
    offset: Int[Array, "b"] | None = None
    repeat: Int[Array, ""] | None = None
    train: bool = dataclasses.field(default=False, metadata={"static": True})
    context: parallel.Context | None = dataclasses.field(default=None, metadata={"static": True})
    cache_length: int = dataclasses.field(default=0, metadata={"static": True})
