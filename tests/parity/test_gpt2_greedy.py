"""Greedy decoding against Hugging Face's `generate`, token for token, and the log probability of each token."""

import dataclasses

import jax
import numpy as np
import pytest

from paxlike import parallel
from paxlike.decode import Generator, SamplingOptions
from paxlike.train.state import abstract_variables

NEEDS = "parity tests need torch and transformers (the extra `parity`)"
torch = pytest.importorskip("torch", reason=NEEDS)
pytest.importorskip("transformers", reason=NEEDS)

from tests.parity.gpt2 import decoder, hugging_face, to_paxlike  # noqa: E402

pytestmark = pytest.mark.parity

VOCAB_SIZE, MAX_LENGTH, MAX_TOKENS, BOS = 90, 64, 30, 0
PROMPT_LENGTHS = (1, 3, 9, 20, 33)


@dataclasses.dataclass(frozen=True)
class Characters:
    """Id i is the i-th character from U+4E00 on."""

    eos_id: int
    vocab_size: int = VOCAB_SIZE
    bos_id: int = BOS

    def encode(self, text):
        return [ord(c) - 0x4E00 for c in text]

    def decode(self, ids):
        return "".join(chr(0x4E00 + int(i)) for i in ids if i not in (self.bos_id, self.eos_id))


@pytest.fixture(scope="module")
def reference():
    return hugging_face(
        num_layers=3,
        width=48,
        num_heads=6,
        vocab_size=VOCAB_SIZE,
        max_length=MAX_LENGTH,
        std=0.2,
        seed=1,
    )


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [[int(i) for i in rng.integers(1, VOCAB_SIZE, length)] for length in PROMPT_LENGTHS]


@pytest.fixture(scope="module")
def eos_id(reference, prompts):
    """A token that the first continuation comes to half-way: some rows end there and others do not."""
    free = [_generate(reference, prompt, eos_id=None) for prompt in prompts]
    return free[0][MAX_TOKENS // 2]


@pytest.mark.parametrize("penalty", [1.0, 1.5])
@pytest.mark.parametrize("mesh_shape", [(1, 1, 1), (1, 2, 2)])
def test_greedy_equals_generate(reference, prompts, eos_id, mesh_shape, penalty):
    expected = [_generate(reference, prompt, eos_id=eos_id, penalty=penalty) for prompt in prompts]
    got = _decode(reference, prompts, eos_id, mesh_shape, penalty)
    assert [generation.tokens for generation in got] == expected
    assert len({len(tokens) for tokens in expected}) > 1
    for prompt, generation in zip(prompts, got, strict=True):
        ended = generation.tokens[-1] == eos_id
        assert generation.finish_reason == ("eos" if ended else "length")
        wanted = _log_probabilities(reference, prompt, generation.tokens)
        np.testing.assert_allclose(generation.logprobs, wanted, atol=1e-4, rtol=0)


def _decode(reference, prompts, eos_id, mesh_shape, penalty):
    tokenizer = Characters(eos_id)
    model = decoder(reference.config)
    mesh = parallel.Mesh(ici=mesh_shape).build(jax.devices()[: int(np.prod(mesh_shape))])
    options = SamplingOptions(max_tokens=MAX_TOKENS, temperature=0.0, repetition_penalty=penalty)
    with parallel.activate(mesh):
        params = to_paxlike(reference.state_dict(), abstract_variables(model, mesh)["params"])
        generator = Generator(model, {"params": params}, tokenizer, options, max_length=MAX_LENGTH)
        return generator.generate(["".join(chr(0x4E00 + i) for i in prompt) for prompt in prompts])


def _generate(reference, prompt, *, eos_id, penalty=1.0) -> list[int]:
    """Hugging Face's continuation of one prompt, alone, up to the end of the document or the room there is."""
    ids = torch.tensor([[BOS, *prompt]])
    reference.generation_config.eos_token_id = eos_id
    with torch.no_grad():
        row = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(MAX_TOKENS, MAX_LENGTH - ids.shape[1]),
            do_sample=False,
            repetition_penalty=penalty,
            pad_token_id=0,
        )
    return row[0, ids.shape[1] :].tolist()


def _log_probabilities(reference, prompt, tokens):
    """Of each generated token, from one pass over the whole row."""
    row = torch.tensor([[BOS, *prompt, *tokens]])
    with torch.no_grad():
        logits = reference(row, use_cache=False).logits[0]
    log_probabilities = torch.log_softmax(logits[len(prompt) : -1], dim=-1)
    return log_probabilities[torch.arange(len(tokens)), tokens].numpy()
