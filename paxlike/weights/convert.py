"""From one kind of weights on disk to another, one tensor at a time.

Meta or Hugging Face -> a paxlike checkpoint; a paxlike checkpoint, or Meta, -> Hugging Face. No array of the model ever
exists as a whole: the host holds one tensor of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from paxlike.checkpoint import arrays, layout, streaming
from paxlike.weights.exporting import DEFAULT_SHARD_SIZE, DTYPES, Dtype, export_params
from paxlike.weights.foreign import is_foreign
from paxlike.weights.hugging_face import INDEX, SINGLE
from paxlike.weights.importing import Report, Source, open_source
from paxlike.weights.maps import STACKS, Description
from paxlike.weights.rearrange import Shape

Kind = Literal["paxlike", "huggingface"]


def convert(
    source: str | Path,
    output: str | Path,
    shapes: Mapping[str, Shape],
    description: Description,
    *,
    to: Kind | None = None,
    dtype: Dtype = "float32",
    max_shard_size: str | int | None = None,
    step: int | None = None,
    use: str = "params",
    config: str = "{}",
    config_text: str = "",
    report: Report | None = None,
) -> Kind:
    """Writes the weights in `source` to `output`, and returns as what.

    Args:
      source: a folder of Hugging Face or Meta, or a checkpoint of paxlike (job_log_dir, checkpoints/ or one of them).
      output: a job_log_dir without checkpoints, or an empty or new folder.
      shapes: path -> shape of the parameters of the model that both sides are of.
      description: of the weights of its family.
      to: what to write; None: whatever `source` is not.
      dtype: of the floating-point numbers that are written.
      max_shard_size: of one file of Hugging Face, `5GB` (None) or bytes.
      step, use: which checkpoint of paxlike, and `params` or `ema`.
      config, config_text: kept in a checkpoint of paxlike.
      report: called as `report(done, total)` after each tensor.

    Raises:
      ValueError: in one line, for what does not fit; before anything is written.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is none of {', '.join(DTYPES)}")
    source, output = Path(source), Path(output)
    foreign = is_foreign(source)
    to = to or ("paxlike" if foreign else "huggingface")
    if foreign and (step is not None or use != "params"):
        raise ValueError(
            f"step={step} and use={use!r} choose in a checkpoint of paxlike, and {source} is none: leave them out"
        )
    if to == "paxlike":
        if max_shard_size is not None:
            raise ValueError(
                f"max_shard_size={max_shard_size} is for Hugging Face's files: leave it out, or write to=huggingface"
            )
        if not foreign:
            raise ValueError(
                f"{source} is no folder of Hugging Face or Meta with weights: nothing to convert to paxlike"
            )
        found = open_source(source, shapes, description)
        streaming.write_params(
            output, _streamed(found, shapes, dtype, report), config=config, config_text=config_text
        )
        return to
    leaves: Mapping[str, Any]
    if foreign:
        found = open_source(source, shapes, description)
        leaves = {path: _ForeignParameter(found, path, shape) for path, shape in shapes.items()}
    else:
        _check_is_ours(source)
        leaves = _stored(source, shapes, step, use)
    export_params(
        arrays.nested(leaves),
        output,
        description,
        dtype=dtype,
        max_shard_size=DEFAULT_SHARD_SIZE if max_shard_size is None else max_shard_size,
        report=report,
    )
    return to


def _streamed(
    source: Source, shapes: Mapping[str, Shape], dtype: Dtype, report: Report | None
) -> dict[str, streaming.StreamedArray]:
    done = 0

    def parts(path: str) -> streaming.Parts:
        def each():
            nonlocal done
            for part in source.parts(path, DTYPES[dtype]):
                yield part
                done += 1
                if report is not None:
                    report(done, source.num_pieces)

        return each

    return {
        path: streaming.streamed(
            shape,
            DTYPES[dtype],
            parts(path),
            num_lead=int(path.partition("/")[0] in STACKS),
        )
        for path, shape in shapes.items()
    }


def _check_is_ours(source: Path) -> None:
    try:
        layout.locate(source)
    except ValueError as error:
        raise ValueError(
            f"no weights in {source}: a checkpoint of paxlike (job_log_dir, checkpoints/ or one of them), {SINGLE}, "
            f"{INDEX}, pytorch_model.bin or consolidated.00.pth is expected there"
        ) from error


def _stored(
    source: Path, shapes: Mapping[str, Shape], step: int | None, use: str
) -> dict[str, streaming.StoredArray]:
    """The parameters of a checkpoint; `ValueError` unless they are those of the model."""
    found = streaming.open_params(source, step=step, use=use)
    described = arrays.description(found)
    wanted = {path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()}
    if problem := arrays.difference(described, wanted):
        raise ValueError(
            f"the weights in {source} do not fit this model: {problem}; take the config they were trained with"
        )
    return {path: found[path] for path in shapes}


class _ForeignParameter:
    """A parameter as it would be here, read piece by piece: `parameter[layer, ...]`."""

    def __init__(self, source: Source, path: str, shape: Shape):
        self.shape, self.dtype = tuple(shape), np.dtype(np.float32)
        self._read: Callable[[Any], np.ndarray] = lambda piece: source.read(
            piece, tuple(slice(0, size) for size in piece.shape), np.float32
        )
        self._pieces = {piece.at: piece for piece in source.pieces[path]}

    def __getitem__(self, index: tuple[int | slice, ...]) -> np.ndarray:
        return self._read(
            self._pieces[tuple(each if isinstance(each, int) else None for each in index)]
        )
