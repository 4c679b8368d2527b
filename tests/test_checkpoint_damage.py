"""Kills, damage, leftovers, full and read-only disks: the complete stays, the rest is named."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from paxlike.checkpoint import Checkpointer, CheckpointOptions, integrity, layout
from tests.checkpoint_worker import CONFIG, abstract, assert_same_bits, host_state, mesh_of, put

EVERY = CheckpointOptions(every_n_steps=1, keep_last=None)
WORKER = Path(__file__).with_name("checkpoint_worker.py")


def save_steps(folder, *steps, options=EVERY):
    with Checkpointer(folder, options) as checkpointer:
        for step in steps:
            state = put(host_state(step), mesh_of(2, 2))
            checkpointer.save(step, state, data={"step": step}, config=CONFIG)
    return folder / "checkpoints"


def restore(folder, *, step=None, options=EVERY):
    with Checkpointer(folder, options, read_only=True) as checkpointer:
        return checkpointer.restore(abstract(host_state(0), mesh_of(2, 2)), step=step)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A run with checkpoints 1 and 2, to be copied and damaged."""
    return save_steps(tmp_path_factory.mktemp("run"), 1, 2).parent


@pytest.fixture
def run(two_steps, tmp_path):
    return shutil.copytree(two_steps, tmp_path / "run")


def largest_file(folder):
    return max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )


def flip(path, position=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * position)] ^= 0x10
    path.write_bytes(bytes(content))


def lose_array_file(folder):
    largest_file(folder / "state/ocdbt.process_0/d").unlink()


def truncate(folder):
    path = largest_file(folder / "state/ocdbt.process_0/d")
    os.truncate(path, path.stat().st_size - 1)


def flip_arrays(folder):
    flip(largest_file(folder / "state/ocdbt.process_0/d"))


def empty_file(folder):
    (folder / "state/manifest.ocdbt").write_bytes(b"")


def lose_item(folder):
    shutil.rmtree(folder / "data")


def lose_state(folder):
    shutil.rmtree(folder / "state")


def scramble_metadata(folder):
    (folder / "metadata/metadata").write_bytes(b"\xff" * 7)


def lose_list(folder):
    (folder / integrity.MANIFEST).unlink()


def break_list(folder):
    os.truncate(folder / integrity.MANIFEST, 100)


def empty_folder(folder):
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGE = {
    lose_array_file: r"state/ocdbt.process_0/d/\w+ is missing",
    truncate: r"state/ocdbt.process_0/d/\w+ has \d+ bytes instead of \d+",
    flip_arrays: r"state/ocdbt.process_0/d/\w+ has CRC-32 \w+ instead of \w+",
    empty_file: r"state/manifest.ocdbt has 0 bytes instead of \d+",
    lose_item: "data/metadata is missing",
    lose_state: "state/.* is missing",
    scramble_metadata: r"metadata/metadata has 7 bytes instead of \d+",
    lose_list: "manifest.json: No such file or directory",
    break_list: "manifest.json cannot be read",
    empty_folder: "manifest.json: No such file or directory",
}


