"""States to save, and the programs that the checkpoint tests run (and kill) as own processes."""

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

CONFIG = json.dumps({"name": "Tiny"})


@flax.struct.dataclass
class State:
    """The fields of a training state."""

    step: Any
    params: Any
    opt_state: Any
    collections: Any
    ema: Any
    skipped_steps: Any


def mesh_of(*shape: int) -> Mesh:
    """A mesh of that shape over the first devices, axes data and fsdp."""
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def host_state(seed: int, *, width: int = 16, ema: bool = False) -> State:
    """Random bits of every dtype, in numpy: NaNs with a payload are among them."""
    rng = np.random.default_rng(seed)

    def bits(shape, dtype):
        return rng.integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8).view(dtype)[
            ..., 0
        ]

    params = {
        "decoder": {"w": bits((8, width), np.float32), "b": bits((width,), jnp.bfloat16)},
        "scale": bits((), np.float32),
    }
    moments = optax.ScaleByAdamState(
        np.int32(seed), bits_like(params, bits), bits_like(params, bits)
    )
    return State(
        step=np.int32(seed),
        params=params,
        opt_state=(optax.EmptyState(), (moments, optax.EmptyState())),
        collections={"key": bits((2,), np.uint32)} if ema else {},
        ema=bits_like(params, bits) if ema else None,
        skipped_steps=np.int32(0),
    )


def bits_like(tree, bits):
    return jax.tree.map(lambda leaf: bits(leaf.shape, leaf.dtype), tree)


def sharding_of(leaf, mesh: Mesh) -> NamedSharding:
    """Matrices over both axes, everything else replicated."""
    return NamedSharding(mesh, P("data", "fsdp") if np.ndim(leaf) == 2 else P())


def put(state, mesh: Mesh):
    """The state on the devices of `mesh`, of however many processes."""

    def one(leaf):
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(
            leaf.shape, sharding_of(leaf, mesh), lambda index: leaf[index]
        )

    return jax.tree.map(one, state)


def abstract(state, mesh: Mesh):
    """What to ask of a checkpoint to get `state` on `mesh`."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_of(leaf, mesh)),
        state,
    )


def assert_same_bits(actual, expected):
    """Same tree, dtypes, shapes and bits; of an array over several processes, what is here."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, here), there in zip(
        jax.tree_util.tree_flatten_with_path(actual)[0], jax.tree.leaves(expected), strict=True
    ):
        there = np.asarray(there)
        assert (here.dtype, here.shape) == (there.dtype, there.shape), path
        for shard in here.addressable_shards:
            assert np.asarray(shard.data).tobytes() == there[shard.index].tobytes(), path


def train_until_killed(folder: str, width: str) -> None:
    """Saves every step for ever; a state is a function of its step: any mixture shows."""
    from paxlike.checkpoint import Checkpointer, CheckpointOptions

    mesh = mesh_of(2, 2)
    options = CheckpointOptions(every_n_steps=1, keep_last=2)
    with Checkpointer(Path(folder), options) as checkpointer:
        template = abstract(host_state(0, width=int(width)), mesh)
        restored = checkpointer.restore(template)
        step = 0
        if restored is not None:
            step = restored.step
            assert_same_bits(restored.state, host_state(step, width=int(width)))
            assert restored.data == {"step": step}
        print("resumed", step, flush=True)
        while True:
            step += 1
            state = put(host_state(step, width=int(width)), mesh)
            checkpointer.save(step, state, data={"step": step}, config=CONFIG)
            print("complete", checkpointer.latest_step(), flush=True)


