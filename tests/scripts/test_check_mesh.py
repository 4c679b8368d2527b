"""`scripts/check_mesh.py`: what is the same on a mesh passes, what is not fails."""

import sys

import pytest

from scripts import check_mesh

FLAGS = [
    "--fdl_config=Synthetic126M",
    "--fdl.SYNTHETIC_RANDOM=True",
    "--fdl.FPROP_DTYPE=float32",
    "--fdl.NUM_LAYERS=2",
    "--fdl.MODEL_DIMS=32",
    "--fdl.NUM_HEADS=2",
    "--fdl.HIDDEN_DIMS=64",
    "--fdl.VOCAB_SIZE=64",
    "--fdl.MAX_SEQ_LEN=16",
    "--fdl.PERCORE_BATCH_SIZE=2",
    "--fdl.NUM_STAGES=2",
    "--fdl.ICI_MESH_SHAPE=[2,1,1,2]",
    "--fdl.DCN_MESH_SHAPE=[1,1,1]",
    "--fdl.NUM_MICROBATCHES=2",
]


@pytest.mark.parametrize(("tolerance", "code"), [("1e-5", 0), ("1e-12", 1)])
def test_says_whether_the_gradients_are_those_of_one_device(tolerance, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check_mesh.py", *FLAGS, f"--tolerance={tolerance}"])
    assert check_mesh.main() == code
    printed = capsys.readouterr().out
    assert "on pipeline 2 x data 1 x fsdp 1 x tensor 2" in printed
    assert printed.strip().splitlines()[-1].startswith("NOT" if code else "the same")