@pytest.mark.parametrize(
    "harm, reason", DAMAGE.items(), ids=lambda value: getattr(value, "__name__", "")
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(run, caplog, harm, reason):
    harm(run / "checkpoints/checkpoint_00000002")
    restored = restore(run)
    assert restored.step == 1
    assert_same_bits(restored.state, host_state(1))
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "\n" not in warning
    with pytest.raises(ValueError, match=reason) as caught:
        restore(run, step=2)
    assert "\n" not in str(caught.value)
    assert "checkpoint_00000002 is damaged (" in str(caught.value)
    assert "others: steps 1;" in str(caught.value)
    assert str(caught.value).split("(")[1].split(")")[0] in warning


def test_no_file_can_be_lost_unnoticed(two_steps, tmp_path):
    """Of every single file: either its loss or change is detected, or what is restored is whole."""
    names = sorted(
        path.relative_to(two_steps)
        for path in (two_steps / "checkpoints/checkpoint_00000002").rglob("*")
        if path.is_file()
    )
    assert len(names) > 10
    detected = 0
    for number, name in enumerate(names):
        for harm in (Path.unlink, flip):
            run = shutil.copytree(two_steps, tmp_path / f"run{number}{harm.__name__}")
            harm(run / name)
            restored = restore(run)
            assert_same_bits(restored.state, host_state(restored.step))
            assert restored.data == {"step": restored.step}
            detected += restored.step == 1
            shutil.rmtree(run)
    assert detected >= 2 * (len(names) - 6)  # All but the notes of Orbax, which nobody reads.


def test_without_checksums_sizes_and_what_cannot_be_read_are_noticed(run):
    options = CheckpointOptions(checksums=False)
    flip(run / "checkpoints/checkpoint_00000002/metadata/metadata", position=0)
    assert restore(run, options=options).step == 1
    with pytest.raises(
        ValueError, match=r"damaged \(cannot be read: .*\); others: steps 1"
    ) as caught:
        restore(run, options=options, step=2)
    assert "\n" not in str(caught.value)
    truncate(run / "checkpoints/checkpoint_00000001")
    with pytest.raises(
        ValueError, match="cannot be read: .*, and so are 1 before it; others: none"
    ):
        restore(run, options=options)


def test_a_list_without_checksums_still_has_sizes(tmp_path):
    save_steps(tmp_path, 1, 2, options=CheckpointOptions(every_n_steps=1, checksums=False))
    assert not integrity.has_checksums(tmp_path / "checkpoints/checkpoint_00000002")
    assert restore(tmp_path).step == 2
    truncate(tmp_path / "checkpoints/checkpoint_00000002")
    assert restore(tmp_path).step == 1


def test_when_all_are_damaged_nothing_is_started_anew(run):
    for step in (1, 2):
        flip_arrays(run / f"checkpoints/checkpoint_{step:08d}")
    with pytest.raises(ValueError, match="checkpoint_00000002 is damaged .*, and so are 1 before"):
        restore(run)


def test_a_damaged_checkpoint_is_replaced_by_the_run_that_goes_on(run, caplog):
    flip_arrays(run / "checkpoints/checkpoint_00000002")
    with Checkpointer(run, EVERY) as checkpointer:
        assert checkpointer.restore(abstract(host_state(0), mesh_of(2, 2))).step == 1
        checkpointer.save(2, put(host_state(2), mesh_of(2, 2)), data={"step": 2}, config=CONFIG)
    assert_same_bits(restore(run).state, host_state(2))
    assert (run / "checkpoints/checkpoint_00000002.damaged").is_dir()
    assert "checkpoint_00000002 is damaged: kept as checkpoint_00000002.damaged" in caplog.text


def test_leftovers_are_named_ignored_by_readers_and_removed_by_the_writer(run, caplog):
    half = run / "checkpoints/checkpoint_00000003.orbax-checkpoint-tmp"
    shutil.copytree(run / "checkpoints/checkpoint_00000002", half)
    (run / "checkpoints/checkpoint_00000000.deleting").mkdir()
    assert restore(run).step == 2
    assert "checkpoint_00000000.deleting, checkpoint_00000003.orbax-checkpoint-tmp" in caplog.text
    assert caplog.text.count("half-written checkpoint") == 1
    assert ": ignored" in caplog.text
    assert half.is_dir()
    Checkpointer(run, EVERY).close()
    assert not half.exists()
    assert ": removed" in caplog.text
    assert restore(run).step == 2


@pytest.mark.slow
def test_kill_at_any_moment(tmp_path):
    """A run that only saves is killed and started again: it always goes on from a whole state."""
    complete, resumed = 0, []
    command = [sys.executable, "-u", str(WORKER), "train_until_killed", "4", "alone", str(tmp_path)]
    for _ in range(4):
        with subprocess.Popen(
            [*command, str(1 << 15)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(WORKER.parent.parent)},
        ) as process:
            first = process.stdout.readline()
            assert first.startswith("resumed"), process.stderr.read()
            resumed.append(int(first.split()[1]))
            assert resumed[-1] >= complete
            # Somewhere within the next two steps, however fast the machine is.
            lines = [process.stdout.readline() for _ in range(4)]
            start = time.monotonic()
            lines.append(process.stdout.readline())
            time.sleep(random.uniform(0, 2 * (time.monotonic() - start)))
            process.kill()
            lines += process.stdout.readlines()
            whole_lines = [line for line in lines if line.endswith("\n") and "None" not in line]
            complete = int(whole_lines[-1].split()[1])
            assert process.wait() == -signal.SIGKILL, process.stderr.read()
    assert complete >= 8
    assert resumed == sorted(set(resumed))
    steps = layout.list_steps(tmp_path / "checkpoints")
    folders = [layout.step_folder(tmp_path / "checkpoints", step) for step in steps]
    assert [integrity.damage(folder) for folder in folders] == [None] * len(steps)


@contextlib.contextmanager
def mounted(folder, *options):
    """`folder` as a file system of its own; skips where that is not allowed."""
    folder.mkdir(exist_ok=True)
    command = ["mount", *options, str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_is_one_line_and_costs_no_checkpoint(tmp_path, asynchronous):
    noise = np.random.default_rng(0).standard_normal(300_000, np.float32)
    options = CheckpointOptions(every_n_steps=1, asynchronous=asynchronous)
    small, large = {"w": jnp.asarray(noise[:100])}, {"w": jnp.asarray(noise)}
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=1m", "none") as disk:
        with Checkpointer(disk, options) as checkpointer:
            checkpointer.save(1, small, data={}, config=CONFIG, wait=True)
            with pytest.raises(OSError, match="step 2 could not be saved") as caught:
                checkpointer.save(2, large, data={}, config=CONFIG)
                checkpointer.wait()
            text = str(caught.value)
            assert "\n" not in text
            assert f"{disk}/checkpoints: No space left on device (" in text
            assert "bytes free); complete checkpoints: steps 1" in text
            assert checkpointer.all_steps() == [1]
            # The half-written one is gone, so there is room again.
            assert checkpointer.save(2, small, data={}, config=CONFIG, wait=True)
        with Checkpointer(disk, read_only=True) as checkpointer:
            assert checkpointer.all_steps() == [1, 2]


def test_a_read_only_folder_is_refused_at_once_and_can_be_read(run):
    with mounted(run, "--bind", str(run)):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(run)], check=True)
        with pytest.raises(
            OSError, match="checkpoints cannot be written: .*Read-only file sys"
        ) as e:
            Checkpointer(run, EVERY)
        assert "\n" not in str(e.value)
        assert "bytes free)" in str(e.value)
        assert restore(run).step == 2


def test_a_folder_below_a_file_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError, match=r"checkpoints cannot be written: .*file/run/checkpoints: Not a dir"
    ):
        Checkpointer(tmp_path / "file/run")
