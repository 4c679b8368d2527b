import json

import numpy as np
import pytest

from paxlike.data.lambada import Lambada, split_passage
from paxlike.data.loader import Loader
from paxlike.data.sources import JsonLines
from paxlike.data.tokenizers import ByteTokenizer, train_sentencepiece

TOKENIZER = ByteTokenizer()


@pytest.fixture
def passages(tmp_path):
    texts = [
        "He fed \u201cTom\u201d the cat",
        "Tom\u2019s dog saw a dog\n",
        "word",
        "x" * 90 + " end",
        " ",
    ]
    path = tmp_path / "lambada_test.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return JsonLines(str(path))


@pytest.mark.parametrize(
    "passage, context, target",
    [
        ("\u201cNo,\u201d said Tom to Sam", '"No," said Tom to', " Sam"),
        ("it\u2019s \u2018his\u2019", "it's", " 'his'"),
        ("the cat saw the cat", "the cat saw the", " cat"),
        ("a cat, a catcat  cat \n", "a cat, a catcat", " cat"),
        ("a\ttab\nlast", "a\ttab", " last"),
        ("alone", "", " alone"),
        ("on and on", "on and", " on"),
    ],
)
def test_split(passage, context, target):
    assert split_passage(passage) == (context, target)


def test_rows_by_hand(passages):
    loader = Loader(Lambada(passages), 96, TOKENIZER, packing="documents")
    assert loader.num_examples() == 4  # the blank line is no passage
    (batch,) = loader.epoch(global_batch=4)
    ids = lambda text: TOKENIZER.encode(text)
    context, target = ids('He fed "Tom" the'), ids(" cat")
    n = len(context) + len(target)
    assert batch["targets"][0, :n].tolist() == context + target
    assert batch["tokens"][0, :n].tolist() == [0, *(context + target)[:-1]]
    assert batch["weights"][0].tolist() == [0.0] * len(context) + [1.0] * 4 + [0.0] * (96 - n)
    assert (batch["tokens"][0, n:] == 0).all()
    assert 1 not in batch["targets"]  # no end of document anywhere
    assert batch["num_bytes"].tolist() == [4, 4, 5, 4]
    # A lone word: the input to its first id is bos.
    assert batch["tokens"][2, :5].tolist() == [0, *ids(" wor")]
    # A long context keeps its end: 96 - 64 = 32 ids.
    assert batch["targets"][3, :36].tolist() == ids("x" * 32 + " end")
    usual = {"tokens", "targets", "weights", "example_weight", "num_bytes"}
    assert set(batch) == usual | {"whole_answer"}
    assert batch["whole_answer"].tolist() == [1, 1, 1, 1]
    assert set(next(loader.batches(global_batch=2))) == {"tokens", "targets", "weights"}


def test_target_of_more_than_64_ids_is_cut(tmp_path):
    path = tmp_path / "l.jsonl"
    path.write_text(json.dumps({"text": "a " + "b" * 100}))
    loader = Loader(Lambada(JsonLines(str(path))), 80, TOKENIZER, packing="documents")
    (batch,) = loader.epoch(global_batch=1)
    assert batch["weights"].sum() == 64


def test_target_begins_with_a_word_boundary(passages, tmp_path):
    """Context and target are tokenised apart: the target is a space and the word."""
    texts = ["the cat fed the dog and the end " * 20]
    model = train_sentencepiece(texts, output=str(tmp_path / "m.model"), vocab_size=275)
    (batch,) = Loader(Lambada(passages), 96, model, packing="documents").epoch(global_batch=4)
    scored = batch["targets"][0][batch["weights"][0] > 0]
    np.testing.assert_array_equal(scored, model.encode(" cat"))
    assert model.decode(scored) == " cat"


def test_errors(passages, tmp_path):
    with pytest.raises(ValueError, match="set packing='documents', not 'packed'"):
        Loader(Lambada(passages), 128, TOKENIZER)
    with pytest.raises(ValueError, match="seq_len=64 must be at least 65"):
        Loader(Lambada(passages), 64, TOKENIZER, packing="documents")
    with pytest.raises(ValueError, match="Lambada makes rows of text: pass a tokenizer"):
        Loader(Lambada(passages), 128, packing="documents")
    (tmp_path / "e.jsonl").write_text("")
    empty = Loader(Lambada(JsonLines(f"{tmp_path}/e.jsonl")), 96, TOKENIZER, packing="documents")
    with pytest.raises(ValueError, match="no passage in JsonLines"):
        empty.num_examples()
