"""A batch that grows: small while the gradient is informative, large later (Smith et al. 2018; Megatron's form).

The order of the rows stays that of a run without a ramp; only where it is cut into batches changes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Ramp:
    """Rows of a step as a function of the rows seen: `start`, then `increment` more at equal distances.

    Attributes:
      start, increment: rows.
      rows: after so many the batch is whole.
    """

    start: int
    increment: int
    rows: int

    def __post_init__(self):
        if self.start < 1 or self.increment < 1 or self.rows < 0:
            raise ValueError(
                f"BATCH_RAMP=[{self.start}, {self.increment}, {self.rows}]: first batch and increment must be at least "
                "1, rows at least 0"
            )

    def check(self, whole: int, multiple: int) -> None:
        """Raises ValueError unless batches grow to `whole` rows and each is a multiple of `multiple`."""
        given = f"BATCH_RAMP=[{self.start}, {self.increment}, {self.rows}]"
        if self.start > whole or (whole - self.start) % self.increment:
            raise ValueError(
                f"{given} never reaches the batch of {whole} rows: {whole} - {self.start} must be a multiple of "
                f"{self.increment}"
            )
        if self.start % multiple or self.increment % multiple:
            raise ValueError(
                f"{given}: the first batch and the increment must be multiples of {multiple}, the batch shards times "
                "NUM_MICROBATCHES"
            )

    def size(self, seen: int, whole: int) -> int:
        """Rows of the step that comes after `seen` rows; `whole` at the end.

        >>> [Ramp(8, 8, 96).size(seen, 32) for seen in (0, 31, 32, 63, 64, 95, 96, 1000)]
        [8, 8, 16, 16, 24, 24, 32, 32]
        """
        if seen >= self.rows:
            return whole
        number = (whole - self.start) // self.increment
        return self.start + self.increment * (seen * number // self.rows)


class Feed:
    """Training batches from a row on, each as large as the ramp says.

    Attributes:
      rows: that have been handed out, since the start of the run.
    """

    def __init__(
        self, data: Any, *, whole: int, ramp: Ramp | None, first_row: int, sharding: Any
    ) -> None:
        self.rows = first_row
        self._data, self._whole, self._ramp, self._sharding = data, whole, ramp, sharding
        self._waited, self._size = 0.0, self.size
        self._batches = self._open()

    @property
    def size(self) -> int:
        """Rows of the next batch."""
        return self._whole if self._ramp is None else self._ramp.size(self.rows, self._whole)

    @property
    def waited_seconds(self) -> float:
        """Time that `next()` has waited for data, in all."""
        return self._waited + self._batches.waited_seconds

    def __next__(self) -> dict[str, jax.Array]:
        if self.size != self._size:
            self.close()
            self._waited, self._size = self.waited_seconds, self.size
            self._batches = self._open()
        batch = next(self._batches)
        self.rows += self._size
        return batch

    def close(self) -> None:
        """Ends the thread that reads ahead."""
        self._batches.close()

    def _open(self):
        return self._data.batches(
            global_batch=self._size, first_row=self.rows, sharding=self._sharding
        )
