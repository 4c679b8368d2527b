"""Weights of experts: every expert is a tensor of its own in Hugging Face's files, and one stacked parameter here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

NEEDS = "needs torch and transformers (the extra `parity`)"
pytest.importorskip("torch", reason=NEEDS)
pytest.importorskip("transformers", reason=NEEDS)

import fiddle as fdl  # noqa: E402

from paxlike import parallel  # noqa: E402
from paxlike.train.state import abstract_variables  # noqa: E402
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


def test_an_upcycled_model_is_the_dense_one_at_first(tmp_path):
    dense = families.config("llama3.1")
    families.reference(dense, seed=2).save_pretrained(tmp_path)
    names = ("NUM_LAYERS", "ROPE_THETA", "ROPE_SCALING", "ROPE_ORIGINAL_LEN", "RMS_NORM_EPSILON")
    sizes = {name: getattr(dense, name) for name in names}
    sparse = families.config(
        "mixtral",
        **sizes,
        UPCYCLE=True,
        CHECKPOINT_RESTORE_PATH=str(tmp_path),
        TRAIN_SET="text",
        EVAL_SETS=(),
        NUM_EXPERTS=3,
    )
    tokens = np.random.default_rng(0).integers(0, 102, (2, 9)).astype(np.int32)
    model, params, mesh = families.load(tmp_path, dense)
    experiment = fdl.build(sparse.experiment())
    with parallel.activate(mesh):
        expected = model.apply({"params": params}, jnp.asarray(tokens)).logits()
        init = jax.jit(
            lambda: nn.unbox(experiment.model.init(jax.random.key(1), jnp.asarray(tokens[:, :1])))
        )
        initial = init()["params"]
        abstract = abstract_variables(experiment.model, mesh)["params"]
        start = experiment.read_initial_params(abstract, initial)
        found = experiment.model.apply({"params": start}, jnp.asarray(tokens)).logits()
    router = lambda tree: tree["stack"]["period_0"]["ffn"]["router"]["kernel"]
    assert np.array_equal(router(start), router(initial)) and np.std(router(start)) > 0
    np.testing.assert_allclose(found, expected, atol=2e-5)
