"""What does not fit is refused in one line; what other files spell otherwise is read."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxlike.weights import GPT2Weights, LlamaWeights, import_params, is_foreign
from tests.weights import folders, models

TREE = models.abstract(models.shapes("llama"))
LLAMA = LlamaWeights(config=folders.CONFIG)


def refused(folder, match, tree=TREE, description=LLAMA):
    with pytest.raises(ValueError, match=match) as caught:
        import_params(folder, tree, description)
    assert "\n" not in str(caught.value)


def test_a_missing_tensor(tmp_path):
    tensors = folders.random_tensors()
    del tensors["model.layers.2.mlp.up_proj.weight"], tensors["model.norm.weight"]
    folders.write(tmp_path, tensors)
    refused(
        tmp_path,
        "has no tensor model.norm.weight, which parameter norm/scale is made of; 2 of 39 are missing",
    )


def test_a_tensor_too_many(tmp_path):
    tensors = folders.random_tensors() | {"model.layers.9.x": np.zeros((2, 3), np.float32)}
    folders.write(tmp_path, tensors)
    refused(
        tmp_path,
        r"tensor model.layers.9.x of shape \[2, 3\] in .* is no parameter of this model; 1 of 40 are left over",
    )


def test_a_misshapen_tensor(tmp_path):
    tensors = folders.random_tensors()
    tensors["model.layers.1.self_attn.k_proj.weight"] = np.zeros((8, 32), np.float32)
    folders.write(tmp_path, tensors)
    refused(
        tmp_path,
        r"tensor model.layers.1.self_attn.k_proj.weight has shape \[8, 32\] in .* and \[16, 32\] in this model "
        r"\(parameter stack/period_0/mixer/key/kernel\); 1 of 39 differ",
    )


def test_another_vocabulary(tmp_path):
    shapes = models.shapes("llama")
    larger = shapes | {"embedding/table": (80, 32), "head/table": (80, 32)}
    folders.write(tmp_path, folders.random_tensors(larger))
    refused(
        tmp_path, r"model.embed_tokens.weight has shape \[80, 32\] in .* and \[64, 32\].*2 of 39"
    )


def test_quantised_weights(tmp_path):
    tensors = folders.random_tensors()
    tensors["model.norm.weight"] = np.ones(32, np.int8)
    folders.write(tmp_path, tensors)
    refused(tmp_path, "tensor model.norm.weight in .* is of type int8: quantised weights are not")


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(folders.CONFIG))
    refused(tmp_path, "no weights in .*: model.safetensors, .* or consolidated.00.pth is expected")
    refused(tmp_path / "absent", "absent is not a folder: give one with the weights of a model")


def test_a_shard_that_is_not_there(tmp_path):
    folder = folders.write(tmp_path, folders.random_tensors())
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    where = dict.fromkeys(folders.random_tensors(), "model-00001-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where | {"x": "model-00002-of-00002.safetensors"}}))
    refused(
        tmp_path, "1 of 2 shards in .*index.json are not in .*, model-00002-of-00002.safetensors"
    )
    index.write_text(json.dumps({"weight_map": where | {"x": "model-00001-of-00002.safetensors"}}))
    refused(
        tmp_path, "model-00001-of-00002.safetensors in .* lacks x, which model.safetensors.index"
    )
    index.write_text(json.dumps({}))
    refused(tmp_path, "has no weight_map: copy it again")
    index.write_text("{")
    refused(tmp_path, "index.json is not JSON .*: copy it again")


def test_a_model_of_another_family(tmp_path):
    folders.write(tmp_path, folders.random_tensors(), config=None)
    refused(
        tmp_path,
        r"parameter head/bias of shape \[64\] has no tensor in LLaMA of Hugging Face",
        tree=models.abstract(models.shapes("llama") | {"head/bias": (64,)}),
    )
    refused(
        tmp_path,
        "has no tensor transformer.wte.weight",
        models.abstract(models.shapes("gpt2")),
        GPT2Weights(),
    )


def test_a_tree_without_shardings(tmp_path):
    bare = {"norm": {"scale": jax.ShapeDtypeStruct((32,), jnp.float32)}}
    refused(tmp_path, "no sharding is given for norm/scale", tree=bare)


def test_the_sizes_of_the_config(tmp_path):
    folders.write(tmp_path, folders.random_tensors(), folders.CONFIG | {"hidden_size": 4096})
    refused(
        tmp_path, "hidden_size is 4096 in .*config.json and 32 in this model: set MODEL_DIMS=4096"
    )


def test_a_tied_model_whose_table_is_there_twice(tmp_path):
    shapes = {path: s for path, s in models.shapes("llama").items() if path != "head/table"}
    tensors = folders.random_tensors(shapes)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    params = import_params(folders.write(tmp_path, tensors), models.abstract(shapes), LLAMA)
    np.testing.assert_array_equal(params["embedding"]["table"], tensors["lm_head.weight"])
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    folders.write(tmp_path, tensors)
    refused(tmp_path, "tensor lm_head.weight of shape .* is no parameter", models.abstract(shapes))


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_other_beginnings_of_the_names(tmp_path, prefix):
    plain = import_params(folders.write(tmp_path / "a", folders.random_tensors()), TREE, LLAMA)
    renamed = {
        name.replace("model.", prefix, 1) if name.startswith("model.") else name: value
        for name, value in folders.random_tensors().items()
    }
    models.assert_same(import_params(folders.write(tmp_path / "b", renamed), TREE, LLAMA), plain)


def test_the_published_gpt2(tmp_path):
    """Its names begin without `transformer.`, and masks lie beside the weights."""
    tree = models.abstract(models.shapes("gpt2"))
    tensors = folders.random_tensors(models.shapes("gpt2"), description=GPT2Weights())
    plain = import_params(folders.write(tmp_path / "a", tensors, config=None), tree, GPT2Weights())
    published = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    published |= {"h.0.attn.bias": np.ones((1, 1, 16, 16), np.float32)}
    folder = folders.write(tmp_path / "b", published, config=None)
    models.assert_same(import_params(folder, tree, GPT2Weights()), plain)
    gain = tensors["transformer.h.1.ln_2.weight"]
    here = plain["stack"]["period_0"]["ffn_norm"]["scale"][1]
    np.testing.assert_array_equal(here, gain - np.float32(1))


def test_what_is_foreign(tmp_path):
    assert is_foreign(folders.write(tmp_path / "a", folders.random_tensors()))
    (tmp_path / "a" / "model.safetensors").unlink()
    assert is_foreign(tmp_path / "a")  # a folder of Hugging Face that lacks its weights
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    assert not is_foreign(run) and not is_foreign(tmp_path) and not is_foreign(tmp_path / "absent")


def test_progress(tmp_path):
    seen = []
    folders.write(tmp_path, folders.random_tensors())
    tree = models.abstract(models.shapes("llama"), mesh=(2, 2))
    import_params(tmp_path, tree, LLAMA, report=lambda *numbers: seen.append(numbers))
    assert seen == [(done, 39) for done in range(1, 40)]


def test_the_host_holds_a_layer_and_not_the_stack(tmp_path):
    """32 layers of 64 KiB: what numpy holds beside the devices stays below four of them."""
    sizes = {"stack/period_0/ffn/gate/kernel": (32, 128, 128)}
    folders.write(tmp_path, folders.random_tensors(sizes), config=None)
    tree = models.abstract(sizes, mesh=(2, 2))
    import_params(tmp_path, tree, LlamaWeights())  # compiles
    tracemalloc.start()
    params = jax.block_until_ready(import_params(tmp_path, tree, LlamaWeights()))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(params)) == 32 * 64 * 1024
    assert peak < 4 * 64 * 1024


def test_inside_a_mesh_in_force(tmp_path):
    from paxlike import parallel

    folders.write(tmp_path, folders.random_tensors())
    tree = models.abstract(models.shapes("llama"), mesh=(2, 2))
    plain = import_params(tmp_path, tree, LLAMA)
    mesh = parallel.Mesh((1, 2, 2)).build()
    with parallel.activate(mesh):
        models.assert_same(import_params(tmp_path, tree, LLAMA), plain)
