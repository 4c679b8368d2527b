"""One of several processes that load the same batches.

Its arguments: port, number of processes, number of this one, folder.
"""

import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from paxlike.data.loader import Loader
from paxlike.data.sources import JsonLines
from paxlike.data.tokenizers import ByteTokenizer

port, count, index, folder = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(index))
mesh = jax.sharding.Mesh(
    np.array(jax.devices()).reshape(2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2
)
source = JsonLines(f"{folder}/a.jsonl", part_bytes=300)
loader = Loader(source, 16, ByteTokenizer(), cache_dir=f"{folder}/cache")
for spec in (P(("data", "fsdp")), P("data"), P("fsdp"), P()):
    sharding = NamedSharding(mesh, spec)
    for make in (
        lambda s: loader.batches(global_batch=8, start_step=5, sharding=s),
        lambda s: loader.epoch(global_batch=8, sharding=s),
    ):
        with make(sharding) as batches, make(None) as whole:
            batch, wanted = next(batches), next(whole)
        for key, value in batch.items():
            assert value.shape == wanted[key].shape
            for shard in value.addressable_shards:
                np.testing.assert_array_equal(shard.data, wanted[key][shard.index])
print("digest", loader.fingerprint()["sources"][0]["tokens"])
