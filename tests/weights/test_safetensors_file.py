"""The format, against the library of its makers, and damaged files."""

import ml_dtypes
import numpy as np
import pytest

from paxlike.weights.safetensors_file import Writer, read_header

TENSORS = {
    "a": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "b": np.linspace(-3, 3, 10).astype(ml_dtypes.bfloat16).reshape(5, 2),
    "c": np.array([1, 2, 3], np.int32),
}


@pytest.fixture
def path(tmp_path):
    content = {name: (value.shape, value.dtype) for name, value in TENSORS.items()}
    with Writer(tmp_path / "model.safetensors", content) as writer:
        for name in reversed(TENSORS):  # in any order
            writer.write(name, TENSORS[name])
    return tmp_path / "model.safetensors"


def test_what_is_written_is_read(path):
    found = read_header(path)
    assert list(found) == list(TENSORS)
    for name, value in TENSORS.items():
        assert found[name].dtype == value.dtype
        whole = found[name].read(tuple(slice(0, size) for size in value.shape))
        assert whole.tobytes() == value.tobytes()
    np.testing.assert_array_equal(
        found["a"].read((slice(1, 2), slice(0, 3), slice(1, 3))), TENSORS["a"][1:2, :, 1:3]
    )


@pytest.mark.parity
def test_the_library_reads_it_and_is_read(path, tmp_path):
    pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    theirs = safetensors.load_file(path)
    assert theirs.keys() == TENSORS.keys()
    np.testing.assert_array_equal(theirs["b"].float().numpy(), TENSORS["b"].astype(np.float32))
    safetensors.save_file(theirs, tmp_path / "theirs.safetensors")
    found = read_header(tmp_path / "theirs.safetensors")
    for name, value in TENSORS.items():
        whole = found[name].read(tuple(slice(0, size) for size in value.shape))
        assert whole.tobytes() == value.tobytes() and whole.dtype == value.dtype


def test_another_shape_than_announced(path):
    with (
        Writer(path, {"a": ((2, 2), np.dtype(np.float32))}) as writer,
        pytest.raises(ValueError, match=r"a has shape \(3,\); \(2, 2\) was announced"),
    ):
        writer.write("a", np.zeros(3, np.float32))


def test_the_end_is_missing(path):
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"model.safetensors ends after \d+ of \d+ bytes: copy it"):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n"])
def test_another_file(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"of {len(content)} bytes is not a safetensors file"):
        read_header(path)


@pytest.mark.parametrize(
    "header",
    [
        b"[1, 2, 3]",
        b'{"a": {"dtype": "F32", "shape": [2]}}',
        b'{"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": ',
    ],
)
def test_a_broken_header(path, header):
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match=r"the header of .* cannot be read \(.*\): copy it again"):
        read_header(path)
