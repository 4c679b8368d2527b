"""One of several processes that import the same weights: keeps its shards, what it read, and how it failed."""

import json
import pathlib
import sys

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)


def main(address: str, count: int, index: int, folder: pathlib.Path) -> None:
    """Sees `folder`/model, and a folder that is whole in process 0 only."""
    jax.distributed.initialize(address, count, index, initialization_timeout=60)
    import numpy as np

    from paxlike.checkpoint import arrays
    from paxlike.weights import LlamaWeights, import_params
    from paxlike.weights.safetensors_file import StoredTensor
    from tests.weights import models

    read, num_bytes = StoredTensor.read, [0]

    def counted(tensor, box):
        value = read(tensor, box)
        num_bytes[0] += value.nbytes
        return value

    StoredTensor.read = counted
    tree = models.abstract(models.shapes("llama"), mesh=(2, 2))
    params = arrays.named_leaves(import_params(folder / "model", tree, LlamaWeights()))
    kept = {
        f"{name}|{number}": np.asarray(shard.data)
        for name, leaf in params.items()
        for number, shard in enumerate(leaf.addressable_shards)
    }
    places = {
        f"{name}|{number}": [part.indices(size)[:2] for part, size in zip(shard.index, leaf.shape)]
        for name, leaf in params.items()
        for number, shard in enumerate(leaf.addressable_shards)
    }
    report = {"places": places, "bytes": num_bytes[0]}
    try:
        import_params(folder / f"only_in_{index}", tree, LlamaWeights())
    except ValueError as error:
        report["error"] = str(error)
    np.savez(folder / f"shards_{index}.npz", **kept)
    (folder / f"report_{index}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), pathlib.Path(sys.argv[4]))
