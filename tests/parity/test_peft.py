"""Adapters beside the `peft` library: the same adapter gives the same logits and gradients; its files both ways."""

import json

import fiddle as fdl
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.llama import Llama
from configs.lora import LoraKnobs
from paxlike.layers.lora import Lora, merge_lora
from paxlike.train.optimizer import merge
from paxlike.weights import peft as ours
from paxlike.weights.safetensors_file import Writer, read_header

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

LAYERS, WIDTH, HEADS, GROUPS, HIDDEN, VOCAB = 2, 16, 4, 2, 24, 40
SIZE = WIDTH // HEADS
KINDS = ["lora", "rslora", "dora"]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Tiny(LoraKnobs, Llama):
    """The same LLaMA here."""

    USE_LORA = True
    LORA_RANK = 3
    LORA_ALPHA = 6.0
    NUM_LAYERS = LAYERS
    NUM_HEADS = HEADS
    NUM_KV_HEADS = GROUPS
    MODEL_DIMS = WIDTH
    HIDDEN_DIMS = HIDDEN
    VOCAB_SIZE = VOCAB
    USE_REPEATED_LAYER = True
    FPROP_DTYPE = "float32"
    USE_CUDNN_FLASH_ATTENTION = False
    TRAIN_FILES = "none.txt"


