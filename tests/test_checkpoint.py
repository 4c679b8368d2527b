"""Saving and restoring in one process: bits, meshes, donation, order, keeping, refusals."""

import asyncio
import logging
import subprocess
import sys
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from paxlike.checkpoint import Checkpointer, CheckpointOptions, integrity, quiet, read_metadata
from tests.checkpoint_worker import CONFIG, abstract, assert_same_bits, host_state, mesh_of, put

EVERY = CheckpointOptions(every_n_steps=1, keep_last=None)


def save(checkpointer, step, state=None, **kwargs):
    state = put(host_state(step), mesh_of(2, 2)) if state is None else state
    return checkpointer.save(step, state, data={"step": step}, config=CONFIG, **kwargs)


@pytest.mark.parametrize("shape", [(2, 2), (1, 4), (4, 1), (1, 1)])
@pytest.mark.parametrize("ema", [False, True])
def test_restores_the_same_bits_on_any_mesh(tmp_path, shape, ema):
    state = host_state(7, ema=ema)
    with Checkpointer(tmp_path, EVERY) as checkpointer:
        assert save(checkpointer, 7, put(state, mesh_of(2, 2)), config_text="Tiny: ...")
    wanted = abstract(state, mesh_of(*shape))
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        restored = checkpointer.restore(wanted)
    assert_same_bits(restored.state, state)
    for leaf, asked in zip(jax.tree.leaves(restored.state), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding == asked.sharding
    assert (restored.step, restored.data, restored.config) == (7, {"step": 7}, CONFIG)
    assert restored.config_text == "Tiny: ..."


def test_layout_and_metadata(tmp_path):
    with Checkpointer(tmp_path, EVERY) as checkpointer:
        save(checkpointer, 100)
    folder = tmp_path / "checkpoints/checkpoint_00000100"
    items = {entry.name for entry in folder.iterdir() if entry.is_dir()}
    assert items == {"state", "data", "config", "metadata"}
    metadata = read_metadata(tmp_path)
    assert metadata["mesh"] == {"axes": ["data", "fsdp"], "shape": [2, 2]}
    assert metadata["versions"]["jax"] == jax.__version__
    assert metadata["num_processes"] == 1
    assert metadata["arrays"]["params/decoder/w"] == {"shape": [8, 16], "dtype": "float32"}
    assert "opt_state/1/0/mu/decoder/b" in metadata["arrays"]


def test_no_checkpoint_is_none(tmp_path):
    wanted = abstract(host_state(0), mesh_of(1, 1))
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore(wanted) is None
        assert checkpointer.latest_step() is None
    with Checkpointer(tmp_path / "never made", read_only=True) as checkpointer:
        assert checkpointer.restore(wanted) is None


def test_buffers_may_be_donated_right_after_save(tmp_path):
    mesh = mesh_of(2, 2)
    step_function = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    sharding = NamedSharding(mesh, P("data", "fsdp"))
    state = {"w": jax.device_put(jnp.zeros((2048, 1024)), sharding), "n": jnp.int32(0)}
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    with Checkpointer(tmp_path, EVERY) as checkpointer:
        for step in range(5):
            save(checkpointer, step, state, force=True)
            # The CPU backend lends its memory to the save and then copies instead of donating the
            # first time; the second and third step write over donated memory.
            for _ in range(3):
                before, state = state, step_function(state)
            assert before["w"].is_deleted()
            jax.block_until_ready(state)
        for step in range(5):
            restored = checkpointer.restore(wanted, step=step).state
            assert int(restored["n"]) == 3 * step
            assert np.unique(np.asarray(restored["w"])).tolist() == [3.0 * step]


def test_save_returns_before_the_files_are_complete(tmp_path, monkeypatch):
    may_finish, write = threading.Event(), integrity.write_manifest

    def write_later(*args, **kwargs):
        assert may_finish.wait(60)
        write(*args, **kwargs)

    monkeypatch.setattr(integrity, "write_manifest", write_later)
    state = put(host_state(1), mesh_of(2, 2))
    with Checkpointer(tmp_path, EVERY) as checkpointer:
        assert save(checkpointer, 1, state)
        assert checkpointer.all_steps() == []
        jax.tree.map(lambda x: x.delete(), state)
        may_finish.set()
        checkpointer.wait()
        assert checkpointer.all_steps() == [1]
        wanted = abstract(host_state(1), mesh_of(2, 2))
        assert_same_bits(checkpointer.restore(wanted).state, host_state(1))
        assert checkpointer.last_stall_seconds > 0


@pytest.mark.parametrize("how", ["wait", "synchronous"])
def test_waiting_saves_are_complete_on_return(tmp_path, how):
    options = CheckpointOptions(every_n_steps=1, asynchronous=how == "wait")
    with Checkpointer(tmp_path, options) as checkpointer:
        save(checkpointer, 1, wait=how == "wait")
        assert checkpointer.latest_step() == 1
        save(checkpointer, 2, wait=how == "wait")
        assert checkpointer.latest_step() == 2


def test_dtype_is_the_one_asked_for_and_a_change_is_said(tmp_path, caplog):
    sharding = NamedSharding(mesh_of(2, 2), P("data"))
    state = {"w": jax.device_put(np.linspace(0, 3, 8, dtype=np.float32), sharding)}
    with Checkpointer(tmp_path, EVERY) as checkpointer:
        save(checkpointer, 1, state, wait=True)
        wanted = {"w": jax.ShapeDtypeStruct((8,), jnp.bfloat16, sharding=sharding)}
        restored = checkpointer.restore(wanted).state
    np.testing.assert_array_equal(restored["w"], np.asarray(state["w"]).astype(jnp.bfloat16))
    assert restored["w"].dtype == jnp.bfloat16
    assert "1 arrays of" in caplog.text
    assert "w from float32 to bfloat16" in caplog.text


@pytest.mark.parametrize(
    "keep, kept",
    [
        ({"keep_last": 2}, [5, 6]),
        ({"keep_last": 1, "keep_every_n_steps": 2}, [2, 4, 6]),
        ({"keep_last": 1, "keep_every_n_steps": 4}, [4, 6]),
        ({"keep_last": None}, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_keeps_the_last_and_every_nth(tmp_path, keep, kept):
    with Checkpointer(tmp_path, CheckpointOptions(every_n_steps=1, **keep)) as checkpointer:
        state = {"w": jnp.zeros(3)}
        for step in range(1, 7):
            save(checkpointer, step, state)
        checkpointer.wait()
        assert checkpointer.all_steps() == kept
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("checkpoint_*")) == [
        f"checkpoint_{step:08d}" for step in kept
    ]


def test_due_by_steps_and_force(tmp_path):
    with Checkpointer(tmp_path, CheckpointOptions(every_n_steps=3)) as checkpointer:
        assert [step for step in range(10) if checkpointer.due(step)] == [3, 6, 9]
        state = {"w": jnp.zeros(3)}
        assert [step for step in range(1, 7) if save(checkpointer, step, state)] == [3, 6]
        assert save(checkpointer, 7, state, force=True)
        assert not save(checkpointer, 7, state, force=True)
        assert not checkpointer.due(6)
    for off in (0, None):
        with Checkpointer(tmp_path, CheckpointOptions(every_n_steps=off)) as checkpointer:
            assert not any(checkpointer.due(step) for step in range(10))


def test_due_by_minutes(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    options = CheckpointOptions(every_n_steps=100, every_minutes=10)
    with Checkpointer(tmp_path, options) as checkpointer:
        assert not checkpointer.due(1)
        now[0] += 599
        assert not checkpointer.due(2)
        assert checkpointer.due(100)
        now[0] += 1
        assert checkpointer.due(3)
        assert save(checkpointer, 3, {"w": jnp.zeros(3)})
        assert not checkpointer.due(4)


def test_the_restored_step_is_not_saved_again(tmp_path):
    with Checkpointer(tmp_path, EVERY) as checkpointer:
        save(checkpointer, 4)
    with Checkpointer(tmp_path, EVERY) as checkpointer:
        checkpointer.restore(abstract(host_state(0), mesh_of(2, 2)))
        assert not save(checkpointer, 4, force=True)
        assert save(checkpointer, 5)


def test_going_back_puts_later_checkpoints_aside(tmp_path, caplog):
    with Checkpointer(tmp_path, EVERY) as checkpointer:
        for step in (1, 2, 3, 4):
            save(checkpointer, step)
    wanted = abstract(host_state(0), mesh_of(2, 2))
    with Checkpointer(tmp_path, EVERY) as checkpointer:
        assert checkpointer.restore(wanted, step=2).step == 2
        assert checkpointer.all_steps() == [1, 2, 3, 4]
        other = host_state(33)
        save(checkpointer, 3, put(other, mesh_of(2, 2)), wait=True)
        assert checkpointer.all_steps() == [1, 2, 3]
        assert_same_bits(checkpointer.restore(wanted).state, other)
    assert (tmp_path / "checkpoints/checkpoint_00000004.superseded").is_dir()
    assert (
        "checkpoint_00000004 is superseded: kept as checkpoint_00000004.superseded" in caplog.text
    )


def test_a_missing_step_is_named_with_those_there_are(tmp_path):
    wanted = abstract(host_state(0), mesh_of(1, 1))
    with Checkpointer(tmp_path, EVERY) as checkpointer:
        with pytest.raises(ValueError, match=r"no checkpoint of step 9 in .*; there are none"):
            checkpointer.restore(wanted, step=9)
        save(checkpointer, 1)
        save(checkpointer, 2)
        with pytest.raises(
            ValueError, match=r"no checkpoint of step 9 in .*; there are steps 1, 2"
        ):
            checkpointer.restore(wanted, step=9)


def test_a_changed_model_is_refused_before_reading(tmp_path, monkeypatch):
    with Checkpointer(tmp_path, EVERY) as checkpointer:
        was = "# tree\nmodel.slope = 1\n"
        save(checkpointer, 1, wait=True, config_text=was)
        monkeypatch.setattr("paxlike.checkpoint.arrays.read_arrays", None)
        same = abstract(host_state(0), mesh_of(2, 2))
        with pytest.raises(ValueError, match="other settings: model.slope was 1 and is 2; go on"):
            checkpointer.restore(same, config_text=was.replace("1", "2"))
        wide = abstract(host_state(0, width=32), mesh_of(2, 2))
        with pytest.raises(ValueError, match="is of another model or optimizer: ") as caught:
            checkpointer.restore(wide)
        text = str(caught.value)
        assert "\n" not in text
        assert "params/decoder/b has shape [32] here and [16] in the checkpoint" in text
        assert "6 of 12 arrays differ; take another job_log_dir" in text
        without = abstract(host_state(0), mesh_of(2, 2))
        without.params["decoder"].pop("b")
        with pytest.raises(ValueError, match=r"params/decoder/b is not here and has shape \[16\]"):
            checkpointer.restore(without)
        more = abstract(host_state(0, ema=True), mesh_of(2, 2))
        with pytest.raises(
            ValueError, match=r"collections/key has shape \[2\] here and is not in the checkpoint"
        ):
            checkpointer.restore(more)


@pytest.mark.parametrize(
    "wrong, text",
    [
        ({"every_n_steps": -1}, "every_n_steps=-1: it must be a number of steps, or None or 0"),
        ({"every_n_steps": 2.5}, "every_n_steps=2.5: it must be a number of steps"),
        ({"every_n_steps": True}, "every_n_steps=True: it must be a number of steps"),
        ({"every_minutes": "5"}, "every_minutes='5': it must be a number of minutes"),
        ({"every_minutes": float("nan")}, "every_minutes=nan: it must be a number of minutes"),
        ({"keep_last": 0}, "keep_last=0: it must be at least 1, or None to keep all"),
        ({"keep_every_n_steps": -5}, "keep_every_n_steps=-5: it must be a number of steps"),
    ],
)
def test_options_are_checked(wrong, text):
    with pytest.raises(ValueError, match=text):
        CheckpointOptions(**wrong)


def test_what_cannot_be_saved_is_refused(tmp_path):
    state = {"w": jnp.zeros(3)}
    with Checkpointer(tmp_path, EVERY) as checkpointer:
        with pytest.raises(ValueError, match="n of the state is a int: it must be a jax.Array"):
            save(checkpointer, 1, state | {"n": 3})
        with pytest.raises(ValueError, match="is not JSON: Object of type int64"):
            checkpointer.save(1, state, data={"step": np.int64(3)}, config=CONFIG)
        with pytest.raises(ValueError, match="2 arrays have only 1 different names: a key contai"):
            save(checkpointer, 1, {"a/b": jnp.zeros(3), "a": {"b": jnp.zeros(3)}})
        bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        save(checkpointer, 1, state)
        with pytest.raises(ValueError, match="no sharding is given for w: each ShapeDtypeStruct"):
            checkpointer.restore(bare)
    with (
        Checkpointer(tmp_path, EVERY, read_only=True) as checkpointer,
        pytest.raises(ValueError, match="step 2 cannot be saved: .* was opened read_only"),
    ):
        save(checkpointer, 2, state)


def test_a_second_writer_is_refused_and_a_reader_is_not(tmp_path):
    with Checkpointer(tmp_path, EVERY) as checkpointer:
        save(checkpointer, 1, wait=True)
        with pytest.raises(
            OSError, match=r"is being written by another run \(this one\)"
        ) as caught:
            Checkpointer(tmp_path, EVERY)
        assert "\n" not in str(caught.value)
        assert "take another job_log_dir" in str(caught.value)
        with Checkpointer(tmp_path, read_only=True) as reader:
            assert reader.restore(abstract(host_state(0), mesh_of(1, 1))).step == 1
    Checkpointer(tmp_path, EVERY).close()


def test_a_writer_in_another_process_is_named_until_it_dies(tmp_path):
    Checkpointer(tmp_path, EVERY).close()
    hold = (
        "import fcntl, os, sys; handle = os.open(sys.argv[1], os.O_RDWR); "
        "fcntl.lockf(handle, fcntl.LOCK_EX); os.pwrite(handle, b'job 7   ' * 9, 0); "
        "print(flush=True); input()"
    )
    command = [sys.executable, "-c", hold, tmp_path / "checkpoints/.writer"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(OSError, match=r"is being written by another run \(job 7 .*: stop it"):
            Checkpointer(tmp_path, EVERY)
        other.kill()
    Checkpointer(tmp_path, EVERY).close()


def test_an_error_in_the_loop_is_not_hidden_by_the_checkpointer(tmp_path):
    with (
        pytest.raises(ZeroDivisionError),
        Checkpointer(tmp_path, EVERY) as checkpointer,
    ):
        save(checkpointer, 1)
        _ = 1 / 0
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        assert checkpointer.all_steps() == [1]
        checkpointer.close()


def test_orbax_is_silent(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    with Checkpointer(tmp_path, EVERY) as checkpointer:
        save(checkpointer, 1)
    assert not [record for record in caplog.records if record.name == "absl"]


def test_what_orbax_leaves_behind_of_a_failed_save_is_not_shown(monkeypatch, caplog):
    """Abandoned tasks, by the logger of asyncio, and what TensorStore tells a closed event loop."""
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    quiet.quiet_orbax()
    loop = asyncio.new_event_loop()
    loop.close()
    with pytest.raises(RuntimeError) as closed:
        loop.call_soon_threadsafe(print)
    args = {"exc_type": RuntimeError, "exc_value": closed.value, "object": None}
    sys.unraisablehook(types.SimpleNamespace(**args, exc_traceback=closed.tb.tb_next))
    assert not shown
    sys.unraisablehook(types.SimpleNamespace(**args, exc_traceback=closed.tb))  # with a caller
    assert len(shown) == 1
    logger = logging.getLogger("asyncio")
    where = (
        "<Task finished name='Task-9' coro=<write() done, defined at /x/{}/a.py:3> exception=..."
    )
    for place in ("orbax", "tensorstore", "mine"):
        logger.error("Task exception was never retrieved\nfuture: " + where.format(place))
    assert [place in caplog.text for place in ("orbax", "tensorstore", "mine")] == [
        False,
        False,
        True,
    ]
