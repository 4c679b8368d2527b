"""When a run saves, and what it keeps."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
    """When to save and what to keep. None or 0 turns a rule off; `keep_last=None` keeps everything.

    every_n_steps, every_minutes: save when either is due. keep_every_n_steps: its multiples are
    kept for ever. asynchronous: write in the background. checksums: of the contents, beside the
    sizes; off saves one reading of the checkpoint at each save and restore, which matters from
    some hundred gigabytes on.
    """

    every_n_steps: int | None = 5000
    every_minutes: float | None = None
    keep_last: int | None = 10
    keep_every_n_steps: int | None = None
    asynchronous: bool = True
    checksums: bool = True

    def __post_init__(self):
        for name in ("every_n_steps", "every_minutes", "keep_every_n_steps"):
            value = getattr(self, name)
            kind = "number of minutes" if name == "every_minutes" else "number of steps"
            types = (int, float) if name == "every_minutes" else (int,)
            if value is not None and (type(value) not in types or not value >= 0):
                raise ValueError(f"{name}={value!r}: it must be a {kind}, or None or 0 for off")
        keep = self.keep_last
        if keep is not None and (type(keep) is not int or keep < 1):
            raise ValueError(
                f"keep_last={keep!r}: it must be at least 1, or None to keep all checkpoints"
            )