def train_until_asked(folder: str, report: str) -> None:
    """A loop of two processes that stops at a signal to one of them."""
    from paxlike.checkpoint import (
        EXIT_PREEMPTED,
        Checkpointer,
        CheckpointOptions,
        TerminationSignal,
    )

    state = put(host_state(1), mesh_of(2, 2))
    options = CheckpointOptions(every_n_steps=None)
    with Checkpointer(Path(folder), options) as checkpointer, TerminationSignal() as stop:
        for step in range(1, 10**6):
            time.sleep(0.002 * (1 + jax.process_index()))
            if step == 15:
                print("running", flush=True)
            stopping = stop.agreed()
            checkpointer.save(
                step, state, data={"step": step}, config=CONFIG, force=stopping, wait=stopping
            )
            if stopping:
                Path(f"{report}.{jax.process_index()}").write_text(f"{step} {stop.received}")
                sys.exit(EXIT_PREEMPTED)


def several_processes(folder: str, report: str) -> None:
    """All that two processes do together, in one start; writes what it saw."""
    from paxlike.checkpoint import (
        Checkpointer,
        CheckpointOptions,
        restore_params,
        wait_for_new_checkpoint,
    )
    from paxlike.cluster import processes

    me = jax.process_index()
    seen: dict[str, Any] = {"shared": processes.share("test", str(me)), "due": []}
    seen["first"] = [processes.from_first("test", text if me == 0 else "?") for text in ("", "x")]
    seen["partly"] = processes.share("test", "only 1" if me == 1 else None)
    mesh, one = mesh_of(2, 2), host_state(1)
    template = abstract(one, mesh)
    with Checkpointer(Path(folder, "ours"), CheckpointOptions(every_n_steps=10)) as checkpointer:
        assert checkpointer.restore(template) is None
        for step in (10, 20):
            state = put(host_state(step), mesh)
            assert checkpointer.save(step, state, data={"step": step}, config=CONFIG)
        local = state.replace(step=jnp.int32(3))
        seen["local"] = message(
            lambda: checkpointer.save(30, local, data={}, config=CONFIG, force=True)
        )
        checkpointer.wait()
        assert_same_bits(checkpointer.restore(template).state, host_state(20))
        processes.share("before damage", None)
        if me == 0:
            largest = max(
                Path(folder, "ours/checkpoints/checkpoint_00000020/state").rglob("*"),
                key=lambda path: path.stat().st_size if path.is_file() else -1,
            )
            content = bytearray(largest.read_bytes())
            content[len(content) // 2] ^= 1
            largest.write_bytes(bytes(content))
        processes.share("after damage", None)
        restored = checkpointer.restore(template)
        seen["after_damage"] = restored.step
        assert_same_bits(restored.state, host_state(10))
        wide = abstract(host_state(1, width=32), mesh)
        seen["model"] = message(lambda: checkpointer.restore(wide))
        params = restore_params(Path(folder, "ours"), template.params)
        assert_same_bits(params, host_state(10).params)
    by_minutes = CheckpointOptions(every_n_steps=None, every_minutes=1e-9 if me == 0 else 1e9)
    with Checkpointer(Path(folder, "clock"), by_minutes) as checkpointer:
        seen["due"] = [step for step in range(1, 31) if checkpointer.due(step)]
    with Checkpointer(Path(folder, "theirs"), read_only=True) as checkpointer:
        assert_same_bits(checkpointer.restore(template).state, host_state(5))
    seen["followed"] = list(wait_for_new_checkpoint(Path(folder, "theirs"), timeout_seconds=0))
    beside_a_file = Path(folder, "file")
    seen["unwritable"] = message(lambda: Checkpointer(beside_a_file))
    Path(f"{report}.{me}").write_text(json.dumps(seen))


def message(call) -> str:
    try:
        call()
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


if __name__ == "__main__":
    program, num_devices, cluster, *arguments = sys.argv[1:]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(num_devices))
    if cluster != "alone":
        address, count, index = cluster.split(",")
        jax.distributed.initialize(
            address,
            int(count),
            int(index),
            initialization_timeout=60,
            heartbeat_timeout_seconds=10,
        )
    signal.alarm(120)
    globals()[program](*arguments)
