"""Checkpoints larger than memory: written and read a layer at a time, by a single process.

A checkpoint of weights alone, of step 0, is written from arrays that exist only piece by piece; it is an ordinary one
to all that read checkpoints. Orbax takes such an array as a type of its own, and stores it as it stores any other:
zarr chunks in an OCDBT key-value store. A chunk holds part of one layer, so that reading one layer reads no other.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (teaches numpy bfloat16)
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from paxlike.checkpoint import arrays, integrity, layout, quiet, upkeep
from paxlike.checkpoint.checkpointer import _metadata
from paxlike.cluster import processes

Parts = Callable[[], Iterator[tuple[tuple[slice, ...], np.ndarray]]]
_CHUNK_BYTES = 1 << 26
_BLOCK_BYTES = 1 << 28
# How a ValueError begins that tensorstore raises for what is wrong with a file.
_STATUS = re.compile(r"[A-Z_]+: ")


@dataclasses.dataclass(frozen=True)
class StreamedArray:
    """An array that is made while it is written.

    Attributes:
      shape, dtype: of the whole.
      parts: yields boxes that tile it, and their contents.
      chunk: at most so much is stored in one piece; a box should be made of whole chunks.
      sharding: none; it is on no device.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: Parts
    chunk: tuple[int, ...]
    sharding: None = None


def streamed(shape: Sequence[int], dtype: Any, parts: Parts, *, num_lead: int = 0) -> StreamedArray:
    """An array to write, in chunks of one index of the first `num_lead` dimensions."""
    dtype = np.dtype(dtype)
    chunk = [1 if axis < num_lead else size for axis, size in enumerate(shape)]
    for axis in range(num_lead, len(chunk)):
        rest = math.prod(chunk) * dtype.itemsize
        chunk[axis] = max(1, math.ceil(chunk[axis] / max(1, math.ceil(rest / _CHUNK_BYTES))))
    return StreamedArray(tuple(shape), dtype, parts, tuple(chunk))