def theirs(kind, groups=GROUPS):
    """A random LLaMA with random adapters."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=groups,
        rms_norm_eps=1e-5,
        attn_implementation="eager",
        initializer_range=0.3,
    )
    model = peft.get_peft_model(
        transformers.LlamaForCausalLM(config),
        peft.LoraConfig(
            r=3,
            lora_alpha=6,
            target_modules=TARGETS,
            use_rslora=kind == "rslora",
            use_dora=kind == "dora",
            task_type="CAUSAL_LM",
        ),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def base_weights(model, *, combined=False):
    """Its frozen weights in the tree of the model here."""
    found = {
        name.removeprefix("base_model.model.").replace("base_layer.", ""): value.detach().numpy()
        for name, value in model.named_parameters()
    }

    def stacked(name, *shape):
        layers = [found[f"model.layers.{i}.{name}.weight"] for i in range(LAYERS)]
        return np.stack([layer.T.reshape(*shape) if shape else layer for layer in layers])

    heads = {"query": ("q_proj", HEADS), "key": ("k_proj", GROUPS), "value": ("v_proj", GROUPS)}
    mixer = {"out": {"kernel": stacked("self_attn.o_proj", HEADS, SIZE, WIDTH)}}
    if combined:
        parts = [stacked(f"self_attn.{n}_proj", WIDTH, HEADS, SIZE) for n in "qkv"]
        mixer["qkv"] = {"kernel": np.stack(parts, axis=2)}
    else:
        for name, (module, h) in heads.items():
            mixer[name] = {"kernel": stacked(f"self_attn.{module}", WIDTH, h, SIZE)}
    block = {
        "mixer": mixer,
        "mixer_norm": {"scale": stacked("input_layernorm")},
        "ffn_norm": {"scale": stacked("post_attention_layernorm")},
        "ffn": {
            "gate": {"kernel": stacked("mlp.gate_proj", WIDTH, HIDDEN)},
            "ffn1": {"kernel": stacked("mlp.up_proj", WIDTH, HIDDEN)},
            "ffn2": {"kernel": stacked("mlp.down_proj", HIDDEN, WIDTH)},
        },
    }
    return {
        "embedding": {"table": found["model.embed_tokens.weight"]},
        "head": {"table": found["lm_head.weight"]},
        "norm": {"scale": found["model.norm.weight"]},
        "stack": {"period_0": block},
    }


def imported(model, folder, kind, **knobs):
    """The model here with its weights and adapters."""
    model.save_pretrained(folder)
    net = fdl.build(Tiny(LORA_KIND=kind, **knobs).experiment()).model
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))
    is_box = lambda leaf: hasattr(leaf, "names")
    zeros = lambda leaf: np.zeros(leaf.value.shape if is_box(leaf) else leaf.shape, np.float32)
    fresh = jax.tree.map(zeros, shapes["params"], is_leaf=is_box)
    params = _filled(fresh, base_weights(model, combined=knobs.get("COMBINE_QKV", False)))
    return net, jax.tree.map(jnp.asarray, ours.import_peft(folder, params))


def _filled(fresh, base):
    """`fresh` with the leaves that `base` has; the same otherwise."""
    if not isinstance(fresh, dict):
        assert base.shape == fresh.shape
        return base
    return {k: v if k == "lora" else _filled(v, base[k]) for k, v in fresh.items()}


def tokens():
    return np.random.default_rng(0).integers(0, VOCAB, (2, 7)).astype(np.int32)


@pytest.mark.parametrize("kind", KINDS)
def test_same_logits_and_gradients(kind, tmp_path):
    model = theirs(kind)
    net, params = imported(model, tmp_path, kind)
    pull = np.random.default_rng(1).standard_normal((2, 7, VOCAB)).astype(np.float32)
    logits = model(torch.tensor(tokens(), dtype=torch.long)).logits
    torch.sum(logits * torch.tensor(pull)).backward()
    trained = fdl.build(Tiny().experiment()).optimizer.select(params)

    @jax.jit
    def forward(trained, params):
        got = net.apply({"params": merge(trained, params)}, jnp.asarray(tokens())).logits()
        return jnp.sum(got * pull), got

    (_, got), gradients = jax.value_and_grad(forward, has_aux=True)(trained, params)
    np.testing.assert_allclose(got, logits.detach().numpy(), atol=1e-4, rtol=1e-4)
    count = 0
    for path, (module, *others) in ours.LLAMA.items():
        if others:  # the combined projection, which this model does not have
            continue
        adapter = gradients["stack"]["period_0"]
        for key in path.split("/"):
            adapter = adapter[key]
        for layer in range(LAYERS):
            layers = model.base_model.model.model.layers
            there = layers[layer].get_submodule(module)
            a, b = np.array(adapter["lora"]["a"][layer]), np.array(adapter["lora"]["b"][layer])
            pairs = [
                (a.reshape(-1, 3).T, there.lora_A["default"].weight),
                (b.reshape(3, -1).T, there.lora_B["default"].weight),
            ]
            if kind == "dora":
                magnitude = np.array(adapter["lora"]["magnitude"][layer]).reshape(-1)
                pairs.append((magnitude, there.lora_magnitude_vector["default"].weight))
            for mine, weight in pairs:
                scale = float(weight.grad.abs().max())
                np.testing.assert_allclose(mine, weight.grad.numpy(), rtol=1e-4, atol=1e-4 * scale)
                count += 1
    assert count == len(TARGETS) * LAYERS * (3 if kind == "dora" else 2)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_those_of_peft(kind, tmp_path):
    model = theirs(kind)
    _, params = imported(model, tmp_path, kind)
    merged = merge_lora(params, Lora(rank=3, alpha=6.0, kind=kind))
    wanted = base_weights(_Merged(model.merge_and_unload()))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), merged, wanted
    )


class _Merged:
    def __init__(self, model):
        self.model = model

    def named_parameters(self):
        return self.model.named_parameters()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_exported_is_read_by_peft(kind, tmp_path):
    model = theirs(kind)
    _, params = imported(model, tmp_path / "theirs", kind)
    config = ours.read_config(tmp_path / "theirs")
    assert (config.rank, config.alpha, config.kind) == (3, 6.0, kind)
    assert set(config.targets) == set(TARGETS)
    names = ours.export_peft(params, tmp_path / "ours", config)
    before = read_header(tmp_path / "theirs" / ours.ARRAYS)
    after = read_header(tmp_path / "ours" / ours.ARRAYS)
    assert set(names) == set(before) == set(after)
    for name, tensor in before.items():
        expected = tensor.read((...,))
        exact = "magnitude" not in name
        np.testing.assert_allclose(after[name].read((...,)), expected, rtol=0 if exact else 1e-6)
    torch.manual_seed(0)
    fresh = transformers.LlamaForCausalLM(model.base_model.model.config)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
    with torch.no_grad():
        ids = torch.tensor(tokens(), dtype=torch.long)
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_combined_projection_takes_the_adapters_of_three(kind, tmp_path):
    model = theirs(kind, groups=HEADS)
    net, params = imported(model, tmp_path / "a", kind, NUM_KV_HEADS=HEADS, COMBINE_QKV=True)
    got = net.apply({"params": params}, jnp.asarray(tokens())).logits()
    with torch.no_grad():
        expected = model(torch.tensor(tokens(), dtype=torch.long)).logits
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-4, rtol=1e-4)
    ours.export_peft(params, tmp_path / "b", ours.read_config(tmp_path / "a"))
    before = read_header(tmp_path / "a" / ours.ARRAYS)
    after = read_header(tmp_path / "b" / ours.ARRAYS)
    assert set(before) == set(after)
    for name in before:
        np.testing.assert_allclose(
            after[name].read((...,)), before[name].read((...,)), rtol=1e-6, atol=1e-7
        )


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_interleaved_rotary_pairs_are_turned(kind, tmp_path):
    """Exported from a model whose heads are interleaved, the q and k adapters are those of Hugging Face's halves."""
    model = theirs(kind)
    _, params = imported(model, tmp_path / "half", kind)
    mixer = params["stack"]["period_0"]["mixer"]
    order = [0, 2, 1, 3]  # of a head of four: halves (0 1)(2 3) side by side
    for name in ("query", "key"):
        turned = {"kernel": mixer[name]["kernel"][..., order]}
        adapter = {k: v if k == "a" else v[..., order] for k, v in mixer[name]["lora"].items()}
        mixer[name] = {**turned, "lora": adapter}
    config = ours.read_config(tmp_path / "half")
    ours.export_peft(params, tmp_path / "turned", config, rope_layout="interleaved")
    before = read_header(tmp_path / "half" / ours.ARRAYS)
    after = read_header(tmp_path / "turned" / ours.ARRAYS)
    for name in before:
        np.testing.assert_allclose(
            after[name].read((...,)), before[name].read((...,)), rtol=1e-6, atol=1e-7
        )
    again = ours.import_peft(tmp_path / "half", params, rope_layout="interleaved")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), again, params)


