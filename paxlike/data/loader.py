"""The loader: from a source to global batches, in an order that is a pure function of (seed, step).

Row r of step t is number `first_row + t * global_batch + r` of an endless order in which every epoch is a new
permutation. So the number of processes does not matter, the position of a run is its step, and a
run goes on at any step at once. Each process reads only the rows its devices hold, in a thread
ahead of the device.

Grain gives the order (shuffle, repeat, mix). Rows are gathered a batch at a time with numpy rather
than by Grain's per-element workers: it is faster for memory-mapped tokens and needs one thread.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Sharding

from paxlike.data import token_cache
from paxlike.data.batch_iterator import BatchIterator
from paxlike.data.mixtures import MixedRows, Mixture, component_seed, training_order
from paxlike.data.packing import PACKINGS, Batch, Column, Packing, Rows, StreamRows
from paxlike.data.placement import Placement, Spec, check_batch
from paxlike.data.sources import DocumentSource
from paxlike.data.tokenizers import Tokenizer


@runtime_checkable
class RowSource(Protocol):
    """A source that makes rows itself, without the token cache.

    It may have `columns`, arrays of its own for evaluation (see `Column`), and
    `check_data(tokenizer=...)`, which raises ValueError where its data is not there.
    """

    def check(self, *, tokenizer: Tokenizer | None, seq_len: int, packing: Packing) -> None:
        """Raises ValueError where it cannot make such rows; reads nothing."""

    def rows(self, *, tokenizer: Tokenizer | None, seq_len: int, packing: Packing) -> Rows: ...

    def fingerprint(self) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Loader:
    """Batches of `seq_len` targets from a source.

    Args:
      source: documents, rows, or a `Mixture` of sources.
      seq_len: targets per row.
      tokenizer: needed for documents; None only where rows are made of ids already.
      packing: "packed", "concatenated" or "documents", see `packing`.
      shuffle: False keeps the stored order in training too.
      seed: of the order.
      cache_dir: where tokens are kept; all processes of a run should see it.
      documents: (low, high) keeps this fraction of the documents, to hold some of them out.
      num_workers: processes that tokenise; 0 is this one.
    """

    source: DocumentSource | RowSource | Mixture
    seq_len: int
    tokenizer: Tokenizer | None = None
    packing: Packing = "packed"
    shuffle: bool = True
    seed: int = 0
    cache_dir: str = "~/.cache/paxlike"
    documents: Sequence[float] = (0.0, 1.0)
    num_workers: int = 0

    def __post_init__(self):
        if self.seq_len < 1:
            raise ValueError(f"seq_len={self.seq_len} must be at least 1")
        if self.packing not in PACKINGS:
            raise ValueError(f"packing={self.packing!r} is none of {', '.join(PACKINGS)}")
        low, high = self.documents
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"documents={self.documents} must be (low, high) with 0 <= low < high <= 1"
            )
        token_cache.check_workers(self.num_workers)
        for source in self._sources:
            self._check(source)

    def check(self) -> None:
        """Raises a one-line ValueError where the data is not there; reads no document."""
        for source in self._sources:
            if hasattr(source, "check_data"):
                source.check_data(tokenizer=self.tokenizer)
            elif isinstance(source, DocumentSource):
                source.parts()

    def spec(self, global_batch: int, *, evaluation: bool = False) -> Spec:
        """Shapes and dtypes of a batch; reads nothing."""
        shape = (global_batch, self.seq_len)
        spec = {
            "tokens": jax.ShapeDtypeStruct(shape, np.int32),
            "targets": jax.ShapeDtypeStruct(shape, np.int32),
            "weights": jax.ShapeDtypeStruct(shape, np.float32),
        }
        if self.packing == "packed":
            spec["segments"] = jax.ShapeDtypeStruct(shape, np.int32)
            spec["positions"] = jax.ShapeDtypeStruct(shape, np.int32)
        if evaluation:
            spec["example_weight"] = jax.ShapeDtypeStruct(shape[:1], np.float32)
            spec["num_bytes"] = jax.ShapeDtypeStruct(shape[:1], np.float32)
            for column in self._columns:
                its_shape = shape if column.per_token else shape[:1]
                spec[column.name] = jax.ShapeDtypeStruct(its_shape, column.dtype)
        return spec

    def batches(
        self,
        *,
        global_batch: int,
        start_step: int = 0,
        first_row: int = 0,
        sharding: Sharding | None = None,
        prefetch: int = 2,
    ) -> BatchIterator:
        """Training batches from `start_step` on, without end; step 0 begins with row `first_row`.

        `sharding` is that of the (b, s) arrays; None gives numpy arrays of all rows.
        """
        check_batch(global_batch, sharding)
        spec = self.spec(global_batch)
        place = Placement(spec, sharding)
        rows, order = self._rows, self._order

        def make(step: int) -> dict[str, Any]:
            found = rows.gather(order(first_row + step * global_batch + place.rows))
            return place.put({key: found[key] for key in spec})

        return BatchIterator(make, start=start_step, prefetch=prefetch)

    def epoch(
        self, *, global_batch: int, sharding: Sharding | None = None, prefetch: int = 2
    ) -> BatchIterator:
        """Every row once, in stored order (a mixture: source after source), for evaluation.

        The last batch is filled with rows whose weights and `example_weight` are 0. `num_bytes` is
        0 without a tokenizer.
        """
        check_batch(global_batch, sharding)
        spec = self.spec(global_batch, evaluation=True)
        place = Placement(spec, sharding)
        rows, total = self._rows, self.num_examples()
        fills = {column.name: column.fill for column in self._columns}
        byte_counts = np.zeros(1) if self.tokenizer is None else self.tokenizer.bytes_per_token()

        def make(step: int) -> dict[str, Any]:
            wanted = step * global_batch + place.rows
            real = wanted < total
            batch = {
                key: np.full((len(wanted), *value.shape[1:]), fills.get(key, 0), value.dtype)
                for key, value in spec.items()
            }
            if real.any():
                found = rows.gather(rows.in_sequence(wanted[real]))
                for key in found.keys() & spec.keys():
                    batch[key][real] = found[key]
                batch["num_bytes"][real] = _scored_bytes(found, byte_counts)
            batch["example_weight"][real] = 1
            return place.put(batch)

        return BatchIterator(make, stop=-(-total // global_batch), prefetch=prefetch)

    def num_examples(self) -> int:
        """Rows of one epoch, of all sources together; builds the token cache if need be."""
        return len(self._rows)

    def fingerprint(self) -> dict[str, Any]:
        """What determines the order of rows, JSON-able: a run can go on only where it is equal."""
        facts: dict[str, Any] = {
            "order": 1,  # raised when the arithmetic of the order changes
            "seq_len": self.seq_len,
            "packing": self.packing,
            "shuffle": self.shuffle,
            "seeds": self._seeds if self.shuffle else [],
            "weights": list(self.source.weights) if isinstance(self.source, Mixture) else [],
            "sources": [],
        }
        for source, rows in zip(self._sources, self._rows.parts):
            if isinstance(rows, StreamRows):
                stream = rows.stream  # the digest is of the tokens, wherever the files lie
                facts["sources"].append(
                    {"tokens": stream.digest, "documents": [stream.first, stream.last]}
                )
            elif hasattr(rows, "digest"):
                facts["sources"].append({"rows": rows.digest()})
            else:
                facts["sources"].append(source.fingerprint())
        if self.tokenizer is not None:
            facts["tokenizer"] = self.tokenizer.digest()
            facts["bos_id"] = self.tokenizer.bos_id
        return facts

    def _check(self, source: Any) -> None:
        if isinstance(source, RowSource):
            source.check(tokenizer=self.tokenizer, seq_len=self.seq_len, packing=self.packing)
            if tuple(self.documents) != (0, 1):
                raise ValueError(
                    f"documents={self.documents} has no effect on {type(source).__name__}, "
                    "which has "
                    "no documents: leave it out"
                )
        elif not isinstance(source, DocumentSource):
            raise ValueError(f"source={source!r} is neither documents nor rows nor a Mixture")
        elif self.tokenizer is None:
            raise ValueError(f"{type(source).__name__} gives text: pass a tokenizer")

    @property
    def _sources(self) -> Sequence[Any]:
        return self.source.sources if isinstance(self.source, Mixture) else (self.source,)

    @property
    def _seeds(self) -> list[int]:
        if isinstance(self.source, Mixture) and self.source.seeds is not None:
            return list(self.source.seeds)
        return [component_seed(self.seed, number) for number in range(len(self._sources))]

    @property
    def _columns(self) -> list[Column]:
        """Arrays that the sources have in evaluation beside the usual ones."""
        if self.packing == "packed":
            return []
        found = [column for source in self._sources for column in getattr(source, "columns", ())]
        return list(dict.fromkeys(found))

    @functools.cached_property
    def _rows(self) -> MixedRows:
        fills = {column.name: column.fill for column in self._columns}
        return MixedRows([self._open(source) for source in self._sources], fills)

    @functools.cached_property
    def _order(self):
        return training_order(
            [len(rows) for rows in self._rows.parts],
            weights=self.source.weights if isinstance(self.source, Mixture) else None,
            seeds=self._seeds,
            shuffle=self.shuffle,
        )

    def _open(self, source: DocumentSource | RowSource) -> Rows:
        if isinstance(source, RowSource):
            return source.rows(tokenizer=self.tokenizer, seq_len=self.seq_len, packing=self.packing)
        assert self.tokenizer is not None  # `_check` asks for it
        stream = token_cache.open_or_build(
            source,
            self.tokenizer,
            os.path.expanduser(self.cache_dir),
            documents=(self.documents[0], self.documents[1]),
            num_workers=self.num_workers,
            is_first=jax.process_index() == 0,
        )
        return StreamRows(
            stream, self.seq_len, self.packing, self.tokenizer.bos_id, self.tokenizer.pad_id
        )


def _scored_bytes(batch: Batch, byte_counts: np.ndarray) -> np.ndarray:
    """UTF-8 bytes of the targets with weight above 0, per row."""
    if len(byte_counts) == 1:
        return np.zeros(len(batch["targets"]), np.float32)
    scored = batch["weights"] > 0
    return (byte_counts[batch["targets"]] * scored).sum(axis=1, dtype=np.float32)
