"""A folder of weights that another program wrote, seen as names, types, shapes and readable boxes.

Nothing is read when a folder is opened but headers. Which kind it is shows from the names of its files.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from paxlike.weights.maps import Origin
from paxlike.weights.rearrange import Index, Shape

CONFIG, META_CONFIG = "config.json", "params.json"


class Tensor(Protocol):
    """One tensor that can be read in parts."""

    @property
    def shape(self) -> Shape:
        """Of the whole tensor."""

    @property
    def dtype(self) -> np.dtype:
        """As it is stored."""

    def read(self, index: Index) -> np.ndarray:
        """A box of it."""


@dataclasses.dataclass(frozen=True)
class ForeignFolder:
    """Weights of another program.

    Attributes:
      path: the folder.
      origin: whose names and order of rotated pairs the tensors have.
      tensors: by name.
      config: what the folder says about the model, in Hugging Face's terms; None where it says nothing.
      config_file: its name.
    """

    path: Path
    origin: Origin
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] | None
    config_file: str = CONFIG


def is_foreign(path: str | Path) -> bool:
    """Whether `path` is a folder of Hugging Face or Meta rather than one of paxlike's."""
    path = Path(path)
    if not path.is_dir() or (path / "checkpoints").is_dir():
        return False
    names = [entry.name for entry in path.iterdir() if entry.is_file()]
    if META_CONFIG in names or any(_is_weights(name) for name in names):
        return True
    return CONFIG in names and bool(
        {"model_type", "architectures"} & read_json(path / CONFIG).keys()
    )


def need_torch(path: Path) -> None:
    """Raises `ValueError` where torch is not there to read `path`."""
    if importlib.util.find_spec("torch") is None:
        raise ValueError(
            f"{path} is a pickle of PyTorch and needs torch to be read: install torch, or give the "
            "weights as safetensors"
        )


def from_torch(value: Any) -> np.ndarray:
    """A torch tensor as numpy, bfloat16 included, without a copy."""
    import ml_dtypes
    import torch

    value = value.detach()
    if value.dtype == torch.bfloat16:
        return value.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()


@dataclasses.dataclass(frozen=True)
class TorchTensor:
    """A tensor of a memory-mapped pickle."""

    value: Any

    @property
    def shape(self) -> Shape:
        """Of the whole tensor."""
        return tuple(self.value.shape)

    @property
    def dtype(self) -> np.dtype:
        """As it is stored."""
        return from_torch(self.value[..., :0]).dtype

    def read(self, index: Index) -> np.ndarray:
        """A copy of a box."""
        return np.array(from_torch(self.value[index]))


def load_torch(path: Path) -> dict[str, Any]:
    """The tensors of a pickle, mapped rather than read; `ValueError` in one line for anything else."""
    need_torch(path)
    import torch

    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # Whatever a damaged pickle can raise.
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be read by torch ({reason}): copy it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; `ValueError` in one line for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}): copy it again") from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{path} holds a {type(value).__name__} instead of an object: copy it again"
        )
    return value


def _is_weights(name: str) -> bool:
    stem, _, kind = name.rpartition(".")
    return (
        kind == "safetensors"
        or (kind == "pth" and stem.startswith("consolidated"))
        or (kind == "bin" and stem.startswith("pytorch_model"))
        or name.endswith((".safetensors.index.json", ".bin.index.json"))
    )
