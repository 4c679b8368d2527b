"""Folders of weights made without Hugging Face: random tensors under the names of a family."""

import json
import pathlib

import numpy as np

from paxlike.weights import LlamaWeights
from paxlike.weights.maps import plan
from paxlike.weights.safetensors_file import Writer
from tests.weights import models

CONFIG = {"model_type": "llama", "hidden_size": models.WIDTH, "num_hidden_layers": models.LAYERS}


def random_tensors(shapes=None, *, description=None) -> dict[str, np.ndarray]:
    """All tensors of a family, LLaMA if no other is described, float32."""
    shapes = models.shapes("llama") if shapes is None else shapes
    pieces = plan(description or LlamaWeights(), shapes)
    generator = np.random.default_rng(0)
    return {
        piece.tensor: generator.standard_normal(piece.foreign_shape, np.float32)
        for each in pieces.values()
        for piece in each
    }


def write(folder: pathlib.Path, tensors: dict, config: dict | None = CONFIG) -> pathlib.Path:
    """`model.safetensors` and `config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {name: (value.shape, value.dtype) for name, value in tensors.items()}
    with Writer(folder / "model.safetensors", content) as writer:
        for name, value in tensors.items():
            writer.write(name, value)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder
