"""Checkpoints written and read a layer at a time."""

import logging
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from paxlike.checkpoint import read_metadata, restore_params, streaming
from tests.checkpoint_worker import abstract, mesh_of

ARRAYS = {
    "w": np.arange(5 * 8 * 6, dtype=np.float32).reshape(5, 8, 6),
    "table": np.linspace(-2, 2, 64).reshape(16, 4).astype(ml_dtypes.bfloat16),
    "zero": np.zeros((4, 4), np.float32),
}


def layers(value):
    """One layer after the other, the last one first."""
    whole = tuple(slice(0, size) for size in value.shape[1:])
    for i in reversed(range(len(value))):
        yield (slice(i, i + 1), *whole), value[i : i + 1]


def whole(value):
    yield tuple(slice(0, size) for size in value.shape), value


def streamed():
    found = {
        name: streaming.streamed(value.shape, value.dtype, lambda v=value: whole(v))
        for name, value in ARRAYS.items()
    }
    stack = ARRAYS["w"]
    found["w"] = streaming.streamed(stack.shape, stack.dtype, lambda: layers(stack), num_lead=1)
    return found


@pytest.fixture(params=[1 << 26, 64], ids=["whole layers", "parts of layers"])
def run(request, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "_CHUNK_BYTES", request.param)
    monkeypatch.setattr(streaming, "_BLOCK_BYTES", 2 * request.param)
    folder = streaming.write_params(tmp_path / "run", streamed(), config="{}", config_text="text")
    assert folder == tmp_path / "run" / "checkpoints" / "checkpoint_00000000"
    return tmp_path / "run"


@pytest.mark.parametrize("mesh", [(1, 1), (2, 2)])
def test_it_is_restored_as_any_other(run, mesh):
    params = restore_params(run, abstract(ARRAYS, mesh_of(*mesh)))
    for name, value in ARRAYS.items():
        assert np.asarray(params[name]).tobytes() == value.tobytes()
    assert read_metadata(run)["arrays"]["params/w"] == {"shape": [5, 8, 6], "dtype": "float32"}


def test_it_is_read_by_parts(run):
    found = streaming.open_params(run)
    assert found.keys() == ARRAYS.keys()
    for name, value in ARRAYS.items():
        assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype)
        assert found[name][:].tobytes() == value.tobytes()
    for layer in (3, 0, 4):
        np.testing.assert_array_equal(found["w"][layer], ARRAYS["w"][layer])
        np.testing.assert_array_equal(found["w"][layer, :, 2], ARRAYS["w"][layer, :, 2])


def test_chunks_are_of_one_layer_and_no_larger_than_allowed(run):
    found = streaming.open_params(run)
    chunk = found["w"]._store.chunk_layout.read_chunk.shape
    assert chunk[0] == 1 and np.prod(chunk) * 4 <= max(streaming._CHUNK_BYTES, 4)


def test_only_where_nothing_is(run):
    with pytest.raises(ValueError, match=r"has checkpoints already \(steps 0\): choose another"):
        streaming.write_params(run, streamed())


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="checkpoints cannot be written: .*Not a directory") as caught:
        streaming.write_params(tmp_path / "file", streamed())
    assert "\n" not in str(caught.value)


FULL = """
import pathlib, resource, signal, sys
import numpy as np
from paxlike.checkpoint import streaming
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))
value = np.random.default_rng(0).standard_normal((4, 256, 512), np.float32)
parts = lambda: (((slice(i, i + 1), slice(0, 256), slice(0, 512)), value[i : i + 1]) for i in range(4))
try:
    array = streaming.streamed(value.shape, value.dtype, parts, num_lead=1)
    streaming.write_params(pathlib.Path(sys.argv[1]), {"w": array})
except OSError as error:
    print(error)
"""


def test_a_full_disk(tmp_path, root):
    """Files that may not grow: one line, and nothing half-written stays."""
    environ = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", FULL, tmp_path],
        env=environ,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the checkpoint could not be saved: ")
    assert done.stdout.count("\n") == 1 and "bytes free)" in done.stdout
    assert [each.name for each in (tmp_path / "checkpoints").iterdir()] == [".writer"]


def test_it_says_nothing(run, caplog):
    """Orbax's own lines are dropped, as in a save of training."""
    with caplog.at_level(logging.INFO):
        streaming.write_params(run.with_name("other"), streamed())
    assert [each for each in caplog.records if "orbax" in each.pathname] == []
