"""Converting on disk: an ordinary checkpoint, or a folder of Hugging Face, comes out, and memory stays small."""

import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from paxlike.checkpoint import (
    Checkpointer,
    CheckpointOptions,
    arrays,
    read_metadata,
    restore_params,
    restore_variables,
)
from paxlike.weights import LlamaWeights, import_params
from paxlike.weights.convert import convert
from paxlike.weights.exporting import num_bytes
from paxlike.weights.safetensors_file import read_header
from tests.weights import folders, models

SHAPES = models.shapes("llama")
LLAMA = LlamaWeights(config=folders.CONFIG)


@pytest.fixture
def source(tmp_path):
    return folders.write(tmp_path / "hf", folders.random_tensors())


def contents(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in read_header(file).items():
            found[name] = tensor.read(tuple(slice(0, size) for size in tensor.shape))
    return found


@pytest.mark.parametrize("mesh", [(1, 1), (2, 2)])
def test_a_converted_checkpoint_is_an_ordinary_one(source, tmp_path, mesh):
    assert convert(source, tmp_path / "run", SHAPES, LLAMA, config='{"a": 1}') == "paxlike"
    wanted = models.abstract(SHAPES, mesh=mesh)
    direct = import_params(source, wanted, LLAMA)
    models.assert_same(restore_params(tmp_path / "run", wanted), direct)
    weights = restore_variables(tmp_path / "run", {"params": wanted})
    assert (weights.step, weights.use) == (0, "params")
    models.assert_same(weights.variables["params"], direct)
    assert read_metadata(tmp_path / "run")["step"] == 0
    config = tmp_path / "run" / "checkpoints" / "checkpoint_00000000" / "config" / "metadata"
    assert json.loads(config.read_text())["json"] == '{"a": 1}'


def test_there_and_back(source, tmp_path):
    convert(source, tmp_path / "run", SHAPES, LLAMA)
    assert convert(tmp_path / "run", tmp_path / "out", SHAPES, LLAMA) == "huggingface"
    before, after = contents(source), contents(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == folders.CONFIG | {"dtype": "float32", "torch_dtype": "float32"}


def test_from_a_checkpoint_of_training(source, tmp_path):
    """Whose chunks hold all layers, and parts of dimensions."""
    params = import_params(source, models.abstract(SHAPES, mesh=(2, 2)), LLAMA)
    with Checkpointer(tmp_path / "run", CheckpointOptions(every_n_steps=1)) as checkpointer:
        state = {"params": params, "ema": _map(params, lambda leaf: leaf + 1)}
        checkpointer.save(3, state, data={}, config="{}", force=True)
    convert(tmp_path / "run", tmp_path / "out", SHAPES, LLAMA)
    before, after = contents(source), contents(tmp_path / "out")
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    convert(tmp_path / "run", tmp_path / "ema", SHAPES, LLAMA, use="ema", step=3)
    name = "model.layers.2.self_attn.k_proj.weight"
    np.testing.assert_array_equal(contents(tmp_path / "ema")[name], before[name] + 1)


def test_bfloat16_rounds_once(source, tmp_path):
    convert(source, tmp_path / "run", SHAPES, LLAMA, dtype="bfloat16")
    wanted = models.abstract(SHAPES, dtype=jnp.bfloat16)
    expected = _map(import_params(source, models.abstract(SHAPES), LLAMA), _half)
    models.assert_same(restore_params(tmp_path / "run", wanted), expected)
    convert(tmp_path / "run", tmp_path / "out", SHAPES, LLAMA, dtype="bfloat16")
    before = contents(source)
    for name, value in contents(tmp_path / "out").items():
        assert value.tobytes() == before[name].astype(ml_dtypes.bfloat16).tobytes()


def test_files_of_a_given_size(source, tmp_path):
    convert(source, tmp_path / "out", SHAPES, LLAMA, to="huggingface", max_shard_size="20KB")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 20_000 + 4096 for file in files)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    before, after = contents(source), contents(tmp_path / "out")
    assert index["weight_map"].keys() == after.keys() == before.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in before.values())
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)


