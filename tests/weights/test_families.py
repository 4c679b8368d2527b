"""Each config of a published family, shrunk: the model of Hugging Face that its own config.json describes, imported
onto a mesh, gives the same logits here, and goes back to the last bit."""

import fiddle as fdl
import jax
import numpy as np
import pytest

from configs import flags
from paxlike import parallel
from paxlike.train.state import abstract_variables
from paxlike.weights import export_params, import_params
from tests.weights import models

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.parity, pytest.mark.slow]

SMALL = {"NUM_LAYERS": 4, "NUM_HEADS": 4, "NUM_KV_HEADS": 2, "DIMS_PER_HEAD": 8, "MODEL_DIMS": 32}
SMALL |= {"HIDDEN_DIMS": 48, "VOCAB_SIZE": 64, "FPROP_DTYPE": "float32", "MAX_SEQ_LEN": 32}
# A window and an original length below that of the rows, so that they count; a scale that is not 1 / sqrt(8).
GEMMA = {"SLIDING_WINDOW": 8, "LOCAL_LAYERS_PER_GLOBAL": 1, "QUERY_PRE_ATTN_SCALAR": 5}
CASES = {
    "LLaMA7B": {},
    "LLaMA7B, pairs": {"ROPE_LAYOUT": "interleaved"},
    "LLaMA7B, combined": {"NUM_KV_HEADS": 4, "COMBINE_QKV": True},
    "LLaMA3_2_1B": {"ROPE_ORIGINAL_LEN": 16},
    "Mistral7B": {"SLIDING_WINDOW": 8},
    "Qwen2_5_0_5B": {},
    "Qwen3_8B": {},
    "Gemma2_2B": GEMMA,
    "Gemma3_12B": GEMMA,
}


def model_and_weights(case):
    knobs = SMALL | CASES[case]
    words = [f"--fdl.{name}={value}" for name, value in knobs.items()]
    tree = flags.resolve(["", f"--fdl_config={case.split(',')[0]}", *words]).tree
    return fdl.build(tree.model), fdl.build(tree.weights)


def hugging_face(description):
    """Random weights; attention by the plain formula. Gemma's gains are distances from 1."""
    import torch

    told = {k: v for k, v in description.config.items() if k not in ("architectures", "model_type")}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    kind = description.config["model_type"]
    config = transformers.AutoConfig.for_model(kind, **told, **ids)
    config._attn_implementation = "eager"
    model = models.hugging_face(config)
    if kind.startswith("gemma"):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.sub_(1.0 if "norm" in name else 0.0)
    return model


def logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens).long()).logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_same_logits_and_back(tmp_path, case):
    import torch

    model, weights = model_and_weights(case)
    theirs = hugging_face(weights)
    theirs.save_pretrained(tmp_path / "hf")
    tokens = np.random.default_rng(0).integers(3, 64, (4, 24)).astype(np.int32)
    mesh = parallel.Mesh((1, 2, 2)).build()
    with parallel.activate(mesh):
        wanted = abstract_variables(model, mesh)["params"]
        params = import_params(tmp_path / "hf", wanted, weights)
        forward = jax.jit(lambda p, t: model.apply({"params": p}, t).logits())
        ours = np.asarray(forward(params, tokens))
    expected = logits(theirs, tokens)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(ours, expected, atol=2e-5, rtol=0)

    export_params(params, tmp_path / "out", weights)
    back = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    )
    before, after = theirs.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    np.testing.assert_array_equal(logits(back, tokens), expected)
