"""Two real processes import together: each reads its part, and both fail alike."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from paxlike.checkpoint import arrays
from paxlike.weights import LlamaWeights, import_params
from tests.weights import folders, models

pytestmark = pytest.mark.slow


def test_two_processes(tmp_path, root):
    tensors = folders.random_tensors()
    folders.write(tmp_path / "model", tensors)
    folders.write(tmp_path / "only_in_0", tensors)  # process 1 looks for only_in_1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    worker = root / "tests" / "weights" / "process_worker.py"
    workers = [
        subprocess.Popen(
            [sys.executable, worker, address, "2", str(index), tmp_path],
            env={**os.environ, "PYTHONPATH": str(root)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [each.communicate(timeout=150)[0] for each in workers]
    assert [each.returncode for each in workers] == [0, 0], outputs

    whole = arrays.named_leaves(
        import_params(tmp_path / "model", models.abstract(models.shapes("llama")), LlamaWeights())
    )
    size = sum(value.nbytes for value in tensors.values())
    errors = []
    for index in range(2):
        report = json.loads((tmp_path / f"report_{index}.json").read_text())
        shards = np.load(tmp_path / f"shards_{index}.npz")
        for key, place in report["places"].items():
            box = tuple(slice(*ends) for ends in place)
            np.testing.assert_array_equal(shards[key], whole[key.split("|")[0]][box])
        # Half of every matrix; norms are whole everywhere, and read once.
        assert report["bytes"] < 0.55 * size
        errors.append(report["error"])
    assert errors[0] == errors[1] and "only_in_1 is not a folder" in errors[0]
