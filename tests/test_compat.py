"""What differs between versions of jax, and what its compilation cache does not see to."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from paxlike import compat

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
place = compat.program_cache(sys.argv[1])
jax.config.update("jax_compilation_cache_dir", str(place))
assert compat.program_cache(sys.argv[1]) == place
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if "cache_hits" in event else None)
mesh = compat.auto_mesh(jax.devices(), ("data",))
for devices, spec in ((1, None), (2, PartitionSpec("data"))):
    x = jnp.ones(64) if spec is None else jax.device_put(jnp.ones(64), NamedSharding(mesh, spec))
    hits.clear()
    assert float(jax.jit(lambda x: (x * devices).sum())(x)) == 64 * devices
    print(devices, len(hits))
"""


def test_programs_over_several_cpu_devices_are_never_read_back(tmp_path):
    def start() -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, tmp_path], capture_output=True, text=True, cwd=Path.cwd()
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split("\n")[:2]

    assert start() == ["1 0", "2 0"]
    assert start() == [
        "1 1",
        "2 0",
    ]  # the second start reads the first program and compiles the other
    (kind,) = tmp_path.iterdir()
    assert any("lambda" in entry.name for entry in kind.iterdir())
