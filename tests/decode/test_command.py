"""The decode mode from a checkpoint on disk to JSON lines, and every way in which a user can get it wrong."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxlike import parallel
from paxlike.checkpoint import Checkpointer
from paxlike.decode import Generator, Prompt, SamplingOptions, decode, read_prompts
from paxlike.decode.command import _cut
from paxlike.experiment import Experiment
from paxlike.tasks.language import CausalLanguage
from paxlike.train.optimizer import Optimizer, Schedule
from paxlike.train.state import StateFactory

OPTIONS = SamplingOptions(max_tokens=10, temperature=0.8, seed=5)
MAX_LENGTH = 48


@pytest.fixture(scope="module")
def experiment(model, tokenizer):
    return Experiment(
        name="Tiny",
        model=model,
        task=CausalLanguage(),
        optimizer=Optimizer(Schedule("constant", 1e-3), ema_decay=0.9),
        mesh=parallel.Mesh((1, 2, 2)),
        num_steps=10,
        percore_batch_size=1,
        tokenizer=tokenizer,
        sampling=OPTIONS,
    )


@pytest.fixture(scope="module")
def states(experiment):
    """Training states of steps 3 and 7, born on one device, whose averaged weights differ from the others."""
    mesh = parallel.Mesh().build(jax.devices()[:1])
    with parallel.activate(mesh):
        spec = {"tokens": jax.ShapeDtypeStruct((4, 8), jnp.int32)}
        factory = StateFactory(experiment.model, experiment.optimizer, spec, mesh)
        states = {step: factory.initialize(seed) for step, seed in ((3, 0), (7, 1))}
    halved = lambda state: state.replace(ema=jax.tree.map(lambda x: x / 2, state.params))
    return {step: halved(state) for step, state in states.items()}


@pytest.fixture
def run(states, tmp_path):
    """A job_log_dir with two checkpoints."""
    with Checkpointer(tmp_path / "run") as checkpointer:
        for step, state in states.items():
            data = {} if step == 7 else {"fingerprint": {"tokenizer": "abc"}}
            checkpointer.save(step, state, data=data, config="{}", wait=True, force=True)
    return tmp_path / "run"


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def expected(experiment, params, prompts, options=OPTIONS):
    generator = Generator(
        experiment.model, {"params": params}, experiment.tokenizer, options, max_length=MAX_LENGTH
    )
    return generator.generate(prompts)


def test_prompts_from_the_command_line_and_a_file(experiment, states, run, tmp_path, capsys):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"prompt": "one", "id": "q1"}\n\n{"text": "a\\nb"}\n'.replace("\\n", " "))
    code = decode(experiment, run, prompts=["hello", ""], prompt_file=str(file))
    assert code == 0
    written = lines(run / "decoder_out" / "questions" / "decoder_out_00000007.jsonl")
    prompts = ["hello", "", "one", "a b"]
    assert [line["prompt"] for line in written] == prompts
    assert [line["id"] for line in written] == [0, 1, "q1", 3]
    for line, result in zip(written, expected(experiment, states[7].ema, prompts)):
        assert line["text"] == result.text
        assert line["tokens"] == result.tokens
        assert line["finish_reason"] == result.finish_reason
        np.testing.assert_allclose(line["logprobs"], result.logprobs, rtol=1e-4, atol=1e-5)
        assert (line["seed"], line["step"], line["weights"], line["sample"]) == (5, 7, "ema", 0)
    out, err = capsys.readouterr()
    assert "=== prompt 1 | 10 tokens, ended by length ===\nhello" + written[0]["text"] in out
    assert "=== prompt q1 |" in out
    assert "4 continuations, 40 tokens in" in err
    assert "tokens/s" in err
    assert "ema of step 7" in err and "warning" not in err


def test_other_results_of_the_same_step_are_kept(tmp_path):
    from paxlike.decode.command import _write

    file = tmp_path / "decoder_out_00000007.jsonl"
    written = [_write(file, [{"text": text}]) for text in ("a", "b", "c", "b", "a")]
    names = [path.name.removeprefix("decoder_out_00000007") for path in written]
    assert names == [".jsonl", "_2.jsonl", "_3.jsonl", "_2.jsonl", ".jsonl"]
    assert [lines(path)[0]["text"] for path in written] == ["a", "b", "c", "b", "a"]
    assert len([*tmp_path.iterdir()]) == 3


def test_one_prompt_streams_to_the_terminal(experiment, states, run, capsys):
    decode(experiment, run, prompts=["hello"], step=3, use="params", name="chat")
    (line,) = lines(run / "decoder_out" / "chat" / "decoder_out_00000003.jsonl")
    assert line["tokens"] == expected(experiment, states[3].params, ["hello"])[0].tokens
    out, err = capsys.readouterr()
    assert out == f"hello{line['text']}\n"
    assert "is not the one of step 3 (abc): the same ids mean other text; set VOCAB_PATH" in err


def test_the_weights_of_another_run(experiment, states, run, tmp_path):
    decode(experiment, tmp_path / "mine", prompts=["x"], checkpoint=str(run), step=3)
    (line,) = lines(tmp_path / "mine" / "decoder_out" / "prompts" / "decoder_out_00000003.jsonl")
    assert line["tokens"] == expected(experiment, states[3].ema, ["x"])[0].tokens


def test_over_a_context_axis_rows_stay_whole(experiment, states, run):
    mesh = parallel.Mesh((1, 2, 2), axes=("fsdp", "context", "tensor"))
    rules = parallel.rules_with(residual_length=("context", "tensor"))
    decode(dataclasses.replace(experiment, mesh=mesh, rules=rules), run, prompts=["hello"])
    (line,) = lines(run / "decoder_out" / "prompts" / "decoder_out_00000007.jsonl")
    assert line["tokens"] == expected(experiment, states[7].ema, ["hello"])[0].tokens


def test_a_damaged_checkpoint_is_passed_over(experiment, run):
    for file in (run / "checkpoints" / "checkpoint_00000007" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    decode(experiment, run, prompts=["x"])
    assert [f.name for f in (run / "decoder_out" / "prompts").iterdir()] == [
        "decoder_out_00000003.jsonl"
    ]


def test_tokens_that_have_no_room_are_noted():
    note = _cut([[1, 2], [1] * 6], 58, 62)
    assert note.startswith("note: rows have 62 tokens") and "of 1 prompt(s)" in note
    assert "DECODE_MAX_TOKENS=58, 60 at most" in note
    assert _cut([[1, 2, 3, 4]], 58, 62) == ""


def test_several_samples_are_told_apart(experiment, run, capsys):
    options = dataclasses.replace(OPTIONS, num_samples=2, max_tokens=3)
    decode(experiment, run, prompts=["x"], options=options, stream=True)
    written = lines(run / "decoder_out" / "prompts" / "decoder_out_00000007.jsonl")
    assert [(line["id"], line["sample"]) for line in written] == [(0, 0), (0, 1)]
    assert "=== prompt 1 | sample 2 ===" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, arguments, message",
    [
        ({}, {}, "nothing to decode: give --prompt=TEXT"),
        ({"tokenizer": None}, {"prompts": ["x"]}, "Tiny has no tokenizer"),
        ({}, {"prompts": ["x" * 60]}, "prompt 1 has 61 tokens"),
        ({}, {"prompts": ["x"], "step": 5}, "no checkpoint of step 5 .* steps 3, 7"),
        ({}, {"prompts": ["x"], "checkpoint": "/nowhere"}, "no checkpoint in /nowhere"),
        (
            {},
            {"prompts": ["x"], "prompt_file": "/nowhere"},
            "cannot read the prompts in /nowhere: No such",
        ),
    ],
)
def test_mistakes_end_in_one_line(experiment, run, change, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        decode(dataclasses.replace(experiment, **change), run, **arguments)
    assert "\n" not in str(error.value)


def test_another_model_is_refused(experiment, decoder, run):
    other = dataclasses.replace(experiment, model=decoder(vocab_size=128))
    with pytest.raises(ValueError, match="do not fit this model: .*table"):
        decode(other, run, prompts=["x"])


def test_averaged_weights_must_be_there_when_asked_for(experiment, states, tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(
            1, states[3].replace(ema=None), data={}, config="{}", wait=True, force=True
        )
    with pytest.raises(ValueError, match="has no 'ema' weights"):
        decode(experiment, tmp_path, prompts=["x"], use="ema")


def test_a_folder_that_cannot_be_made_is_refused(experiment, run):
    (run / "decoder_out").write_text("a file in the way")
    with pytest.raises(ValueError, match="cannot write to .*decoder_out"):
        decode(experiment, run, prompts=["x"])


def test_a_model_without_a_bound_takes_the_training_length(experiment, tokenizer):
    from paxlike.decode.command import _max_length

    unbounded = types.SimpleNamespace(position=None)
    loader = types.SimpleNamespace(seq_len=64)
    assert _max_length(experiment) == MAX_LENGTH
    assert _max_length(dataclasses.replace(experiment, model=unbounded, train_data=loader)) == 64
    with pytest.raises(ValueError, match="set MAX_SEQ_LEN"):
        _max_length(dataclasses.replace(experiment, model=unbounded))


def test_prompts_of_a_text_file_are_its_lines(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("first\r\n\n  second \u2028 line\n".encode())
    assert read_prompts(file) == [Prompt("first"), Prompt("  second \u2028 line")]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", b"x", "is no prompt file: give .txt"),
        ("a.txt", b"\n\n", "there is no prompt in"),
        ("a.txt", b"\xff\xfe", "it is not UTF-8"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt"', r"a.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"question": "a"}', r"a.jsonl:1 has no text under 'prompt' or 'text'"),
        ("a.jsonl", b'["a"]', r"a.jsonl:1 has no text"),
    ],
)
def test_prompt_files_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_prompts(tmp_path / name)
    assert "\n" not in str(error.value)


def test_conversations_need_a_template(experiment, run, tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "hello"}], "id": 4}\n')
    (prompt,) = read_prompts(file)
    assert prompt == Prompt("", 4, ({"role": "user", "content": "hello"},))
    with pytest.raises(ValueError, match="a prompt is a conversation .*: set DECODE_CHAT=True"):
        decode(experiment, run, prompt_file=str(file))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("[]", "'messages' is no list of objects with 'role' and 'content'"),
        ('"hello"', "'messages' is no list of objects"),
        ('[{"role": "user"}]', "'messages' is no list of objects"),
        (
            '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]',
            "the last message is an answer already",
        ),
    ],
)
def test_conversations_that_cannot_be_answered(tmp_path, messages, message):
    file = tmp_path / "chats.jsonl"
    file.write_text(f'{{"messages": {messages}}}\n')
    with pytest.raises(ValueError, match=f"chats.jsonl:1.*{message}"):
        read_prompts(file)


def test_tokens_are_given_where_they_are_not_the_texts(experiment, states):
    generator = Generator(
        experiment.model,
        {"params": states[3].params},
        experiment.tokenizer,
        OPTIONS,
        max_length=MAX_LENGTH,
    )
    (given,) = generator.generate(["shown"], ids=[[0, *experiment.tokenizer.encode("fed")]])
    (plain,) = generator.generate(["fed"])
    assert given.tokens == plain.tokens and given.prompt == "shown"
    with pytest.raises(ValueError, match="prompt 1 has no token"):
        generator.generate(["x"], ids=[[]])
