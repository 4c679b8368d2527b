import pickle

import numpy as np
import pytest
import sentencepiece

from paxlike.data import train_tokenizer
from paxlike.data.tokenizers import (
    ByteTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    check_vocabulary,
    train_sentencepiece,
)

HARD = [
    "  two  spaces ",
    "\ttab\n\n  indented\r\n",
    "é 漢字 🙂 \x00",
    "",
    "def f(x):\n    return x + 12345\n",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A real BPE model of 400 ids."""
    texts = [f"the cat number {i} sat on the mat\n    and then returned {i}\n" for i in range(300)]
    path = tmp_path_factory.mktemp("spm") / "tiny.model"
    return train_sentencepiece(texts, output=str(path), vocab_size=330)


def test_sentencepiece_ids_are_pax_s(model):
    assert (model.pad_id, model.eos_id, model.bos_id, model.vocab_size) == (0, 1, 0, 330)
    assert isinstance(model, Tokenizer)
    assert isinstance(ByteTokenizer(), Tokenizer)


@pytest.mark.parametrize("text", HARD)
def test_text_comes_back_and_bytes_add_up(model, text):
    for tokenizer in (model, ByteTokenizer()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.bytes_per_token()[ids].sum() == len(text.encode())


def test_batches_equal_single_texts(model):
    for tokenizer in (model, ByteTokenizer()):
        assert tokenizer.encode_batch(HARD, num_threads=2) == [tokenizer.encode(t) for t in HARD]


def test_training_makes_pieces_of_several_bytes(model):
    assert model.bytes_per_token().max() > 3
    assert len(model.encode("the cat sat on the mat")) < len("the cat sat on the mat") / 2


def test_special_ids_have_no_bytes_and_no_text(model):
    counts = model.bytes_per_token()
    assert counts[[0, 1, 2]].tolist() == [0, 0, 0]
    assert counts.shape == (model.vocab_size,)
    ids = model.encode("cat")
    assert model.decode([0, *ids, 1, model.vocab_size + 7]) == "cat"
    assert ByteTokenizer().decode([0, 99, 1, 100, 5000]) == "ab"


def test_ids_can_be_overridden_and_values_pickle(model):
    other = SentencePieceTokenizer(model.path, bos_id=7, eos_id=9)
    assert (other.bos_id, other.eos_id) == (7, 9)
    assert pickle.loads(pickle.dumps(other)) == other != model
    assert other.digest() == model.digest()


def test_the_file_is_read_at_first_use_only(tmp_path):
    tokenizer = SentencePieceTokenizer(str(tmp_path / "later.model"))
    repr(tokenizer)
    with pytest.raises(ValueError, match=r"no SentencePiece model at .*later\.model.*VOCAB_PATH"):
        tokenizer.encode("a")
    train_sentencepiece(["some text here"] * 9, output=tokenizer.path, vocab_size=270)
    assert tokenizer.decode(tokenizer.encode("a")) == "a"


def test_a_replaced_file_is_read_again(tmp_path):
    path = str(tmp_path / "m.model")
    first = train_sentencepiece(["aa bb cc dd ee"] * 9, output=path, vocab_size=265).digest()
    again = train_sentencepiece(["xx yy zz " * 20] * 9, output=path, vocab_size=268)
    assert again.vocab_size == 268
    assert again.digest() != first


def test_invalid_file(tmp_path):
    path = tmp_path / "bad.model"
    path.write_text("hello")
    with pytest.raises(ValueError, match="is not a SentencePiece model") as error:
        _ = SentencePieceTokenizer(str(path)).vocab_size
    assert "\n" not in str(error.value)


def test_model_without_end_of_document(tmp_path):
    path = tmp_path / "no_eos.model"
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["abcd efgh ijkl abcd efgh ijkl"] * 9),
            model_writer=file,
            vocab_size=275,
            model_type="bpe",
            byte_fallback=True,
            eos_id=-1,
            minloglevel=2,
        )
    with pytest.raises(ValueError, match="no end-of-document id: pass eos_id"):
        _ = SentencePieceTokenizer(str(path)).eos_id
    assert SentencePieceTokenizer(str(path), eos_id=1).eos_id == 1
    assert SentencePieceTokenizer(str(path)).bos_id == 1  # the trainer's default, from the model


@pytest.mark.parametrize(
    "texts, vocab_size, message",
    [
        (["one short text"], 30_000, "vocab_size=30000 is too large for this text: take at most"),
        (["one short text"] * 9, 100, "vocab_size=100 is too small"),
        ([], 300, "no text to train"),
    ],
)
def test_training_that_cannot_be(tmp_path, texts, vocab_size, message):
    with pytest.raises(ValueError, match=message) as error:
        train_sentencepiece(texts, output=str(tmp_path / "m.model"), vocab_size=vocab_size)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_check_vocabulary(model):
    check_vocabulary(model, 330)
    with pytest.raises(ValueError, match=r"ids up to 329 but the model has a vocabulary of 329"):
        check_vocabulary(model, 329)
    with pytest.raises(ValueError, match=r"ids up to 999 .* set VOCAB_SIZE to at least 1000"):
        check_vocabulary(SentencePieceTokenizer(model.path, eos_id=999), 512)
    with pytest.raises(ValueError, match=r"negative special ids: \{'eos_id': -5\}"):
        check_vocabulary(SentencePieceTokenizer(model.path, eos_id=-5), 512)


def test_command(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("the quick brown fox " * 50)
    output = tmp_path / "out" / "t.model"
    train_tokenizer.main(
        ["--input", str(tmp_path / "*.txt"), "--vocab_size", "275", "--output", str(output)]
    )
    assert "275 ids" in capsys.readouterr().out
    assert np.all(SentencePieceTokenizer(str(output)).bytes_per_token()[3:] > 0)
    with pytest.raises(SystemExit, match="error: no file matches"):
        train_tokenizer.main(["--input", "/none/*.txt", "--vocab_size", "9", "--output", "x"])
    with pytest.raises(SystemExit, match="error: pass either --input FILES or --tfds NAME"):
        train_tokenizer.main(["--vocab_size", "9", "--output", "x"])
