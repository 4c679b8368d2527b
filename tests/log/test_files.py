"""Records are written whole or not at all; a folder that takes no files is refused in one line."""

import os

import jax.numpy as jnp
import numpy as np
import pytest

from paxlike.log.files import AppendFile, check_writable, to_jsonable


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_check_writable_makes_the_folder_and_leaves_nothing(tmp_path):
    folder = check_writable(tmp_path / "a" / "b")
    assert folder.is_dir()
    assert os.listdir(folder) == []


def test_check_writable_names_path_reason_and_free_space(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError) as error:
        check_writable(tmp_path / "file" / "logs")
    message = one_line(error)
    assert str(tmp_path / "file" / "logs") in message
    assert "Not a directory" in message
    assert "MB free" in message
    assert "--job_log_dir" in message


@pytest.mark.skipif(
    not os.path.isdir("/proc/sys"), reason="needs a file system that refuses writes"
)
def test_check_writable_refuses_a_folder_that_exists_but_takes_no_files():
    with pytest.raises(ValueError, match="cannot write to the log folder '/proc/sys'"):
        check_writable("/proc/sys")


def test_check_writable_refuses_a_disk_that_takes_no_bytes(tmp_path, largest_file):
    with largest_file(100), pytest.raises(ValueError, match="File too large") as error:
        check_writable(tmp_path)
    one_line(error)


def test_check_writable_refuses_a_full_disk(tmp_path):
    with pytest.raises(ValueError, match="full disk") as error:
        check_writable(tmp_path, needed_bytes=1 << 62)
    assert "free" in one_line(error)


def test_check_writable_refuses_an_address():
    with pytest.raises(ValueError, match="mount the bucket") as error:
        check_writable("gs://bucket/run")
    assert "gs://bucket/run" in one_line(error)


def test_a_record_that_does_not_fit_leaves_no_trace(tmp_path, largest_file):
    file = AppendFile(tmp_path / "records")
    file.append(b"first\n")
    with largest_file(10):
        with pytest.raises(OSError):
            file.append(b"second, too long\n")
        file.append(b"2nd\n")
    file.append(b"third\n")
    file.close()
    assert (tmp_path / "records").read_bytes() == b"first\n2nd\nthird\n"


def test_ends_with(tmp_path):
    file = AppendFile(tmp_path / "records")
    assert file.ends_with(b"\n")
    file.append(b"torn")
    assert not file.ends_with(b"\n")
    file.append(b"\n")
    assert file.ends_with(b"\n")
    file.close()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.5), 0.5),
        (jnp.bfloat16(0.5), 0.5),
        (jnp.arange(3), [0, 1, 2]),
        (float("inf"), None),
        (np.array([1.0, np.nan]), [1.0, None]),
        ({"a": (1, True, None)}, {"a": [1, True, None]}),
        pytest.param(os.path.join, str(os.path.join), id="function"),
    ],
)
def test_to_jsonable(value, expected):
    assert to_jsonable(value) == expected
