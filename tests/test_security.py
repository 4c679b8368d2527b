"""What others may send or pass must not run, write or show anything: each way in is tried.

What users pass to job files is in tests/launch; the address on which process 0 listens in tests/cluster.
"""

import json
import os
import pathlib
import pickle
import re
import socket
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from configs import flags
from paxlike.data.builders import boolq
from paxlike.weights import is_foreign, open_folder

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Touches:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_the_pickle_of_these_tests_does_run(tmp_path):
    pickle.loads(pickle.dumps(Touches(tmp_path / "owned"))).close()
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["consolidated.00.pth", "pytorch_model.bin"])
def test_weights_run_nothing(name, tmp_path):
    torch = pytest.importorskip("torch")
    folder = tmp_path / "weights"
    folder.mkdir()
    torch.save({"norm.weight": torch.ones(2), "x": Touches(tmp_path / "owned")}, folder / name)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "params.json").write_text("{}")
    assert is_foreign(folder)
    with pytest.raises(ValueError, match="cannot be read by torch") as error:
        open_folder(folder)
    assert "\n" not in str(error.value) and not (tmp_path / "owned").exists()


def test_numpy_files_of_a_run_run_nothing(tmp_path):
    """Token caches and recorded steps are .npy and .npz, which can hold pickles."""
    file = tmp_path / "batch.npz"
    np.savez(file, tokens=np.array([Touches(tmp_path / "owned")], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle=False"), np.load(file) as recorded:
        _ = recorded["tokens"]
    assert not (tmp_path / "owned").exists()


def test_nothing_in_the_product_loads_a_pickle():
    """The one reader of pickles takes tensors only; everywhere else the safe default stays."""
    for path in [
        *ROOT.glob("paxlike/**/*.py"),
        *ROOT.glob("configs/**/*.py"),
        *ROOT.glob("scripts/**/*.py"),
    ]:
        text = path.read_text()
        assert not re.search(r"allow_pickle\s*=\s*True|weights_only\s*=\s*False", text), path
        assert not re.search(r"\b(pickle|dill|cloudpickle|marshal|shelve)\.loads?\b", text), path
        assert "extractall" not in text, path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, path


@pytest.fixture(scope="module")
def good():
    return json.loads(flags.resolve(["main.py", "--fdl_config=Quickstart"], {}).json)


@pytest.mark.parametrize(
    "module, name",
    [
        ("os", "system"),
        ("subprocess", "run"),
        ("builtins", "eval"),
        ("paxlike.experiment", "os.system"),
        ("paxlike.launch.local", "_run"),
        ("paxlike.launch.slurm", "subprocess.run"),
        ("numpy", "load"),
        ("torch", "load"),
        ("fiddle", "build"),
    ],
)
def test_a_config_file_names_only_what_is_a_config(module, name, good, tmp_path):
    """A config.json says what is called when its tree is built."""
    stored = json.loads(json.dumps(good))
    text = json.dumps(stored["tree"])
    changed = text.replace(
        '"module": "paxlike.models.decoder", "name": "Decoder"',
        f'"module": "{module}", "name": "{name}"',
    )
    assert changed != text
    stored["tree"] = json.loads(changed)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(stored))
    with pytest.raises(flags.UsageError, match="not permitted|cannot load its tree") as error:
        flags.resolve(["main.py", f"--fdl_config_file={file}"], {})
    assert "\n" not in str(error.value)


def test_an_archive_writes_nowhere(tmp_path, monkeypatch):
    """A downloaded archive is read member by member, by names of ours; its own names are never paths."""
    archive = tmp_path / "boolq.zip"
    row = json.dumps({"question": "q", "passage": "p", "idx": 0, "label": True})
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("../../owned", "x")
        made.writestr("/tmp/paxlike_owned", "x")
        for name in boolq._FILES.values():
            made.writestr(f"BoolQ/{name}", row)

    class Manager:
        def download(self, url):
            return str(archive)

    builder = boolq.BoolQ(data_dir=str(tmp_path / "tfds"), file_format="array_record")
    splits = builder._split_generators(Manager())
    assert len(list(next(iter(splits.values())))) == 1
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"boolq.zip"}
    assert not (tmp_path.parent / "owned").exists()
    assert not pathlib.Path("/tmp/paxlike_owned").exists()


SECRETS = {
    "HF_TOKEN": "hf_do_not_write_me",
    "WANDB_API_KEY": "key_do_not_write_me",
    "DB_PASSWORD": "password_do_not_write_me",
}


def test_secrets_of_the_environment_are_in_no_file_of_a_run(tmp_path):
    small = "NUM_LAYERS=1 NUM_HEADS=1 DIMS_PER_HEAD=4 MODEL_DIMS=4 HIDDEN_DIMS=4 VOCAB_SIZE=16 "
    small += "MAX_SEQ_LEN=4 MAX_STEPS=1"
    words = [sys.executable, "main.py", "--fdl_config=Synthetic126M", f"--job_log_dir={tmp_path}"]
    words += [f"--fdl.{pair}" for pair in small.split()]
    words += ["--fdl.ICI_MESH_SHAPE=[1,1,1]", "--fdl.DCN_MESH_SHAPE=[1,1,1]"]
    environ = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environ |= SECRETS | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert tmp_path / "metrics.jsonl" in files and tmp_path / "config.json" in files
    written = b"".join(path.read_bytes() for path in files) + (done.stdout + done.stderr).encode()
    assert b"command_line" in written
    assert b"do_not_write_me" not in written


COORDINATOR = """
import os, sys
sys.path.insert(0, os.getcwd())
from paxlike.cluster import environment
place = environment.find_place({}, join=True, server_addr=sys.argv[1], num_hosts=1, host_idx=0)
environment.start(place)
print(open("/proc/self/net/tcp").read(), open("/proc/self/net/tcp6").read())
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/net/tcp").exists(), reason="no /proc here")
def test_the_coordinator_listens_on_its_address_only():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = os.environ | {"JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-c", COORDINATOR, f"127.0.0.1:{port}"]
    done = subprocess.run(words, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if ":" in line]
    listening = {
        row[1]
        for row in rows
        if len(row) > 3 and row[3] == "0A" and row[1].endswith(f":{port:04X}")
    }
    # 127.0.0.1 as the kernel writes it, or the same as an address of IPv6.
    one, other = f"0100007F:{port:04X}", f"0000000000000000FFFF00000100007F:{port:04X}"
    assert listening in ({one}, {other})
