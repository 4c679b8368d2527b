"""Metrics of what layers of experts say about themselves, for the log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from paxlike.log.experts import TABLE
from paxlike.log.metric import Metric


def metrics(summaries: Mapping[str, Any], weight: jax.Array) -> dict[str, Metric]:
    """Means over layers, the largest share of an expert in any layer, and `TABLE` (layers, experts).

    `summaries` is what the layers sowed; the layers of a period stand one behind the other, repeat by repeat.
    """
    layers = [
        {name: jnp.atleast_1d(value) for name, value in one.items()} for one in _layers(summaries)
    ]
    if not layers:
        return {}
    shares = [jnp.atleast_2d(one.pop("share")) for one in layers]
    found = {}
    for name in sorted(set.intersection(*map(set, layers))):
        mean = jnp.mean(jnp.concatenate([one[name] for one in layers]))
        found[f"moe/{name}"] = Metric(mean * weight, weight)
    alike = len({share.shape for share in shares}) == 1
    # (layers of a period, repeats, experts) -> layers in their order.
    share = jnp.stack(shares, axis=1).reshape(-1, shares[0].shape[-1]) if alike else None
    largest = jnp.max(jnp.stack([jnp.max(one) for one in shares]))
    found["moe/largest_share"] = Metric(largest * weight, weight)
    if share is not None:
        found[TABLE] = Metric(share * weight, weight)
    return found


def _layers(tree: Any) -> Iterator[dict[str, jax.Array]]:
    if not isinstance(tree, Mapping):
        return
    for name, value in tree.items():
        if name == "moe" and isinstance(value, Mapping) and "share" in value:
            yield dict(value)
        else:
            yield from _layers(value)
