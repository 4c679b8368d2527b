"""LLaMA, Mistral, Qwen and Gemma against Hugging Face: random weights, float32, 1e-4 on every logit, greedy tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxlike import parallel
from paxlike.decode import Generator, SamplingOptions

NEEDS = "parity tests need torch and transformers (the extra `parity`)"
torch = pytest.importorskip("torch", reason=NEEDS)
pytest.importorskip("transformers", reason=NEEDS)

from tests.parity.families import FAMILIES, config, load, reference  # noqa: E402

pytestmark = pytest.mark.parity
TOLERANCE = 1e-4
TOKENS = np.random.default_rng(1).integers(1, 102, (2, 33)).astype(np.int32)
TOKENS[:, 0] = 0  # BOS


@dataclasses.dataclass(frozen=True)
class Numbers:
    """The text of ids is the ids."""

    eos_id: int
    vocab_size: int = 102
    bos_id: int = 0

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> (Hugging Face's model, its folder, our config), made once."""
    made = {}

    def get(name):
        if name not in made:
            small = config(name)
            model = reference(small, seed=3)
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = model, folder, small
        return made[name]

    return get


def logits_of(model, tokens):
    with torch.no_grad():
        return model(torch.asarray(tokens, dtype=torch.long)).logits.numpy()


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_hugging_face(name, saved):
    theirs, folder, small = saved(name)
    expected = logits_of(theirs, TOKENS)
    model, params, mesh = load(folder, small)
    with parallel.activate(mesh):
        logits = jax.jit(lambda p, t: model.apply({"params": p}, t).logits())(params, TOKENS)
    assert np.std(expected) > 0.3  # differences would show
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["llama3.1", "gemma2", "qwen3-moe"])
def test_logits_on_a_mesh_equal_hugging_face(name, saved):
    theirs, folder, small = saved(name)
    expected = logits_of(theirs, np.tile(TOKENS[:, :32], (2, 1)))
    model, params, mesh = load(folder, small, (1, 2, 2))
    with parallel.activate(mesh):
        place = parallel.named_sharding(mesh, ("batch", "length"))
        tokens = jax.device_put(np.tile(TOKENS[:, :32], (2, 1)), place)
        logits = jax.jit(lambda p, t: model.apply({"params": p}, t).logits())(params, tokens)
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["llama3.1", "mistral", "qwen3", "gemma2", "gemma3"])
def test_packed_documents_equal_each_document_alone(name, saved):
    theirs, folder, small = saved(name)
    lengths = (9, 13, 11)
    segments = np.repeat([1, 2, 3], lengths)[None].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32)
    model, params, mesh = load(folder, small)
    with parallel.activate(mesh):
        apply = lambda p, t: model.apply(
            {"params": p}, t, segments=jnp.asarray(segments), positions=jnp.asarray(positions)
        )
        logits = np.asarray(jax.jit(lambda p, t: apply(p, t).logits())(params, TOKENS[:1]))
    start = 0
    for length in lengths:
        document = slice(start, start + length)
        expected = logits_of(theirs, TOKENS[:1, document])
        np.testing.assert_allclose(logits[:, document], expected, atol=TOLERANCE, rtol=0)
        start += length


@pytest.mark.parametrize(
    "name",
    [
        "llama2",
        "llama3.1",
        "mistral",
        "qwen2.5",
        "qwen3",
        "gemma2",
        "gemma3",
        "mixtral",
        "qwen3-moe",
        "deepseek-v2",
        "deepseek-v3",
    ],
)
def test_greedy_generation_equals_hugging_face(name, saved):
    theirs, folder, small = saved(name)
    with torch.no_grad():
        whole = theirs.generate(
            torch.asarray(TOKENS[:, :12], dtype=torch.long),
            attention_mask=torch.ones(2, 12, dtype=torch.long),
            max_new_tokens=20,
            do_sample=False,
        ).numpy()
    continuations = whole[:, 12:].tolist()
    never = next(i for i in range(1, 102) if i not in np.ravel(continuations))
    assert len(set(np.ravel(continuations))) > 3  # not one token again and again
    model, params, mesh = load(folder, small)
    with parallel.activate(mesh):
        options = SamplingOptions(max_tokens=20, temperature=0.0)
        generator = Generator(model, {"params": params}, Numbers(never), options, max_length=64)
        prompts = [" ".join(map(str, row[1:12])) for row in TOKENS]
        assert [each.tokens for each in generator.generate(prompts)] == continuations
