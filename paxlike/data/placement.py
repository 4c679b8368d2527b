"""Rows of the host become global arrays: the one place of the data room that touches devices."""

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from paxlike.data.packing import Batch

Spec = dict[str, jax.ShapeDtypeStruct]


class Placement:
    """Which rows of a global batch this process reads, and where they go.

    `sharding` is that of (b, s) arrays; arrays without a sequence axis take its batch part. None
    leaves numpy arrays of all rows. The rows are those that the addressable devices hold, so the
    same code serves processes that hold a part of the batch and, with a batch smaller than the
    mesh, all of it.
    """

    def __init__(self, spec: Spec, sharding: Sharding | None):
        self._spec, self._sharding = spec, sharding
        batch = next(iter(spec.values())).shape[0]
        if sharding is None:
            self.rows = np.arange(batch)
            return
        check_batch(batch, sharding)
        shape = next(value.shape for value in spec.values() if len(value.shape) == 2)
        held = sharding.addressable_devices_indices_map(shape).values()
        rows = [np.arange(batch)[index[0]] for index in held if index is not None]
        self.rows = np.unique(np.concatenate(rows))

    def put(self, local: Batch) -> dict[str, jax.Array] | Batch:
        """Global arrays from the rows `self.rows`."""
        whole = self._sharding
        if whole is None:
            return local
        return {key: self._put(local[key], value, whole) for key, value in self._spec.items()}

    def _put(self, local: np.ndarray, spec: jax.ShapeDtypeStruct, whole: Sharding) -> jax.Array:
        batch = spec.shape[0]

        def piece(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # jax's types allow None, no sharding gives it
            start, stop, _ = index[0].indices(batch)
            # `rows` is sorted and holds all of start..stop, so the piece is contiguous here too.
            first = int(np.searchsorted(self.rows, start))
            return local[(slice(first, first + stop - start), *index[1:])]

        sharding = _of_rank(whole, len(spec.shape))
        return jax.make_array_from_callback(spec.shape, sharding, piece)


def check_batch(global_batch: int, sharding: Sharding | None) -> None:
    """Raises ValueError where a batch cannot be divided by its sharding."""
    if global_batch < 1:
        raise ValueError(f"global_batch={global_batch} must be at least 1")
    if isinstance(sharding, NamedSharding) and sharding.spec:
        axes = sharding.spec[0]
        axes = () if axes is None else axes if isinstance(axes, tuple) else (axes,)
        ways = int(np.prod([sharding.mesh.shape[axis] for axis in axes]))
        if global_batch % ways:
            raise ValueError(
                f"global_batch={global_batch} does not divide by the {ways} ways of mesh axes "
                f"{axes}: use a multiple of {ways}"
            )


def _of_rank(sharding: Sharding, rank: int) -> Sharding:
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:rank]))
    return sharding