def write_params(
    job_log_dir: Path,
    params: Mapping[str, StreamedArray],
    *,
    config: str = "{}",
    config_text: str = "",
    checksums: bool = True,
) -> Path:
    """Writes a checkpoint of step 0 with these parameters, by path, and returns its folder.

    It is complete when it has its name. Raises `ValueError` where there is a checkpoint already, and `OSError` in one
    line when it cannot be written.
    """
    if not processes.alone():
        raise ValueError(f"{jax.process_count()} processes write to {job_log_dir}: start only one")
    folder = layout.checkpoints_folder(job_log_dir)
    if steps := layout.list_steps(folder):
        raise ValueError(
            f"{folder} has checkpoints already ({layout.name_steps(steps)}): choose another folder"
        )
    claim = upkeep.open_for_writing(folder)
    final = layout.step_folder(folder, 0)
    unfinished = final.with_name(f"{final.name}.orbax-checkpoint-tmp-stream")
    try:
        _write(unfinished, {f"params/{name}": array for name, array in params.items()})
        items = {
            "data": {},
            "config": {"json": config, "text": config_text},
            "metadata": _metadata(0, {f"params/{name}": array for name, array in params.items()}),
        }
        for name, value in items.items():
            (unfinished / name).mkdir()
            (unfinished / name / "metadata").write_text(json.dumps(value))
        integrity.write_manifest(unfinished, checksums=checksums)
        unfinished.rename(final)
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and not _STATUS.match(str(error)):
            raise
        raise OSError(
            f"the checkpoint could not be saved: {upkeep.problem(folder, error)}"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if claim is not None:
            upkeep.release(claim)
    return final


class StoredArray:
    """An array of a checkpoint that is read by parts: `stored[3]` is layer 3.

    Where a chunk holds several layers, as training writes it, a block of them stays in memory until another is asked
    for: so each is read once.
    """

    def __init__(self, store: ts.TensorStore):
        self._store = store
        self.shape: tuple[int, ...] = tuple(store.shape)
        self.dtype = np.dtype(store.dtype.numpy_dtype)
        chunk = store.chunk_layout.read_chunk.shape
        self._num_layers = (chunk[0] if chunk else None) or 1
        self._block: tuple[int, np.ndarray] | None = None

    def __getitem__(self, index: Any) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        if not index or not isinstance(index[0], int) or self._num_layers == 1:
            return self._store[index].read().result()
        begin = index[0] // self._num_layers * self._num_layers
        if self._block is None or self._block[0] != begin:
            self._block = None
            stop = min(begin + self._num_layers, self.shape[0])
            self._block = (begin, self._store[begin:stop].read().result())
        value = self._block[1][(index[0] - begin, *index[1:])]
        if index[0] == min(begin + self._num_layers, self.shape[0]) - 1:
            self._block = None
        return value


def open_params(
    path: Path, *, step: int | None = None, use: str = "params"
) -> dict[str, StoredArray]:
    """The parameters of a checkpoint, by path, to be read by parts; `use="ema"`: the averaged ones.

    `path` is a job_log_dir, its checkpoints/ folder or one checkpoint. Raises `ValueError` in one line where there
    is none, where the newest is damaged, and where it has no such weights.
    """
    folder = layout.locate(path, step=step)[0]
    if reason := integrity.damage(folder):
        raise ValueError(f"checkpoint {folder} is damaged ({reason}): give another step of it")
    stored = arrays.read_item(folder, "metadata")["arrays"]
    names = [name for name in stored if name.startswith(f"{use}/")]
    if not names:
        have = ", ".join(sorted({name.split("/")[0] for name in stored}))
        raise ValueError(f"checkpoint {folder} has no {use!r} weights; it has {have}")
    # No memory of chunks: each is asked for once.
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    return {
        name.removeprefix(f"{use}/"): StoredArray(
            ts.open(
                _spec(folder / "state", name.replace("/", ".")), read=True, context=context
            ).result()
        )
        for name in names
    }


def _write(folder: Path, named: Mapping[str, StreamedArray]) -> None:
    """The item `state`, as a save of a training state makes it."""
    quiet.quiet_orbax()
    registry = ocp.type_handlers.create_type_handler_registry((StreamedArray, _Handler()))
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    state = epath.Path(folder / "state")
    state.mkdir(parents=True)
    try:
        handler.save(state, args=ocp.args.PyTreeSave(arrays.nested(named)))
        handler.finalize(state)
    finally:
        handler.close()


class _Handler(ocp.type_handlers.TypeHandler):
    """Tells Orbax how such an array is written; it is read as any `jax.Array`."""

    def typestr(self) -> str:
        return "jax.Array"

    async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
        raise NotImplementedError("streamed arrays are only written")

    async def deserialize(self, infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
        raise NotImplementedError("streamed arrays are only written")

    async def serialize(
        self, values: Sequence[StreamedArray], infos: Sequence[Any], args: Any = None
    ) -> Sequence[Any]:
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            # Orbax merges the folders of all processes when it finishes; this is the only one.
            spec = _spec(Path(info.parent_dir) / "ocdbt.process_0", info.name)
            metadata = {
                "shape": list(value.shape),
                "chunks": list(value.chunk),
                "compressor": {"id": "zstd", "level": 1},
            }
            store = await ts.open(
                {**spec, "metadata": metadata, "dtype": value.dtype.name, **_WRITING},
                create=True,
                context=info.ts_context,
            )
            for box, part in value.parts():
                await _write_part(store, value.chunk, box, part)
        return []


# Zeros are stored too: a missing chunk is always a lost one.
_WRITING = {"store_data_equal_to_fill_value": True}


async def _write_part(
    store: ts.TensorStore, chunk: tuple[int, ...], box: tuple[slice, ...], part: np.ndarray
) -> None:
    """A box, several chunks at a time and never all: a copy in compressed form is in memory too."""
    for rows in _row_blocks(chunk, box, part):
        local = slice(rows.start - box[0].start, rows.stop - box[0].start)
        await store[(rows, *box[1:])].write(part[local])


def _row_blocks(
    chunk: tuple[int, ...], box: tuple[slice, ...], part: np.ndarray
) -> Iterable[slice]:
    row_bytes = max(1, part.nbytes // max(1, part.shape[0]))
    step = max(1, _BLOCK_BYTES // (row_bytes * chunk[0])) * chunk[0]
    for start in range(box[0].start, box[0].stop, step):
        yield slice(start, min(start + step, box[0].stop))


def _spec(folder: Path, name: str) -> dict[str, Any]:
    return {
        "driver": "zarr",
        "kvstore": {
            "driver": "ocdbt",
            "base": {"driver": "file", "path": f"{folder}/"},
            "path": f"{name}/",
        },
        "fill_missing_data_reads": False,
    }
