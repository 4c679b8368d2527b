"""Meta's files: the same model as Hugging Face's, in two shards."""

import json

import numpy as np
import pytest

from paxlike.weights import LlamaWeights, import_params
from tests.weights import folders, models

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
PARAMS = {
    "dim": 32,
    "n_layers": 4,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "vocab_size": -1,
}
EXPECTED = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}
TREE = models.abstract(models.shapes("llama"))


def to_meta(tensors):
    """By the published rules: rows of queries and keys change from halves to pairs."""
    found = {
        "tok_embeddings.weight": tensors["model.embed_tokens.weight"],
        "norm.weight": tensors["model.norm.weight"],
        "output.weight": tensors["lm_head.weight"],
        "rope.freqs": np.zeros(4, np.float32),
    }
    for layer in range(models.LAYERS):
        for theirs, ours in NAMES.items():
            value = tensors[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attention.wq", "attention.wk"):
                value = value.reshape(-1, 2, 4, 32).swapaxes(1, 2).reshape(value.shape)
            found[f"layers.{layer}.{theirs}.weight"] = value
    return found


def write(folder, tensors, *, cut_table_by_width=True, num=2, dtype=None):
    folder.mkdir(exist_ok=True)
    for number in range(num):
        shard = {}
        for name, value in tensors.items():
            by_inputs = ".wo." in name or ".w2." in name
            by_inputs |= name.startswith("tok_") and cut_table_by_width
            parts = [value] * num if value.ndim < 2 else np.split(value, num, int(by_inputs))
            shard[name] = torch.tensor(parts[number]).to(dtype or torch.float32)
        torch.save(shard, folder / f"consolidated.{number:02d}.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS))
    return folder


@pytest.fixture(scope="module")
def tensors():
    return folders.random_tensors()


@pytest.mark.parametrize("cut_table_by_width", [True, False])
@pytest.mark.parametrize("num,mesh", [(1, (1, 1)), (2, (1, 1)), (2, (2, 2)), (4, (2, 2))])
def test_equals_hugging_face(tmp_path, tensors, cut_table_by_width, num, mesh):
    wanted = models.abstract(models.shapes("llama"), mesh=mesh)
    same = import_params(folders.write(tmp_path / "hf", tensors), wanted, LlamaWeights())
    folder = write(
        tmp_path / "meta", to_meta(tensors), cut_table_by_width=cut_table_by_width, num=num
    )
    models.assert_same(import_params(folder, wanted, LlamaWeights(config=EXPECTED)), same)


def test_a_model_of_the_same_rotation_takes_rows_as_they_are(tmp_path, tensors):
    folder = write(tmp_path / "meta", to_meta(tensors))
    params = import_params(folder, TREE, LlamaWeights(rope_interleaved=True))
    rows = to_meta(tensors)["layers.1.attention.wk.weight"]
    kernel = params["stack"]["period_0"]["mixer"]["key"]["kernel"][1]
    np.testing.assert_array_equal(kernel, rows.T.reshape(32, 2, 8))


def test_bfloat16(tmp_path, tensors):
    folder = write(tmp_path / "meta", to_meta(tensors), dtype=torch.bfloat16)
    params = import_params(folder, TREE, LlamaWeights())
    table = torch.tensor(tensors["lm_head.weight"]).bfloat16().float().numpy()
    np.testing.assert_array_equal(params["head"]["table"], table)


def refused(folder, match, **options):
    with pytest.raises(ValueError, match=match) as caught:
        import_params(folder, TREE, LlamaWeights(**options))
    assert "\n" not in str(caught.value)


def test_another_size(tmp_path, tensors):
    folder = write(tmp_path / "meta", to_meta(tensors))
    refused(
        folder,
        "hidden_size is 32 in .*params.json and 64 in this model: set MODEL_DIMS=32",
        config={"hidden_size": 64},
    )


def test_a_lost_shard(tmp_path, tensors):
    folder = write(tmp_path / "meta", to_meta(tensors), num=4)
    (folder / "consolidated.01.pth").unlink()
    refused(folder, "consolidated.01.pth is not in .*, where number 3 is: copy it")


def test_shards_of_different_models(tmp_path, tensors):
    folder = write(tmp_path / "meta", to_meta(tensors))
    torch.save({"norm.weight": torch.zeros(32)}, folder / "consolidated.01.pth")
    refused(
        folder, "consolidated.01.pth and consolidated.00.pth in .* differ in layers.0.attention"
    )


def test_a_damaged_shard(tmp_path, tensors):
    folder = write(tmp_path / "meta", to_meta(tensors), num=1)
    (folder / "consolidated.00.pth").write_bytes(b"nothing")
    refused(folder, r"consolidated.00.pth cannot be read by torch \(.*\): copy it again")


def test_a_missing_tensor_has_the_name_of_the_file(tmp_path, tensors):
    short = to_meta(tensors)
    del short["layers.3.feed_forward.w2.weight"]
    refused(
        write(tmp_path / "meta", short),
        "has no tensor layers.3.feed_forward.w2.weight, which parameter stack/period_0/ffn/ffn2/kernel",
    )


def test_without_torch(tmp_path, tensors, monkeypatch):
    import importlib.util

    folder = write(tmp_path / "meta", to_meta(tensors), num=1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(
        folder, "consolidated.00.pth is a pickle of PyTorch and needs torch to be read: install"
    )


def test_pickles_of_hugging_face(tmp_path, tensors):
    torch.save({k: torch.tensor(v) for k, v in tensors.items()}, tmp_path / "pytorch_model.bin")
    same = import_params(folders.write(tmp_path / "hf", tensors), TREE, LlamaWeights())
    models.assert_same(import_params(tmp_path, TREE, LlamaWeights()), same)