@pytest.mark.skipif(
    not pathlib.Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc"
)
def test_memory_stays_near_one_tensor(tmp_path, root):
    """264 MiB in tensors of at most 4 MiB: neither way adds 64 MiB."""
    done = subprocess.run(
        [sys.executable, "tests/weights/memory_worker.py", str(tmp_path)],
        cwd=root,
        env={"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["model"] > 256
    assert found["in"] < 64 and found["out"] < 64, found


def refused(match, *args, kind=ValueError, **options):
    with pytest.raises(kind, match=match) as caught:
        convert(*args, **options)
    assert "\n" not in str(caught.value)


def test_where_something_is_already(source, tmp_path):
    convert(source, tmp_path / "run", SHAPES, LLAMA)
    refused(
        "run/checkpoints has checkpoints already \\(steps 0\\): choose another folder",
        source,
        tmp_path / "run",
        SHAPES,
        LLAMA,
    )
    refused(
        "hf is not empty: choose another output folder", tmp_path / "run", source, SHAPES, LLAMA
    )
    (tmp_path / "empty").mkdir()
    convert(tmp_path / "run", tmp_path / "empty", SHAPES, LLAMA)
    assert len(contents(tmp_path / "empty")) == 39
    refused("no is not a folder: make it", tmp_path / "run", tmp_path / "no" / "x", SHAPES, LLAMA)


def test_what_cannot_be_converted(source, tmp_path):
    output = tmp_path / "out"
    refused(
        "no weights in .*nothing: a checkpoint of paxlike",
        tmp_path / "nothing",
        output,
        SHAPES,
        LLAMA,
    )
    refused(
        "nothing is no folder of Hugging Face or Meta with weights",
        tmp_path / "nothing",
        output,
        SHAPES,
        LLAMA,
        to="paxlike",
    )
    refused(
        "dtype='int4' is none of float32, bfloat16", source, output, SHAPES, LLAMA, dtype="int4"
    )
    refused(
        r"step=3 and use='params' choose in .* is none: leave them",
        source,
        output,
        SHAPES,
        LLAMA,
        step=3,
    )
    refused(
        "step=None and use='ema' choose in a checkpoint", source, output, SHAPES, LLAMA, use="ema"
    )
    refused(
        "max_shard_size=1GB is for Hugging", source, output, SHAPES, LLAMA, max_shard_size="1GB"
    )
    convert(source, tmp_path / "run", SHAPES, LLAMA)
    other = models.shapes("llama", layers=2)
    refused(
        r"do not fit this model: .* has shape \[2, 32\] here and \[4, 32\] in the checkpoint; .* take the config",
        tmp_path / "run",
        output,
        other,
        LLAMA,
    )
    refused(
        "here have no config: without config.json", tmp_path / "run", output, SHAPES, LlamaWeights()
    )
    refused(
        "has no 'ema' weights; it has params", tmp_path / "run", output, SHAPES, LLAMA, use="ema"
    )
    assert not output.exists()


def test_a_damaged_checkpoint(source, tmp_path):
    convert(source, tmp_path / "run", SHAPES, LLAMA)
    folder = tmp_path / "run" / "checkpoints" / "checkpoint_00000000"
    largest = max(folder.rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    content = bytearray(largest.read_bytes())
    content[-9] ^= 1
    largest.write_bytes(content)
    refused("is damaged .*CRC-32", tmp_path / "run", tmp_path / "out", SHAPES, LLAMA)


def test_nothing_half_written_stays(source, tmp_path, monkeypatch):
    """A tensor that breaks in the middle: neither output has its name, and both can be written again."""
    from paxlike.weights.safetensors_file import StoredTensor

    convert(source, tmp_path / "run", SHAPES, LLAMA)
    read = StoredTensor.read

    def breaks(tensor, index):
        if tensor.shape == (32, 48):
            raise OSError(5, "Input/output error")
        return read(tensor, index)

    monkeypatch.setattr(StoredTensor, "read", breaks)
    refused(
        "could not be saved: .*Input/output error",
        source,
        tmp_path / "a",
        SHAPES,
        LLAMA,
        kind=OSError,
    )
    refused(
        "Input/output error", source, tmp_path / "b", SHAPES, LLAMA, to="huggingface", kind=OSError
    )
    monkeypatch.undo()
    assert not list((tmp_path / "a" / "checkpoints").glob("checkpoint*"))
    assert not (tmp_path / "b").exists() and not list(tmp_path.glob(".b*"))
    convert(source, tmp_path / "a", SHAPES, LLAMA)
    convert(source, tmp_path / "b", SHAPES, LLAMA, to="huggingface")


def test_sizes_in_words():
    assert [num_bytes(size) for size in ("5GB", "1.5 MB", "200kb", 7)] == [
        5 * 10**9,
        1500000,
        200000,
        7,
    ]
    for size in ("5 apples", "0", "-1GB", ""):
        with pytest.raises(
            ValueError, match=f"max_shard_size={size!r} is no size: write it as 5GB"
        ):
            num_bytes(size)


def _map(tree, function):
    named = arrays.named_leaves(tree)
    return arrays.with_leaves(tree, {name: function(leaf) for name, leaf in named.items()})


def _half(leaf):
    return leaf.astype(jnp.bfloat16)
