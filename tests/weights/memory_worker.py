"""Converts a model of 256 MiB there and back in a process of its own; prints the peak memory of each way in MiB."""

import json
import pathlib
import sys

import numpy as np

from paxlike.weights import LlamaWeights
from paxlike.weights.convert import convert
from paxlike.weights.maps import plan
from paxlike.weights.safetensors_file import Writer

WIDTH, HIDDEN, HEADS, VOCABULARY, LAYERS = 512, 2048, 8, 2048, 16


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """A LLaMA whose largest tensor has 4 MiB."""
    d, f, h, k = WIDTH, HIDDEN, HEADS, WIDTH // HEADS
    block = {f"mixer/{part}/kernel": (layers, d, h, k) for part in ("query", "key", "value")}
    block |= {"mixer/out/kernel": (layers, h, k, d), "ffn/ffn2/kernel": (layers, f, d)}
    block |= {f"ffn/{part}/kernel": (layers, d, f) for part in ("gate", "ffn1")}
    block |= {f"{norm}/scale": (layers, d) for norm in ("mixer_norm", "ffn_norm")}
    model = {"embedding/table": (VOCABULARY, d), "head/table": (VOCABULARY, d), "norm/scale": (d,)}
    return model | {f"stack/period_0/{path}": shape for path, shape in block.items()}


def write_model(folder: pathlib.Path, layers: int) -> int:
    """Random weights as Hugging Face has them; returns their bytes."""
    folder.mkdir()
    pieces = [piece for each in plan(LlamaWeights(), shapes(layers)).values() for piece in each]
    content = {piece.tensor: (piece.foreign_shape, np.dtype(np.float32)) for piece in pieces}
    generator = np.random.default_rng(0)
    with Writer(folder / "model.safetensors", content) as writer:
        for name, (shape, _) in content.items():
            writer.write(name, generator.standard_normal(shape, np.float32))
    return (folder / "model.safetensors").stat().st_size


def peak(work) -> float:
    """MiB that `work` adds to what the process holds, at most."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # The peak is counted from here.
    before = _status("VmRSS")
    work()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def main(folder: pathlib.Path) -> None:
    """Warms up with one layer, so that libraries and thread pools are there; then measures."""
    description = LlamaWeights(config={"model_type": "llama"})
    sizes, found = {}, {}
    for name, layers in {"small": 1, "large": LAYERS}.items():
        root, tree = folder / name, shapes(layers)
        root.mkdir()
        sizes[name] = write_model(root / "in", layers)
        ways = {
            "in": lambda root=root, tree=tree: convert(
                root / "in", root / "run", tree, description
            ),
            "out": lambda root=root, tree=tree: convert(
                root / "run", root / "out", tree, description, max_shard_size="64MB"
            ),
        }
        found = {way: peak(work) for way, work in ways.items()}
    print(json.dumps({"model": sizes["large"] / 2**20, **found}))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
