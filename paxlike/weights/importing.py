"""Foreign weights onto any mesh: each process reads the parts of each tensor that its devices keep, layer by layer.

What a folder lacks, has too much of, or has in another shape is refused before the first tensor is read. The host
holds one piece (one tensor of one layer) at a time; stacked parameters are filled in place on their device.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paxlike import compat
from paxlike.checkpoint import arrays
from paxlike.cluster import processes
from paxlike.weights.foreign import ForeignFolder
from paxlike.weights.hugging_face import check_config, open_hugging_face
from paxlike.weights.maps import Description, Piece, plan
from paxlike.weights.meta import is_meta, open_meta
from paxlike.weights.rearrange import Index, Shape

log = logging.getLogger("paxlike.weights")
Report = Callable[[int, int], None]
_COMPARED_BYTES = 1 << 24


@dataclasses.dataclass(frozen=True)
class Source:
    """A foreign folder that fits a model: every parameter with its pieces.

    Attributes:
      folder: with the tensors.
      pieces: by the path of the parameter.
      spelling: name in the map -> name in the folder, where they differ.
    """

    folder: ForeignFolder
    pieces: Mapping[str, list[Piece]]
    spelling: Mapping[str, str]

    @property
    def num_pieces(self) -> int:
        """Tensors to read."""
        return sum(map(len, self.pieces.values()))

    def read(self, piece: Piece, index: Index, dtype: Any) -> np.ndarray:
        """`index` of a piece, as the parameter has it."""
        tensor = self.folder.tensors[self.spelling.get(piece.tensor, piece.tensor)]
        value = piece.rearrangement.take(tensor.read, piece.shape, index)
        if piece.offset:
            value = value.astype(np.float32) - np.float32(piece.offset)
        return value.astype(dtype, copy=False)

    def parts(self, path: str, dtype: Any) -> Iterator[tuple[Index, np.ndarray]]:
        """A whole parameter, piece by piece: where, and what."""
        for piece in self.pieces[path]:
            value = self.read(piece, tuple(slice(0, size) for size in piece.shape), dtype)
            yield (
                _place(piece),
                value.reshape([1 if f is not None else s for f, s in _sizes(piece)]),
            )


def open_folder(path: str | Path) -> ForeignFolder:
    """A folder of Hugging Face or Meta; `ValueError` in one line where there are no weights in it."""
    path = Path(path).absolute()
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder: give one with the weights of a model")
    return open_meta(path) if is_meta(path) else open_hugging_face(path)


def open_source(path: str | Path, shapes: Mapping[str, Shape], description: Description) -> Source:
    """The weights in `path` for a model with parameters of these shapes.

    Raises `ValueError` in one line where the folder is of another model, before a tensor is read.
    """
    folder = open_folder(path)
    if folder.config is not None and description.config:
        source = folder.path / folder.config_file
        unknown = check_config(folder.config, description.config, source=source)
        if unknown and processes.is_first():
            log.warning("%s does not say %s: not compared", source, ", ".join(unknown))
    pieces = plan(description, shapes, origin=folder.origin)
    spelling = _spelling(folder, description, pieces)
    _check(folder, description, pieces, spelling)
    return Source(folder, pieces, spelling)


def import_params(
    path: str | Path,
    abstract_params: Any,
    description: Description,
    *,
    report: Report | None = None,
) -> Any:
    """The weights in a folder of Hugging Face or Meta, in the tree, dtypes and shardings of `abstract_params`.

    `abstract_params` is a tree of `jax.ShapeDtypeStruct` with shardings. All processes call it; each reads the parts
    that its devices keep. `report(done, total)` is called after each tensor. Raises `ValueError` in one line, alike
    on all processes, for what does not fit.
    """
    wanted = arrays.named_leaves(abstract_params)
    if bare := [name for name, leaf in wanted.items() if getattr(leaf, "sharding", None) is None]:
        raise ValueError(
            f"no sharding is given for {arrays.some(bare)}: each ShapeDtypeStruct must carry one"
        )
    source = _agreed(
        lambda: open_source(path, {name: leaf.shape for name, leaf in wanted.items()}, description)
    )
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if report is not None:
            report(done, source.num_pieces)

    found = _agreed(
        lambda: {name: _filled(source, name, leaf, count) for name, leaf in wanted.items()}
    )
    return arrays.with_leaves(abstract_params, found)


def _agreed(work: Callable[[], Any]) -> Any:
    """The result of `work`; where it fails on one process, all raise what that one did."""
    result, problem = None, None
    try:
        result = work()
    except (OSError, ValueError) as error:
        if processes.alone():
            raise
        problem = str(error)
    if problems := processes.share("import", problem):
        raise ValueError(problems[0])
    return result


def _filled(source: Source, name: str, leaf: Any, count: Callable[[], None]) -> jax.Array:
    """One parameter on its devices; devices that keep the same part share one reading of it."""
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in leaf.sharding.addressable_devices_indices_map(tuple(leaf.shape)).items():
        box = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
        holders.setdefault(box, []).append(device)
    shards = []
    for number, (box, devices) in enumerate(holders.items()):
        is_last = number == len(holders) - 1
        shards += _shards(
            source, name, leaf.dtype, box, devices, count if is_last else lambda: None
        )
    return jax.make_array_from_single_device_arrays(tuple(leaf.shape), leaf.sharding, shards)


def _shards(
    source: Source,
    name: str,
    dtype: Any,
    box: tuple[tuple[int, int], ...],
    devices: list[jax.Device],
    count: Callable[[], None],
) -> list[jax.Array]:
    """The part `box` of a parameter, on each of `devices`."""
    pieces = source.pieces[name]
    if len(pieces) == 1 and all(fixed is None for fixed in pieces[0].at):
        value = source.read(pieces[0], tuple(slice(*ends) for ends in box), dtype)
        count()
        return [jax.device_put(value, device) for device in devices]
    shape = [stop - start for start, stop in box]
    shards = [jnp.zeros(shape, dtype, device=device) for device in devices]
    for piece in pieces:
        if all(f is None or start <= f < stop for f, (start, stop) in zip(piece.at, box)):
            free = tuple(slice(*ends) for f, ends in zip(piece.at, box) if f is None)
            value = source.read(piece, free, dtype)
            fixed_axes = tuple(i for i, f in enumerate(piece.at) if f is not None)
            value = np.expand_dims(value, fixed_axes)
            begin = [0 if f is None else f - start for f, (start, _) in zip(piece.at, box)]
            # Waited for: otherwise pieces on their way to the device would pile up on the host.
            shards = [jax.block_until_ready(_inserted(shard, value, begin)) for shard in shards]
        count()
    return shards


def _inserted(whole: jax.Array, part: np.ndarray, begin: list[int]) -> jax.Array:
    """`part` written into `whole`, on its device; a mesh of more devices may be in force."""
    (device,) = whole.devices()
    with compat.set_mesh(jax.sharding.Mesh(np.array([device]), ("one",))):
        return _insert(whole, part, begin)


@functools.partial(jax.jit, donate_argnums=0)
def _insert(whole: jax.Array, part: jax.Array, begin: list[int]) -> jax.Array:
    return jax.lax.dynamic_update_slice(whole, part, begin)


def _place(piece: Piece) -> Index:
    return tuple(slice(0, s) if f is None else slice(f, f + 1) for f, s in _sizes(piece))


def _sizes(piece: Piece) -> list[tuple[int | None, int]]:
    """Fixed index and size of each dimension of the parameter (1 where it is fixed)."""
    sizes = iter(piece.shape)
    return [(fixed, next(sizes) if fixed is None else 1) for fixed in piece.at]


def _spelling(
    folder: ForeignFolder, description: Description, pieces: Mapping[str, list[Piece]]
) -> dict[str, str]:
    """Names that this folder begins otherwise than the map."""
    usual, *others = description.prefixes
    if folder.origin == "meta" or description.table in folder.tensors:
        return {}
    table = description.table.removeprefix(usual)
    candidates = [prefix for prefix in others if prefix + table in folder.tensors]
    if not candidates:
        return {}
    names = [piece.tensor for each in pieces.values() for piece in each]
    found = {n: candidates[0] + n.removeprefix(usual) for n in names if n.startswith(usual)}
    head = f"language_model.{description.output}"
    return found | ({description.output: head} if head in folder.tensors else {})


def _check(
    folder: ForeignFolder,
    description: Description,
    pieces: Mapping[str, list[Piece]],
    spelling: Mapping[str, str],
) -> None:
    """Raises `ValueError` for the first tensor that is missing, misshapen, left over or of another kind."""
    needed = {spelling.get(p.tensor, p.tensor): p for each in pieces.values() for p in each}
    there = folder.tensors
    if missing := [name for name in needed if name not in there]:
        raise ValueError(
            f"{folder.path} has no tensor {missing[0]}, which parameter {needed[missing[0]].parameter} "
            f"is made of; {len(missing)} of {len(needed)} are missing: the model here is another one"
        )
    wrong = [name for name, piece in needed.items() if there[name].shape != piece.foreign_shape]
    if wrong:
        name, piece = wrong[0], needed[wrong[0]]
        raise ValueError(
            f"tensor {name} has shape {list(there[name].shape)} in {folder.path} and "
            f"{list(piece.foreign_shape)} in this model (parameter {piece.parameter}); "
            f"{len(wrong)} of {len(needed)} differ: set the sizes of the model that is there"
        )
    if integers := [n for n in needed if not jnp.issubdtype(there[n].dtype, jnp.floating)]:
        raise ValueError(
            f"tensor {integers[0]} in {folder.path} is of type {there[integers[0]].dtype}: quantised "
            "weights are not read, give the original ones"
        )
    extra = [name for name in there if name not in needed and not _is_ignored(name, description)]
    output = spelling.get(description.output, description.output)
    if output in extra and _repeats(
        folder, output, spelling.get(description.table, description.table)
    ):
        extra.remove(output)
    if extra:
        raise ValueError(
            f"tensor {extra[0]} of shape {list(there[extra[0]].shape)} in {folder.path} is no "
            f"parameter of this model; {len(extra)} of {len(there)} are left over: the model here is another one"
        )


def _is_ignored(name: str, description: Description) -> bool:
    return re.fullmatch(description.ignored, name) is not None


def _repeats(folder: ForeignFolder, name: str, other: str) -> bool:
    """Whether an output table is the token table once more, as some files of tied models have it."""
    first, second = folder.tensors[name], folder.tensors.get(other)
    if second is None or first.shape != second.shape or first.dtype != second.dtype:
        return False
    rows, width = first.shape
    step = max(1, _COMPARED_BYTES // (width * first.dtype.itemsize))
    boxes = [(slice(i, min(i + step, rows)), slice(0, width)) for i in range(0, rows, step)]
    return all(first.read(box).tobytes() == second.read(box).tobytes() for box in boxes)
