import json
import logging

import numpy as np
import pytest
from data.hf_folders import byte_level

from paxlike.data.example_rows import ExampleRows, pack
from paxlike.data.hf_tokenizer import HuggingFaceTokenizer
from paxlike.data.instruct import Instruct
from paxlike.data.loader import Loader
from paxlike.data.mixtures import Mixture
from paxlike.data.sources import JsonLines
from paxlike.data.tokenizers import ByteTokenizer

BYTES = ByteTokenizer()
PAIRS = [
    {"prompt": "is it?", "completion": "yes"},
    {"prompt": "q", "completion": "a longer answer"},
    {"prompt": "one and two are", "completion": "three"},
    {"prompt": "", "completion": "x"},
]
TALK = {
    "messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "less"},
    ]
}


def lines(folder, records, name="sft.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return JsonLines(str(path))


def encoded(prompt, answer):
    """Ids and weights of a pair in the plain form, by hand."""
    before = [0, *BYTES.encode(prompt)]
    after = [*BYTES.encode(answer), 1]
    return before + after, [0] * (len(before) - 1) + [1] * len(after)


def examples(batch):
    """(inputs, targets, weights, positions) of every segment of a packed batch."""
    found = []
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segments"][row].max() + 1):
            here = batch["segments"][row] == segment
            found.append(tuple(batch[k][row][here].tolist() for k in KEYS))
    return found


KEYS = ("tokens", "targets", "weights", "positions")


def test_one_example_a_row_by_hand(tmp_path):
    loader = Loader(Instruct(lines(tmp_path, PAIRS), "plain"), 32, BYTES, packing="documents")
    loader.check()
    (batch,) = loader.epoch(global_batch=5)
    for row, pair in enumerate(PAIRS):
        ids, weights = encoded(pair["prompt"], " " + pair["completion"])
        n = len(weights)
        assert batch["tokens"][row].tolist() == ids[:-1] + [0] * (32 - n)
        assert batch["targets"][row].tolist() == ids[1:] + [0] * (32 - n)
        assert batch["weights"][row].tolist() == weights + [0] * (32 - n)
    assert batch["whole_answer"].tolist() == [1, 1, 1, 1, 0]
    assert "segments" not in batch


def test_packed_rows_hold_every_example_once_and_whole(tmp_path):
    loader = Loader(Instruct(lines(tmp_path, PAIRS), "plain"), 32, BYTES)
    assert loader.num_examples() == 2
    (batch,) = loader.epoch(global_batch=2)
    expected = []
    for pair in PAIRS:
        ids, weights = encoded(pair["prompt"], " " + pair["completion"])
        expected.append((ids[:-1], ids[1:], weights, list(range(len(weights)))))
    assert sorted(examples(batch)) == sorted(expected)
    padding = batch["segments"] == 0
    assert padding.any()
    for key in KEYS:
        assert (batch[key][padding] == 0).all()


def test_rows_are_a_function_of_data_and_seed(tmp_path):
    records = [{"prompt": "p" * (i % 7), "completion": f"a{i}"} for i in range(60)]
    source = lines(tmp_path, records)
    gather = lambda seed: Loader(Instruct(source, "plain", seed=seed), 40, BYTES)
    one, same, other = (next(gather(seed).epoch(global_batch=8)) for seed in (0, 0, 1))
    assert all((one[key] == same[key]).all() for key in one)
    assert (one["tokens"] != other["tokens"]).any()
    assert gather(0).fingerprint() == gather(0).fingerprint() != gather(1).fingerprint()
    elsewhere = Loader(Instruct(lines(tmp_path, records, "copy.jsonl"), "plain"), 40, BYTES)
    assert elsewhere.fingerprint() == gather(0).fingerprint()
    other = Loader(Instruct(source, "alpaca"), 40, BYTES)
    assert other.fingerprint() != gather(0).fingerprint()


def test_packing_fits_and_wastes_little():
    lengths = np.random.default_rng(0).integers(1, 60, 2000)
    groups = pack(lengths, 64)
    assert sorted(i for group in groups for i in group) == list(range(2000))
    assert max(lengths[group].sum() for group in groups) <= 64
    assert len(groups) <= 1.02 * lengths.sum() / 64
    assert pack(np.array([], int), 8) == []


def test_conversations_score_all_answers_or_the_last(tmp_path):
    source = lines(tmp_path, [TALK])
    scored = {}
    for answers in ("all", "last"):
        rows = Instruct(source, "llama2", answers=answers).rows(
            tokenizer=BYTES, seq_len=128, packing="documents"
        )
        batch = rows.gather(np.array([0]))
        scored[answers] = BYTES.decode(batch["targets"][batch["weights"] > 0])
        ends = batch["targets"][batch["weights"] > 0] == BYTES.eos_id
        assert ends.sum() == {"all": 2, "last": 1}[answers]
    assert scored == {"all": " ho  less ", "last": " less "}


def test_a_real_template_packed(tmp_path):
    tokenizer = HuggingFaceTokenizer(byte_level(tmp_path / "t"))
    source = lines(tmp_path, [TALK, {"messages": TALK["messages"][:2]}])
    (batch,) = Loader(Instruct(source, "chatml"), 128, tokenizer).epoch(global_batch=1)
    assert batch["segments"].max() == 2
    scored = batch["targets"][batch["weights"] > 0]
    assert tokenizer.decode(scored) == "holessho"
    assert (scored == tokenizer.eos_id).sum() == 3
    # No bos: the first input is the template's own first token.
    first = tokenizer.special_tokens()["<|im_start|>"]
    assert (batch["tokens"][0][batch["positions"][0] == 0][:2] == first).all()


@pytest.mark.parametrize(
    "record, options, expected",
    [
        ({"input": "a", "output": "b"}, {}, ["a", "b"]),
        ({"question": "a", "answer": "b", "x": 1}, {}, ["a", "b"]),
        ({"x": "a", "y": "b", "prompt": "c"}, {"prompt_key": "x", "answer_key": "y"}, ["a", "b"]),
        (
            {"instruction": "a", "context": "c", "response": "b"},
            {"prompt_format": "{instruction}\n{context}"},
            ["a\nc", "b"],
        ),
        (
            {"conversations": [{"from": "Human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {},
            ["a", "b"],
        ),
        ({"talk": {"role": ["user", "assistant"], "content": ["a", "b"]}}, {"messages_key": "talk"},
         ["a", "b"]),
        ({"system": "s", "conversations": TALK["messages"][:2]}, {}, ["s", "hi", "ho"]),
    ],
)  # fmt: skip
def test_forms_of_records(tmp_path, record, options, expected):
    found = Instruct(lines(tmp_path, []), "plain", **options).messages(record)
    assert [m["content"] for m in found] == expected
    roles = [m["role"] for m in found]
    assert roles == ["system", "user", "assistant"][-len(roles) :]


def one_row(tmp_path, overlong, seq_len, record, tokenizer=BYTES):
    source = lines(tmp_path, [record, {"prompt": "", "completion": ""}])
    rows = Instruct(source, "plain", overlong=overlong).rows(
        tokenizer=tokenizer, seq_len=seq_len, packing="documents"
    )
    return rows.gather(np.array([0]))


def test_what_is_too_long(tmp_path, caplog):
    record = {"prompt": "0123456789", "completion": "abc"}  # 15 targets: 10, space, 3, eos
    fits = one_row(tmp_path, "drop", 15, record)
    assert fits["weights"].sum() == 5 and not caplog.records
    dropped = one_row(tmp_path, "drop", 14, record)
    assert BYTES.decode(dropped["targets"][0]) == " "  # the next example
    (message,) = [r.getMessage() for r in caplog.records]
    assert message.startswith(
        f"{tmp_path}/sft.jsonl: 1 of 2 examples dropped and 0 shortened as too long"
    )
    assert message.endswith("(overlong='drop'): the longest has 15 tokens, a row has 14")
    assert caplog.records[0].levelno == logging.WARNING
    shortened = one_row(tmp_path, "truncate_prompt", 10, record)
    assert shortened["tokens"][0].tolist() == [0, *BYTES.encode("56789 abc")]
    assert shortened["weights"].sum() == 5
    assert "0 of 2 examples dropped and 1 shortened" in caplog.records[-1].getMessage()
    beginning = one_row(tmp_path, "truncate", 12, record)
    assert BYTES.decode(beginning["targets"][0]) == "0123456789 a"
    assert beginning["weights"].sum() == 2


@pytest.mark.parametrize("overlong", ["drop", "truncate_prompt", "truncate"])
def test_an_answer_longer_than_a_row_is_never_a_row_without_weight(tmp_path, overlong, caplog):
    record = {"prompt": "0123456789", "completion": "a" * 40}
    batch = one_row(tmp_path, overlong, 8, record)
    assert batch["weights"].sum() > 0
    assert "1 of 2 examples dropped" in caplog.records[-1].getMessage()
    rows = Instruct(lines(tmp_path, [record]), "plain", overlong=overlong)
    with pytest.raises(
        ValueError, match=r"all 1 examples of .* too long .*the longest has 52 tokens"
    ):
        rows.rows(tokenizer=BYTES, seq_len=8, packing="packed")


def test_a_prompt_without_bos_keeps_one_token_to_begin_with(tmp_path):
    tokenizer = HuggingFaceTokenizer(byte_level(tmp_path / "t"))
    record = {"prompt": "0 1 2 3 4 5 6 7", "completion": "yes"}
    answer = [*tokenizer.encode(" yes"), tokenizer.eos_id]
    batch = one_row(tmp_path, "truncate_prompt", len(answer), record, tokenizer)
    assert batch["targets"][0].tolist() == answer
    assert tokenizer.decode(batch["tokens"][0, :1]) == "7"


def test_several_sets_with_weights(tmp_path):
    sources = [
        Instruct(lines(tmp_path, [{"prompt": n, "completion": "yes"}], f"{n}.jsonl"), "plain")
        for n in ("a", "b")
    ]
    loader = Loader(Mixture(sources, [3, 1]), 16, BYTES)
    loader.check()
    with loader.batches(global_batch=8) as batches:
        first = next(batches)["targets"][:, 0]
    assert sorted(BYTES.decode([i]) for i in first) == ["a"] * 6 + ["b"] * 2


def test_an_empty_prompt_of_a_tokenizer_without_bos(tmp_path):
    tokenizer = HuggingFaceTokenizer(byte_level(tmp_path / "t"))
    (chat,) = Instruct(lines(tmp_path, [{"prompt": "", "completion": "yes"}]), "plain").chats(
        tokenizer
    )
    assert chat.ids[0] == tokenizer.bos_id and chat.is_answer[:2] == [False, True]


@pytest.mark.parametrize(
    "record, message",
    [
        ({"messages": [{"role": "user", "content": "a"}]}, "line 2: no message of the assistant"),
        ({"messages": []}, r"line 2: no message of the assistant.*roles: none"),
        ({"messages": "text"}, "line 2: messages must be a list, not str"),
        ({"messages": [{"role": "boss", "content": "a"}]}, "role 'boss' is none of system, user"),
        ({"messages": [{"role": "user"}]}, "line 2: a message must have text under 'role' and"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "line 2: a message must have text"),
        ({"text": "a"}, r"line 2: none of prompt, input.*has \['text'\]: set prompt_key"),
        ({"prompt": "a"}, r"line 2: none of completion, .*: set answer_key"),
        ({"prompt": "a", "completion": 3}, "line 2: 'completion' is no text but int"),
    ],
)
def test_bad_records_are_named(tmp_path, record, message):
    source = lines(tmp_path, [PAIRS[0], record])
    with pytest.raises(ValueError, match=message) as error:
        Loader(Instruct(source, "plain"), 32, BYTES).num_examples()
    assert "\n" not in str(error.value) and str(error.value).startswith(source.paths)


def test_a_template_that_refuses_names_the_record(tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    talks = [TALK, {"messages": [{"role": "system", "content": "s"}, *TALK["messages"]]}]
    loader = Loader(Instruct(lines(tmp_path, talks), str(template)), 64, BYTES)
    with pytest.raises(ValueError, match="line 2: chat template .* refuses it: no system role"):
        loader.num_examples()


def test_errors(tmp_path):
    source = lines(tmp_path, PAIRS)
    with pytest.raises(ValueError, match="set packing='packed' .* or 'documents' .*, not 'concat"):
        Loader(Instruct(source), 32, BYTES, packing="concatenated")
    with pytest.raises(ValueError, match="Instruct makes rows of text: pass a tokenizer"):
        Loader(Instruct(source), 32)
    with pytest.raises(ValueError, match="answers='first' is none of all, last"):
        Instruct(source, answers="first")
    with pytest.raises(
        ValueError, match="overlong='cut' is none of drop, truncate_prompt, truncate"
    ):
        Instruct(source, overlong="cut")
    with pytest.raises(ValueError, match="'lama' is none of tokenizer, chatml"):
        Instruct(source, "lama")
    with pytest.raises(ValueError, match="comes with no chat template"):
        Loader(Instruct(source), 32, BYTES).check()
    with pytest.raises(ValueError, match="no file matches"):
        Loader(Instruct(JsonLines(f"{tmp_path}/gone"), "plain"), 32, BYTES).check()
    with pytest.raises(ValueError, match="no record in .*e.jsonl"):
        Loader(Instruct(lines(tmp_path, [], "e.jsonl"), "plain"), 32, BYTES).num_examples()
    wrong = Instruct(source, "plain", prompt_format="{nothing}")
    with pytest.raises(
        ValueError, match="line 1: prompt_format names 'nothing', and the record has"
    ):
        Loader(wrong, 32, BYTES).num_examples()


def test_share_of_positions_that_are_used():
    made = ExampleRows([([1] * 5, [True] * 5)] * 3, seq_len=8, packing="packed", pad_id=0)
    assert (len(made), made.fill) == (2, 12 / 16)
