"""Facts about tokens that a loss is judged by."""

import itertools

import numpy as np
from jaxtyping import Float, Int

from paxlike.data.loader import Loader


def unigram_entropy(
    targets: Int[np.ndarray, "..."], weights: Float[np.ndarray, "..."] | None = None
) -> float:
    """Entropy of the frequencies of the scored ids, in nats per token.

    No model that ignores what comes before a token can have a lower loss on them.
    """
    ids = np.asarray(targets).ravel()
    if weights is not None:
        ids = ids[np.asarray(weights).ravel() > 0]
    return _entropy(np.bincount(ids))


def unigram_entropy_of(
    loader: Loader, *, global_batch: int = 64, max_batches: int | None = None
) -> float:
    """`unigram_entropy` of the scored targets of an epoch of a loader, or of its first batches."""
    counts = np.zeros(0, np.int64)
    with loader.epoch(global_batch=global_batch) as batches:
        for batch in itertools.islice(batches, max_batches):
            new = np.bincount(batch["targets"][batch["weights"] > 0], minlength=len(counts))
            new[: len(counts)] += counts
            counts = new
    return _entropy(counts)


def _entropy(counts: Int[np.ndarray, "v"]) -> float:
    counts = counts[counts > 0]
    if not len(counts):
        return float("nan")
    share = counts / counts.sum()
    return float(-(share * np.log(share)).sum())