def _write(folder, **changes):
    raw = json.loads((folder / ours.CONFIG).read_text())
    (folder / ours.CONFIG).write_text(json.dumps(raw | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA can be read"),
        ({"bias": "all"}, "bias='all' is not supported; train with bias='none'"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern={'q_proj': 2} is not supported"),
        ({"use_dora": True, "use_rslora": True}, "use_dora and use_rslora together"),
    ],
)
def test_options_that_would_change_the_numbers_are_refused(changes, message, tmp_path):
    theirs("lora").save_pretrained(tmp_path)
    _write(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        ours.read_config(tmp_path)


def test_adapters_that_do_not_fit_are_named(tmp_path):
    model = theirs("lora")
    _, params = imported(model, tmp_path, "lora")
    config = ours.read_config(tmp_path)
    mixer = params["stack"]["period_0"]["mixer"]
    query = mixer["query"]
    mixer["query"] = {"kernel": query["kernel"]}
    with pytest.raises(ValueError, match=r"no adapter for .*q_proj.lora_A.weight; 4 tensors are"):
        ours.import_peft(tmp_path, params)
    mixer["query"] = {**query, "lora": {**query["lora"], "a": jnp.zeros((LAYERS, WIDTH, 5))}}
    with pytest.raises(
        ValueError, match=r"q_proj.lora_A.weight has shape \[3, 16\], the model wants \[5, 16\]"
    ):
        ours.import_peft(tmp_path, params)
    with pytest.raises(ValueError, match=r"mixer/query has an adapter of rank 5, not 3"):
        ours.export_peft(params, tmp_path / "x", config)
    mixer["query"], mixer["other"] = query, query
    with pytest.raises(
        ValueError, match=r"no Hugging Face module is known for the adapter of .*other"
    ):
        ours.import_peft(tmp_path, params)
    del mixer["other"]
    left = {k: v.read((...,)) for k, v in read_header(tmp_path / ours.ARRAYS).items()}
    short = {k: v for k, v in left.items() if "layers.1.mlp.up_proj.lora_B" not in k}
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / ours.CONFIG).write_text((tmp_path / ours.CONFIG).read_text())
    with Writer(
        tmp_path / "short" / ours.ARRAYS, {k: (v.shape, v.dtype) for k, v in short.items()}
    ):
        pass
    with pytest.raises(ValueError, match=r"no tensor .*layers.1.mlp.up_proj.lora_B.weight"):
        ours.import_peft(tmp_path / "short", params)
    _write(tmp_path, use_dora=True)
    with pytest.raises(ValueError, match=r"is of kind dora; the model has no .*lora/magnitude"):
        ours.import_peft(tmp_path, params)
    with pytest.raises(ValueError, match=r"the adapter of stack/.* is not of the kind 'dora'"):
        ours.export_peft(params, tmp_path / "x", ours.read_config(tmp_path))
    with pytest.raises(ValueError, match="the parameters have no adapters"):
        ours.export_peft({"norm": {"scale": np.ones(3)}}, tmp_path / "x", config)
    with pytest.raises(ValueError, match=r"has no adapter_config.json: it is no folder of PEFT"):
        ours.read_config(tmp_path / "nowhere")
    (tmp_path / ours.ARRAYS).unlink()
    _write(tmp_path, use_dora=False)
    with pytest.raises(ValueError, match=r"has no adapter_model.safetensors; PEFT's older .bin"):
        ours.import_peft(tmp_path, params)
