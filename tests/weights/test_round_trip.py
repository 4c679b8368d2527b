"""Hugging Face -> paxlike -> Hugging Face: every bit, on any mesh; and against an independent reading."""

import fiddle as fdl
import jax.numpy as jnp
import numpy as np
import pytest

from paxlike.checkpoint import arrays
from paxlike.weights import export_params, import_params, open_folder
from tests.weights import models

pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

NAMES = [*models.FAMILIES, "gpt2"]


def config_of(name):
    return models.gpt2_config() if name == "gpt2" else models.family_config(name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Makes a folder of a family on request, once."""
    made = {}

    def get(name, dtype="float32"):
        if (name, dtype) not in made:
            model = models.hugging_face(config_of(name), dtype=dtype)
            folder = tmp_path_factory.mktemp(f"{name}_{dtype}")
            model.save_pretrained(folder)
            made[name, dtype] = folder, model
        return made[name, dtype]

    return get


def load(folder, dtype="auto"):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_is_the_same_bit_for_bit(saved, tmp_path, name, dtype):
    import torch

    folder, model = saved(name, dtype)
    description = models.description(name, model.config)
    params = import_params(folder, models.abstract(models.shapes(name)), description)
    export_params(params, tmp_path / "out", description, dtype=dtype)
    again = load(tmp_path / "out")
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for key in before:
        assert after[key].dtype == before[key].dtype, key
        assert torch.equal(before[key], after[key]), key
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(load(folder)(tokens).logits, again(tokens).logits)


def test_layers_behind_the_last_whole_period_go_back_bit_for_bit(tmp_path):
    from tests.parity import families

    small = families.config("gemma3", NUM_LAYERS=5)  # a period of three, and two layers
    families.reference(small, seed=2).save_pretrained(tmp_path / "in")
    _, params, _ = families.load(tmp_path / "in", small, (1, 2, 2))
    assert set(params["tail"]) == {"period_0", "period_1"}
    export_params(params, tmp_path / "out", fdl.build(small.experiment().weights))
    before, after = (open_folder(tmp_path / side).tensors for side in ("in", "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        whole = tuple(slice(0, n) for n in tensor.shape)
        assert np.array_equal(tensor.read(whole), after[name].read(whole)), name


@pytest.mark.parametrize("mesh", [(2, 2), (4, 1), (1, 2)])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_sharded_equals_unsharded(saved, name, mesh):
    folder, _ = saved(name)
    description = models.description(name)
    whole = import_params(folder, models.abstract(models.shapes(name)), description)
    wanted = models.abstract(models.shapes(name), mesh=mesh)
    sharded = import_params(folder, wanted, description)
    models.assert_same(sharded, whole)
    for path, leaf in arrays.named_leaves(sharded).items():
        assert leaf.sharding == arrays.named_leaves(wanted)[path].sharding


def test_every_tensor_is_where_a_plain_reading_puts_it(saved):
    """By numpy alone, without the table: layer 3 of a model whose period is two."""
    folder, model = saved("gemma2")
    params = import_params(
        folder, models.abstract(models.shapes("gemma2")), models.description("gemma2")
    )
    layer = params["stack"]["period_1"]
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    prefix = "model.layers.3."
    query = state[prefix + "self_attn.q_proj.weight"].T.reshape(32, 4, 8)
    np.testing.assert_array_equal(layer["mixer"]["query"]["kernel"][1], query)
    out = state[prefix + "self_attn.o_proj.weight"].T.reshape(4, 8, 32)
    np.testing.assert_array_equal(layer["mixer"]["out"]["kernel"][1], out)
    down = state[prefix + "mlp.down_proj.weight"].T
    np.testing.assert_array_equal(layer["ffn"]["ffn2"]["kernel"][1], down)
    norm = state[prefix + "post_feedforward_layernorm.weight"]
    np.testing.assert_array_equal(layer["ffn_post_norm"]["scale"][1], norm)


def test_interleaved_rotation(saved):
    """A model that rotates neighbours gets member p of pair i at 2 i + p, in the kernel of queries and keys alone."""
    folder, model = saved("qwen3")
    description = models.description("qwen3", rope_interleaved=True)
    params = import_params(folder, models.abstract(models.shapes("qwen3")), description)
    mixer = params["stack"]["period_0"]["mixer"]
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    for ours, theirs in {"query": "q", "key": "k"}.items():
        weight = state[f"model.layers.2.self_attn.{theirs}_proj.weight"].T.reshape(32, -1, 8)
        np.testing.assert_array_equal(mixer[ours]["kernel"][2], weight[:, :, order])
        norm = state[f"model.layers.2.self_attn.{theirs}_norm.weight"]
        np.testing.assert_array_equal(mixer[f"{ours}_norm"]["scale"][2], norm[order])
    value = state["model.layers.2.self_attn.v_proj.weight"].T.reshape(32, -1, 8)
    np.testing.assert_array_equal(mixer["value"]["kernel"][2], value)


def test_interleaved_rotation_goes_back_exactly_on_any_mesh(saved, tmp_path):
    import torch

    folder, model = saved("qwen2")
    description = models.description("qwen2", model.config, rope_interleaved=True)
    wanted = models.abstract(models.shapes("qwen2"), mesh=(2, 2))
    export_params(import_params(folder, wanted, description), tmp_path / "out", description)
    after = load(tmp_path / "out").state_dict()
    assert all(torch.equal(value, after[key]) for key, value in model.state_dict().items())


def test_combined_projections(tmp_path):
    import torch

    config = models.family_config("llama")
    config.num_key_value_heads = config.num_attention_heads
    model = models.hugging_face(config)
    model.save_pretrained(tmp_path / "in")
    description = models.description("llama", model.config)
    wanted = models.abstract(models.shapes("llama", combine_qkv=True), mesh=(2, 2))
    params = import_params(tmp_path / "in", wanted, description)
    kernel = params["stack"]["period_0"]["mixer"]["qkv"]["kernel"]
    key = model.state_dict()["model.layers.1.self_attn.k_proj.weight"].numpy()
    np.testing.assert_array_equal(kernel[1, :, 1], key.T.reshape(32, 4, 8))
    export_params(params, tmp_path / "out", description)
    after = load(tmp_path / "out").state_dict()
    assert all(torch.equal(value, after[key]) for key, value in model.state_dict().items())


def test_shards_and_index(saved, tmp_path):
    import torch

    folder, model = saved("llama")
    description = models.description("llama", model.config)
    params = import_params(folder, models.abstract(models.shapes("llama")), description)
    export_params(params, tmp_path / "out", description, max_shard_size="20KB")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 5 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    after = load(tmp_path / "out").state_dict()
    assert all(torch.equal(value, after[key]) for key, value in model.state_dict().items())
    again = import_params(tmp_path / "out", models.abstract(models.shapes("llama")), description)
    models.assert_same(again, params)


def test_to_bfloat16(saved):
    folder, _ = saved("llama")
    description = models.description("llama")
    half = import_params(
        folder, models.abstract(models.shapes("llama"), dtype=jnp.bfloat16), description
    )
    full = import_params(folder, models.abstract(models.shapes("llama")), description)
    models.assert_same(half, {**_map(full)})


def _map(tree):
    import jax

    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)
