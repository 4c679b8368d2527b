"""Cached decoding against full forward passes; continuations on every mesh, in every batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from paxlike import parallel
from paxlike.decode import Generator, SamplingOptions
from paxlike.ops import attention_kernels as kernels
from paxlike.ops import platform
from paxlike.ops.kernel_check import KernelCheck
from paxlike.train.state import abstract_variables

PROMPTS = ["hello", "", "a longer prompt, of 33 characters", "abc", "The quick"]
GREEDY = SamplingOptions(max_tokens=14, temperature=0)
MAX_LENGTH = 48


@functools.partial(jax.jit, static_argnums=0)
def forward(model, variables, tokens):
    return model.apply(variables, tokens).logits()


def all_logits(model, variables, rows):
    """Logits of the full forward pass, rows padded to one length."""
    padded = np.zeros((len(rows), MAX_LENGTH), np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return np.asarray(forward(model, variables, padded))


def naive_greedy(model, variables, tokenizer, prompt, options, max_length=MAX_LENGTH):
    """Argmax of a full forward pass for every token."""
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    start = len(ids)
    while len(ids) - start < options.max_tokens and len(ids) < max_length:
        logits = all_logits(model, variables, [ids])[0, len(ids) - 1, : tokenizer.vocab_size]
        ids.append(int(logits.argmax()))
        if ids[-1] == tokenizer.eos_id:
            break
    return ids[start:]


@pytest.mark.parametrize(
    ("kv_heads", "scan", "copies"),
    [(None, True, False), (2, False, False), (2, True, True), (None, False, True)],
    ids=["heads, scan", "grouped, unrolled", "grouped, apart", "heads, apart"],
)
def test_cached_logits_equal_the_full_forward_pass_at_every_position(
    decoder, monkeypatch, kv_heads, scan, copies
):
    if not copies:  # as on an accelerator
        monkeypatch.setattr(platform, "CPU_COPY_BYTES", -1)
    model = decoder(scan=scan, kv_heads=kv_heads)
    variables = nn.unbox(jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 4), jnp.int32)))
    rng = np.random.default_rng(0)
    lengths, more, width = np.array([3, 9, 1, 6]), 8, 9
    rows = [rng.integers(0, 97, n + more) for n in lengths]
    expected = all_logits(model, variables, rows)
    tokens = np.stack(
        [np.pad(r[:n], (0, width - n), constant_values=7) for r, n in zip(rows, lengths)]
    )

    @jax.jit
    def prefill(tokens):
        output, state = model.apply(variables, tokens, cache_length=20, mutable=["cache"])
        return output.logits(), state["cache"]

    logits, cache = prefill(tokens)
    for i, n in enumerate(lengths):
        np.testing.assert_allclose(logits[i, :n], expected[i, :n], rtol=1e-5, atol=1e-5)

    @jax.jit
    def step(cache, tokens, offset):
        output, state = model.apply(
            variables | {"cache": cache}, tokens, offset=offset, cache_length=20, mutable=["cache"]
        )
        return output.logits()[:, 0], state["cache"]

    for j in range(more):
        column = np.stack([r[n + j : n + j + 1] for r, n in zip(rows, lengths)])
        logits, cache = step(cache, column, lengths + j)
        assert ("apart" in cache["stack"]) == copies
        wanted = np.stack([expected[i, n + j] for i, n in enumerate(lengths)])
        np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def greedy(model, variables, tokenizer):
    return Generator(model, variables, tokenizer, GREEDY, max_length=MAX_LENGTH)


@pytest.fixture(scope="module")
def greedy_results(greedy):
    return greedy.generate(PROMPTS)


def test_greedy_equals_the_argmax_of_full_forward_passes(
    model, variables, tokenizer, greedy_results
):
    for result in greedy_results:
        assert result.tokens == naive_greedy(model, variables, tokenizer, result.prompt, GREEDY)
        assert result.text == tokenizer.decode(result.tokens)
        assert result.prompt_tokens == [0, *tokenizer.encode(result.prompt)]
    assert [r.prompt for r in greedy_results] == PROMPTS
    assert {r.finish_reason for r in greedy_results} == {"length"}


def test_logprobs_are_those_of_the_model(model, variables, greedy_results):
    rows = [r.prompt_tokens + r.tokens for r in greedy_results]
    expected = np.asarray(jax.nn.log_softmax(all_logits(model, variables, rows)))
    for i, result in enumerate(greedy_results):
        first = len(result.prompt_tokens) - 1
        wanted = [expected[i, first + j, token] for j, token in enumerate(result.tokens)]
        np.testing.assert_allclose(result.logprobs, wanted, rtol=1e-4, atol=1e-5)


def test_two_programs_serve_all_calls_of_a_bucket_and_a_batch_size(greedy, greedy_results):
    before = greedy.num_programs
    again = greedy.generate([p[::-1] for p in PROMPTS])
    assert greedy.num_programs == before == 2
    assert len(again) == len(PROMPTS)
    assert greedy.throughput.tokens == sum(len(r.tokens) for r in [*greedy_results, *again])
    assert greedy.throughput.tokens_per_second > 0


def test_no_prompt_gives_no_result(greedy):
    assert greedy.generate([]) == []


def batch_shards(shape):
    data, fsdp, _ = shape
    return data * fsdp


SAMPLING = SamplingOptions(
    max_tokens=12,
    temperature=0.9,
    top_k=30,
    top_p=0.95,
    repetition_penalty=1.2,
    seed=3,
    num_samples=2,
)


@pytest.fixture(scope="module")
def sampled(model, variables, tokenizer):
    return Generator(model, variables, tokenizer, SAMPLING, max_length=MAX_LENGTH).generate(PROMPTS)


def test_stages_of_a_pipeline_change_nothing(decoder, variables, tokenizer, sampled):
    model = decoder()
    mesh = parallel.Mesh(ici=(2, 2), axes=("pipeline", "tensor")).build(jax.devices()[:4])
    with parallel.activate(mesh):
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract_variables(model, mesh))
        placed = jax.tree.map(jax.device_put, variables, {"params": places["params"]})
        generator = Generator(model, placed, tokenizer, SAMPLING, max_length=MAX_LENGTH)
        results = generator.generate(PROMPTS)
    assert [r.tokens for r in results] == [r.tokens for r in sampled]


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 1, 2)], ids=str)
def test_a_mesh_changes_nothing(decoder, variables, tokenizer, sampled, shape):
    model = decoder()
    mesh = parallel.Mesh(ici=shape).build(jax.devices()[: int(np.prod(shape))])
    with parallel.activate(mesh):
        boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((4, 4), jnp.int32)))
        is_box = lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)
        shardings = jax.tree.map(
            lambda b: parallel.named_sharding(mesh, b.names), boxed, is_leaf=is_box
        )
        placed = jax.tree.map(jax.device_put, variables, shardings)
        generator = Generator(model, placed, tokenizer, SAMPLING, max_length=MAX_LENGTH)
        results = generator.generate(PROMPTS)
    assert [r.tokens for r in results] == [r.tokens for r in sampled]
    np.testing.assert_allclose(
        np.concatenate([r.logprobs for r in results]),
        np.concatenate([r.logprobs for r in sampled]),
        rtol=1e-4,
        atol=1e-5,
    )
    # Keys and values: rows over data and fsdp, heads over tensor, and updated where they are.
    advance = next(c for key, c in generator._compiled.items() if "num_tokens" in dict(key[2]))
    state, *_ = advance.output_shardings
    for sharding in jax.tree.leaves(state.cache):
        assert np.prod(sharding.shard_shape((4,) * 5)) == 4**5 / mesh.size
    num_rows = len(PROMPTS) * SAMPLING.num_samples
    num_rows += -num_rows % batch_shards(shape)
    cache_bytes = (
        2 * 2 * num_rows * MAX_LENGTH * 4 * 8 * 4
    )  # k and v, layers, ..., heads, size, float32
    assert advance.memory_analysis().alias_size_in_bytes >= cache_bytes / mesh.size


def test_samples_differ_and_repeat_with_the_seed(model, variables, tokenizer, sampled):
    first, second = (r for r in sampled if r.prompt == "hello")
    assert (first.sample_index, second.sample_index) == (0, 1)
    assert first.tokens != second.tokens
    again = Generator(model, variables, tokenizer, SAMPLING, max_length=MAX_LENGTH).generate(
        PROMPTS
    )
    assert again == sampled


def test_another_seed_gives_other_text(model, variables, tokenizer, sampled):
    other = dataclasses.replace(SAMPLING, seed=4)
    results = Generator(model, variables, tokenizer, other, max_length=MAX_LENGTH).generate(PROMPTS)
    assert all(a.tokens != b.tokens for a, b in zip(results, sampled))


def test_a_continuation_does_not_depend_on_its_neighbours(model, variables, tokenizer, sampled):
    small = dataclasses.replace(SAMPLING, batch_size=3, num_samples=1)
    others = ["hello", "x", "something else", "abc", "y" * 20]
    results = Generator(model, variables, tokenizer, small, max_length=MAX_LENGTH).generate(others)
    by_name = {(r.prompt, r.prompt_index, r.sample_index): r.tokens for r in sampled}
    for i in (0, 3):
        assert results[i].tokens == by_name[others[i], i, 0]


def test_a_row_ends_at_the_length_of_the_model(model, variables, tokenizer):
    options = SamplingOptions(max_tokens=40, temperature=0)
    prompts = ["x" * 40, "y" * 46, "z" * 30]
    results = Generator(model, variables, tokenizer, options, max_length=MAX_LENGTH).generate(
        prompts
    )
    for result, prompt in zip(results, prompts):
        assert len(result.prompt_tokens) + len(result.tokens) == MAX_LENGTH
        assert result.finish_reason == "length"
        assert result.tokens == naive_greedy(model, variables, tokenizer, prompt, options)


def test_a_prompt_without_room_is_refused(greedy):
    with pytest.raises(ValueError, match=r"prompt 2 has 48 tokens, BOS included.* at most 47"):
        greedy.generate(["fine", "x" * 47])


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(decoder, variables, tokenizer):
    with pytest.raises(
        ValueError, match=r"ids up to 96 .* vocabulary of 90: set VOCAB_SIZE to at least 97"
    ):
        Generator(decoder(vocab_size=90), variables, tokenizer, max_length=MAX_LENGTH)


def test_ids_that_no_tokenizer_made_are_never_drawn(model, variables, tokenizer):
    few = dataclasses.replace(tokenizer, vocab_size=40)
    hot = SamplingOptions(max_tokens=40, temperature=50.0, num_samples=4)
    results = Generator(model, variables, few, hot, max_length=MAX_LENGTH).generate([""])
    tokens = np.concatenate([r.tokens for r in results])
    assert tokens.max() < 40 <= model.vocab_size


def test_the_end_of_document_token_ends_a_row(model, variables, tokenizer, greedy_results):
    """With the fourth token of a greedy continuation declared to be the end, it stops there."""
    target = greedy_results[0].tokens[3]
    ending = dataclasses.replace(tokenizer, eos_id=target)
    for on_text in (None, lambda index, text: None):
        results = Generator(model, variables, ending, GREEDY, max_length=MAX_LENGTH).generate(
            PROMPTS, on_text=on_text
        )
        for result, full in zip(results, greedy_results):
            end = full.tokens.index(target) + 1 if target in full.tokens else len(full.tokens)
            assert result.tokens == full.tokens[:end]
            assert len(result.logprobs) == end
            assert result.finish_reason == ("eos" if target in full.tokens else "length")
    assert results[0].finish_reason == "eos"


def test_stop_strings_end_rows_across_tokens(model, variables, tokenizer, greedy_results):
    full = greedy_results[0].text
    stop = full[5:8]  # each character is a token
    options = dataclasses.replace(GREEDY, stop_strings=(stop, "not to be found"))
    results = Generator(model, variables, tokenizer, options, max_length=MAX_LENGTH).generate(
        PROMPTS
    )
    for result, whole in zip(results, greedy_results):
        cut = whole.text.find(stop)
        if cut < 0:
            assert (result.text, result.finish_reason) == (whole.text, "length")
        else:
            assert (result.text, result.finish_reason) == (whole.text[:cut], "stop")
            assert result.tokens == whole.tokens[: cut + len(stop)]
            assert result.logprobs == pytest.approx(whole.logprobs[: cut + len(stop)], rel=1e-4)
    assert results[0].finish_reason == "stop"


def test_streamed_pieces_add_up_and_results_come_once(greedy, greedy_results):
    pieces, ended = {}, {}

    def on_text(index, text):
        assert index not in ended
        pieces.setdefault(index, []).append(text)

    results = greedy.generate(
        PROMPTS, on_text=on_text, on_result=lambda i, r: ended.setdefault(i, r)
    )
    assert {i: "".join(p) for i, p in pieces.items()} == dict(enumerate(r.text for r in results))
    assert all(len(p) > 1 for p in pieces.values())
    assert ended == dict(enumerate(results))
    assert [r.tokens for r in results] == [r.tokens for r in greedy_results]


def test_bfloat16_compute(decoder, variables, tokenizer):
    model = decoder(dtype="bfloat16")
    results = Generator(model, variables, tokenizer, GREEDY, max_length=MAX_LENGTH).generate(
        ["hello"]
    )
    assert len(results[0].tokens) == GREEDY.max_tokens
    assert np.isfinite(results[0].logprobs).all()


def test_a_wrong_kernel_is_not_used_for_the_prompt(
    tmp_path, monkeypatch, model, variables, tokenizer
):
    options = dataclasses.replace(GREEDY, max_tokens=1)
    wanted = naive_greedy(model, variables, tokenizer, PROMPTS[0], options)  # nothing planted yet
    tiles = kernels.find("chunked")
    lost = lambda q, k, v, *_, **how: 0 * tiles.attend(q, k, v, *_, **how)
    planted = (dataclasses.replace(tiles, attend=lost), kernels.find("reference"))
    monkeypatch.setattr("paxlike.ops.chunked_attention.BLOCK", 16)
    for name, value in (("LONG", 16), ("REFUSED", {}), ("KERNELS", planted)):
        monkeypatch.setattr(kernels, name, value)
    said: list[str] = []
    check = {"kernels": KernelCheck(folder=str(tmp_path)), "say": said.append}
    generator = Generator(model, variables, tokenizer, options, max_length=MAX_LENGTH, **check)
    (found,) = generator.generate(PROMPTS[:1])
    assert [line.partition(":")[0] for line in said] == ["checked", "chunked attention is not used"]
    assert found.tokens == wanted
