"""The forward pass against Hugging Face's GPT-2: random weights, float32, 1e-4 absolute on every logit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from paxlike import parallel
from paxlike.train.optimizer import Optimizer, Schedule
from paxlike.train.state import StateFactory

NEEDS = "parity tests need torch and transformers (the extra `parity`)"
torch = pytest.importorskip("torch", reason=NEEDS)
pytest.importorskip("transformers", reason=NEEDS)

from tests.parity.gpt2 import decoder, hugging_face, to_hugging_face, to_paxlike  # noqa: E402

pytestmark = pytest.mark.parity
TOLERANCE = 1e-4

# layers, width, heads, vocabulary, positions; rows, tokens
SHAPES = {
    "one-head": ((1, 8, 1, 17, 8), (1, 8)),
    "odd-sizes": ((3, 36, 6, 101, 40), (3, 29)),
    "deep": ((8, 32, 4, 64, 32), (2, 32)),
    "wide": ((2, 192, 12, 500, 128), (2, 128)),
}


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "unrolled"])
@pytest.mark.parametrize("name", SHAPES)
def test_logits_and_hidden_states_equal_hugging_face(name, scan):
    shape, batch = SHAPES[name]
    reference = _reference(shape)
    tokens = _tokens(batch, vocab_size=shape[3])
    expected = _run(reference, tokens)

    model = decoder(reference.config, scan=scan)
    output = jax.jit(model.apply)({"params": _weights(model, reference, tokens)}, tokens)

    assert np.std(expected["logits"]) > 0.5  # differences would show
    np.testing.assert_allclose(output.hidden, expected["hidden"], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(output.logits(), expected["logits"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("mesh_shape", [(1, 2, 2), (2, 1, 2), (2, 2, 1)])
def test_logits_equal_hugging_face_on_a_mesh(mesh_shape):
    reference = _reference((3, 32, 4, 96, 32))
    tokens = _tokens((4, 32), vocab_size=96)
    expected = _run(reference, tokens)
    model = decoder(reference.config)
    mesh = parallel.Mesh(ici=mesh_shape).build(jax.devices()[:4])
    with parallel.activate(mesh):
        spec = {"tokens": jax.ShapeDtypeStruct(tokens.shape, tokens.dtype)}
        abstract = StateFactory(model, Optimizer(Schedule("constant", 0.0)), spec, mesh).abstract()
        params = to_paxlike(reference.state_dict(), abstract.params)
        rows = jax.device_put(tokens, parallel.named_sharding(mesh, ("batch", "length")))
        logits = jax.jit(lambda p, t: model.apply({"params": p}, t).logits())(params, rows)
    assert not params["embedding"]["table"].sharding.is_fully_replicated
    assert not logits.sharding.is_fully_replicated
    np.testing.assert_allclose(logits, expected["logits"], atol=TOLERANCE, rtol=0)


def test_packed_documents_equal_hugging_face_on_each_document_alone():
    lengths = [(5, 11, 8), (20, 4)]
    width = 28  # more than the documents of a row: there is padding at the end
    reference = _reference((3, 32, 4, 96, width))
    tokens = _tokens((2, width), vocab_size=96)
    segments = np.zeros((2, width), np.int32)
    positions = np.zeros((2, width), np.int32)
    documents = []
    for row, row_lengths in enumerate(lengths):
        start = 0
        for number, length in enumerate(row_lengths, 1):
            segments[row, start : start + length] = number
            positions[row, start : start + length] = np.arange(length)
            documents.append((row, slice(start, start + length)))
            start += length

    model = decoder(reference.config)
    params = _weights(model, reference, tokens)
    forward = jax.jit(lambda p, t, **layout: model.apply({"params": p}, t, **layout).logits())
    logits = forward(params, tokens, positions=positions, segments=segments)
    for row, where in documents:
        alone = _run(reference, tokens[row : row + 1, where])["logits"][0]
        np.testing.assert_allclose(logits[row, where], alone, atol=TOLERANCE, rtol=0)


def test_weights_survive_the_way_there_and_back():
    reference = _reference((2, 16, 2, 32, 16))
    tokens = _tokens((1, 16), vocab_size=32)
    state = reference.state_dict()
    back = to_hugging_face(_weights(decoder(reference.config), reference, tokens), state)
    assert set(back) | {"lm_head.weight"} == set(state)
    for name, value in back.items():
        np.testing.assert_allclose(value, state[name].numpy(), rtol=1e-6, atol=1e-7)


def _reference(shape):
    num_layers, width, num_heads, vocab_size, max_length = shape
    return hugging_face(
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        vocab_size=vocab_size,
        max_length=max_length,
    )


def _tokens(shape, *, vocab_size):
    return np.random.default_rng(0).integers(0, vocab_size, shape, dtype=np.int32)


def _run(reference, tokens) -> dict[str, np.ndarray]:
    """Logits and final hidden states of Hugging Face's model."""
    with torch.no_grad():
        output = reference(
            torch.from_numpy(tokens).long(), output_hidden_states=True, use_cache=False
        )
    return {"logits": output.logits.numpy(), "hidden": output.hidden_states[-1].numpy()}


def _weights(model, reference, tokens):
    variables = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(tokens)))
    return to_paxlike(reference.state_dict(), variables["params"])
