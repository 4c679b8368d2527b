"""Weights of experts: every expert is a tensor of its own in Hugging Face's files, and one stacked parameter here."""

import numpy as np
import pytest

NEEDS = "needs torch and transformers (the extra `parity`)"
pytest.importorskip("torch", reason=NEEDS)
pytest.importorskip("transformers", reason=NEEDS)

import fiddle as fdl  # noqa: E402

from paxlike.weights import exporting, open_folder  # noqa: E402
from tests.parity import families  # noqa: E402

pytestmark = pytest.mark.parity
NAMES = ["mixtral", "qwen3-moe", "deepseek-v2", "deepseek-v3"]


@pytest.mark.parametrize("name", NAMES)
def test_weights_go_in_and_out_bit_for_bit(name, tmp_path):
    small = families.config(name)
    families.reference(small, seed=2).save_pretrained(tmp_path / "theirs")
    _, params, _ = families.load(tmp_path / "theirs", small, (1, 2, 2))
    description = fdl.build(small.experiment().weights)
    exporting.export_params(params, tmp_path / "ours", description)
    theirs, ours = (open_folder(tmp_path / side).tensors for side in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    layers = small.NUM_LAYERS - getattr(small, "FIRST_DENSE_LAYERS", 0)
    assert sum(".experts." in tensor for tensor in ours) == 3 * small.NUM_EXPERTS * layers
    for tensor in theirs:
        whole = tuple(slice(0, n) for n in theirs[tensor].shape)
        assert np.array_equal(theirs[tensor].read(whole), ours[tensor].read(whole)), tensor


def test_another_number_of_experts_is_refused_before_a_tensor_is_read(tmp_path):
    small = families.config("mixtral")
    families.reference(small, seed=2).save_pretrained(tmp_path)
    other = families.config("mixtral", NUM_EXPERTS=8)
    with pytest.raises(ValueError, match="num_local_experts"):
        families.load(tmp_path, other)
