import json

import numpy as np
import pytest
from data.data_helpers import byte_fallback_model
from data.hf_folders import byte_level, word_boundary

from paxlike.data.boolq import BoolQ, boolq_prompt
from paxlike.data.builders.boolq import BoolQ as Builder
from paxlike.data.builders.prepare import prepare
from paxlike.data.hf_tokenizer import HuggingFaceTokenizer
from paxlike.data.lambada import Lambada
from paxlike.data.loader import Loader
from paxlike.data.mixtures import Mixture
from paxlike.data.sources import JsonLines, TfdsSource
from paxlike.data.tokenizers import ByteTokenizer

RECORDS = [
    {"question": "is grass green", "passage": "Grass is green.", "answer": True},
    {"question": "is it wet", "passage": "Sand is dry.\nVery.", "answer": False},
    {"question": "is it", "passage": "p" * 300, "answer": True},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    sentences = ["yes no", "question is grass green answer"]
    return byte_fallback_model(tmp_path_factory.mktemp("spm") / "m.model", sentences)


def lines(folder, records=RECORDS, name="val.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return JsonLines(str(path))


def test_prompt():
    assert boolq_prompt(RECORDS[1]) == "Sand is dry.\nVery.\nquestion: is it wet?\nanswer:"
    # Pax adds the mark whatever the question ends in.
    assert boolq_prompt({"passage": "", "question": "is it?"}) == "\nquestion: is it??\nanswer:"


def test_rows_by_hand(tokenizer, tmp_path):
    source = BoolQ(lines(tmp_path))
    loader = Loader(source, 160, tokenizer, packing="documents")
    loader.check()
    (batch,) = loader.epoch(global_batch=4)
    no, yes = source.answer_ids(tokenizer)
    assert [tokenizer.token(i) for i in (no, yes)] == ["▁no", "▁yes"]
    for row, (right, wrong) in enumerate([(yes, no), (no, yes)]):
        prompt = tokenizer.encode(boolq_prompt(RECORDS[row]))
        n = len(prompt)
        assert batch["tokens"][row, : n + 1].tolist() == [1, *prompt]
        assert batch["targets"][row, : n + 1].tolist() == [*prompt, right]
        assert (batch["tokens"][row, n + 1 :] == 0).all() and (
            batch["targets"][row, n + 1 :] == 0
        ).all()
        assert np.flatnonzero(batch["weights"][row]).tolist() == [n]
        assert batch["alternatives"][row, n] == wrong
        assert (np.delete(batch["alternatives"][row], n) == -1).all()
    # A long prompt keeps its last 160 - 64 ids behind bos.
    long = tokenizer.encode(boolq_prompt(RECORDS[2]))[-96:]
    assert batch["tokens"][2, :97].tolist() == [1, *long]
    assert np.flatnonzero(batch["weights"][2]).tolist() == [96]
    assert batch["example_weight"].tolist() == [1, 1, 1, 0]
    assert batch["whole_answer"].tolist() == [1, 1, 1, 0]
    assert (batch["alternatives"][3] == -1).all(), "the row that fills the batch asks nothing"
    assert tokenizer.eos_id not in batch["targets"]
    assert batch["num_bytes"].tolist() == [4, 3, 4, 0]


def test_tfds_and_json_lines_give_the_same_rows(tokenizer, tmp_path):
    raw = [{k: v for k, v in r.items() if k != "answer"} | {"label": r["answer"]} for r in RECORDS]
    for name in ("train", "val", "test"):
        lines(tmp_path, raw[:1] if name == "train" else raw, f"{name}.jsonl")
    prepare(Builder, data_dir=str(tmp_path / "tfds"), source=str(tmp_path))
    tfds = TfdsSource("super_glue/boolq", "validation", str(tmp_path / "tfds"))
    make = lambda source: Loader(BoolQ(source), 128, tokenizer, packing="documents")
    (ours,) = make(lines(tmp_path, RECORDS, "disk.jsonl")).epoch(global_batch=3)
    (theirs,) = make(tfds).epoch(global_batch=3)
    order = lambda batch: sorted(map(tuple, batch["targets"].tolist()))  # TFDS shuffles once
    assert order(ours) == order(theirs)
    assert make(tfds).fingerprint() != make(lines(tmp_path, raw)).fingerprint()


def test_training_rows_have_the_usual_arrays_only(tokenizer, tmp_path):
    loader = Loader(BoolQ(lines(tmp_path)), 128, tokenizer, packing="documents")
    with loader.batches(global_batch=2) as batches:
        assert set(next(batches)) == {"tokens", "targets", "weights"}
    assert set(loader.spec(2)) == {"tokens", "targets", "weights"}
    assert loader.spec(2, evaluation=True)["alternatives"].shape == (2, 128)


def test_without_bos_the_prompt_is_fed_alone(tmp_path):
    tokenizer = HuggingFaceTokenizer(byte_level(tmp_path / "qwen"))
    words = BoolQ(lines(tmp_path), yes=" yes", no=" no")
    (batch,) = Loader(words, 160, tokenizer, packing="documents").epoch(global_batch=3)
    prompt = tokenizer.encode(boolq_prompt(RECORDS[0]))
    n = len(prompt)
    assert batch["tokens"][0, :n].tolist() == prompt
    assert batch["targets"][0, n - 1] == tokenizer.encode(" yes")[0]
    assert np.flatnonzero(batch["weights"][0]).tolist() == [n - 1]


def test_llama_s_answers_begin_with_a_word_boundary(tmp_path):
    tokenizer = HuggingFaceTokenizer(word_boundary(tmp_path))
    no, yes = BoolQ(lines(tmp_path)).answer_ids(tokenizer)
    assert (tokenizer.token(no), tokenizer.token(yes)) == ("▁no", "▁yes")


def test_beside_another_set(tokenizer, tmp_path):
    """Rows of a set without alternatives have none."""
    passages = lines(tmp_path, [{"text": "he fed the cat"}], "l.jsonl")
    mixture = Mixture([Lambada(passages), BoolQ(lines(tmp_path))], [1, 1])
    (batch,) = Loader(mixture, 128, tokenizer, packing="documents").epoch(global_batch=4)
    assert (batch["alternatives"] >= 0).sum(axis=1).tolist() == [0, 1, 1, 1]
    assert batch["whole_answer"].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "record, message",
    [
        (
            {"passage": "p", "answer": True},
            r"line 2: no text under 'question'; the record has \['answer'",
        ),
        ({"question": "q", "passage": 3, "answer": True}, "line 2: no text under 'passage'"),
        ({"question": "q", "passage": "p"}, r"line 2: the answer must be true or false .* is none"),
        (
            {"question": "q", "passage": "p", "label": -1},
            "and is -1; the test split has no answers",
        ),
        ({"question": "q", "passage": "p", "answer": "yes"}, "and is 'yes'"),
    ],
)
def test_bad_records(tokenizer, tmp_path, record, message):
    loader = Loader(
        BoolQ(lines(tmp_path, [RECORDS[0], record])), 96, tokenizer, packing="documents"
    )
    with pytest.raises(ValueError, match=message) as error:
        loader.num_examples()
    assert "\n" not in str(error.value)


def test_errors(tokenizer, tmp_path):
    source = lines(tmp_path)
    with pytest.raises(ValueError, match="set packing='documents', not 'packed'"):
        Loader(BoolQ(source), 128, tokenizer)
    with pytest.raises(ValueError, match="seq_len=64 must be at least 65"):
        Loader(BoolQ(source), 64, tokenizer, packing="documents")
    with pytest.raises(ValueError, match="BoolQ makes rows of text: pass a tokenizer"):
        Loader(BoolQ(source), 128, packing="documents")
    with pytest.raises(ValueError, match=r"the tokenizer makes 2 of 'no' \(\[112, 113\]\)"):
        Loader(BoolQ(source), 128, ByteTokenizer(), packing="documents").check()
    with pytest.raises(ValueError, match="'no' and 'no' are both id"):
        Loader(BoolQ(source, yes="no"), 128, tokenizer, packing="documents").check()
    with pytest.raises(ValueError, match="no file matches"):
        gone = BoolQ(JsonLines(f"{tmp_path}/gone.jsonl"))
        Loader(gone, 128, tokenizer, packing="documents").check()
    with pytest.raises(ValueError, match="no question in .*e.jsonl"):
        empty = BoolQ(lines(tmp_path, [], "e.jsonl"))
        Loader(empty, 128, tokenizer, packing="documents").num_examples()
