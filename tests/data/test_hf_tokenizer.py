import json
import pickle

import numpy as np
import pytest
from data.hf_folders import CHATML, byte_level, word_boundary

from paxlike.data.hf_tokenizer import HuggingFaceTokenizer
from paxlike.data.loader import Loader
from paxlike.data.open_tokenizer import open_tokenizer
from paxlike.data.sources import JsonLines
from paxlike.data.tokenizers import (
    SentencePieceTokenizer,
    Tokenizer,
    check_vocabulary,
    train_sentencepiece,
)

HARD = [
    "  two  spaces ",
    "\ttab\n\n  in\r\n",
    "é 漢字 🙂 \x00",
    "",
    "def f(x):\n    return 12345\n",
]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """No bos; ends with <|im_end|>."""
    return byte_level(tmp_path_factory.mktemp("qwen"), pad_token="<|endoftext|>")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return word_boundary(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("text", HARD)
def test_text_comes_back_and_bytes_add_up(qwen, text):
    tokenizer = HuggingFaceTokenizer(qwen)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.bytes_per_token()[ids].sum() == len(text.encode())
    assert tokenizer.encode_batch([text, "a"]) == [ids, tokenizer.encode("a")]


def test_word_boundary_pieces_and_byte_pieces(llama):
    tokenizer = HuggingFaceTokenizer(llama)
    for text in ("the cat", "cat é 漢\n"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        # The model puts one space before every text.
        assert tokenizer.bytes_per_token()[ids].sum() == len(text.encode()) + 1
    assert tokenizer.bytes_per_token()[:3].tolist() == [0, 0, 0]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.begin_ids) == (1, 2, [1])


@pytest.mark.parametrize("folder", ["qwen", "llama"])
def test_same_ids_as_transformers(folder, request):
    transformers = pytest.importorskip("transformers")
    path = request.getfixturevalue(folder)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    ours = HuggingFaceTokenizer(path)
    for text in [*HARD, "the cat sat", "is it?\n\nyes"]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text))
    assert ours.vocab_size == len(theirs)
    assert (ours.eos_id, ours.stop_ids) == (theirs.eos_token_id, (theirs.eos_token_id,))


def test_a_tokenizer_without_beginning_feeds_none(qwen):
    tokenizer = HuggingFaceTokenizer(qwen)
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.begin_ids == []
    assert tokenizer.bos_id == tokenizer.eos_id == tokenizer.special_tokens()["<|im_end|>"]
    assert tokenizer.pad_id == tokenizer.special_tokens()["<|endoftext|>"]
    assert tokenizer.token(tokenizer.eos_id) == "<|im_end|>"


def test_names_of_special_tokens_in_a_text_are_text(qwen):
    tokenizer = HuggingFaceTokenizer(qwen)
    ids = tokenizer.encode("a<|im_end|>b")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == "a<|im_end|>b"
    (named,) = tokenizer.encode_template(["a<|im_end|>b"])
    assert named == [*tokenizer.encode("a"), tokenizer.eos_id, *tokenizer.encode("b")]
    assert tokenizer.decode([*named, 10**6]) == "ab"


def test_values_pickle_and_read_at_first_use_only(qwen, tmp_path):
    tokenizer = HuggingFaceTokenizer(qwen, eos_id=7)
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again == tokenizer != HuggingFaceTokenizer(qwen)
    assert (again.eos_id, again.digest()) == (7, HuggingFaceTokenizer(qwen).digest())
    later = HuggingFaceTokenizer(str(tmp_path / "later"))
    repr(later)
    with pytest.raises(ValueError, match=r"no Hugging Face tokenizer at '.*later/tokenizer.json'"):
        later.encode("a")
    byte_level(tmp_path / "later")
    assert later.decode(later.encode("a")) == "a"


def test_a_file_saved_with_truncation_does_not_cut(qwen, tmp_path):
    with open(f"{qwen}/tokenizer.json") as file:
        parts = json.load(file)
    parts["truncation"] = {
        "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    ours = HuggingFaceTokenizer(str(tmp_path), eos_id=0)
    assert len(ours.encode("the cat sat on the mat")) > 2


def test_special_ids_come_from_the_first_file_that_says(tmp_path):
    folder = byte_level(tmp_path, CHATML, bos=None, eos="<|im_end|>")
    ids = HuggingFaceTokenizer(folder).special_tokens()
    stops = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    config = {"bos_token_id": 3, "eos_token_id": stops[1]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    tokenizer = HuggingFaceTokenizer(folder)
    assert tokenizer.begin_ids == [], "tokenizer_config.json says there is none"
    assert tokenizer.stop_ids == tuple(stops)
    # Without tokenizer_config.json the numbers of the model count.
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = HuggingFaceTokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.begin_ids) == (3, stops[0], [3])
    mapping = {"bos_token": {"content": "<|endoftext|>"}, "eos_token": "<|endoftext|>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(mapping))
    assert HuggingFaceTokenizer(folder).bos_id == ids["<|endoftext|>"]


def test_template_beside_the_tokenizer(tmp_path):
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    folder = byte_level(tmp_path, chat_template=named)
    assert HuggingFaceTokenizer(folder).chat_template == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert HuggingFaceTokenizer(folder).chat_template == "J"


def test_open_tokenizer_chooses_by_kind_and_reads_nothing(qwen, llama, tmp_path):
    spm = tmp_path / "tokenizer.model"
    train_sentencepiece(["the cat sat on the mat"] * 9, output=str(spm), vocab_size=270)
    assert open_tokenizer(str(spm)) == SentencePieceTokenizer(str(spm))
    assert open_tokenizer(str(tmp_path)) == SentencePieceTokenizer(str(spm))
    assert open_tokenizer(qwen, None, 5) == HuggingFaceTokenizer(qwen, None, 5)
    file = f"{qwen}/tokenizer.json"
    assert open_tokenizer(file).encode("a cat") == open_tokenizer(qwen).encode("a cat")
    assert isinstance(open_tokenizer("/nowhere/x.model"), SentencePieceTokenizer)
    assert isinstance(open_tokenizer("/nowhere/tokenizer.json"), HuggingFaceTokenizer)
    with pytest.raises(ValueError, match="there is no tokenizer: set VOCAB_PATH"):
        _ = open_tokenizer("").vocab_size


def test_ids_that_contradict_the_tokenizer_are_refused(qwen, llama, tmp_path):
    check_vocabulary(open_tokenizer(llama, 1, 2), 512)
    check_vocabulary(open_tokenizer(qwen, bos_id=3), 512)  # it has none of its own
    with pytest.raises(
        ValueError, match=r"BOS_ID=0, but the tokenizer '.*' has 1: leave BOS_ID out"
    ):
        check_vocabulary(open_tokenizer(llama, bos_id=0), 512)
    with pytest.raises(
        ValueError, match=r"EOS_ID=1, but the tokenizer '.*' has 2: leave EOS_ID out"
    ):
        check_vocabulary(open_tokenizer(llama, eos_id=1), 512)
    spm = str(tmp_path / "s.model")
    train_sentencepiece(["the cat sat on the mat"] * 9, output=spm, vocab_size=270)
    check_vocabulary(open_tokenizer(spm, bos_id=0, eos_id=1), 512)  # it has no bos
    with pytest.raises(ValueError, match=r"EOS_ID=2, but the tokenizer '.*s.model' has 1"):
        check_vocabulary(open_tokenizer(spm, eos_id=2), 512)


def test_bad_files(qwen, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a Hugging Face tokenizer") as error:
        _ = HuggingFaceTokenizer(str(tmp_path)).vocab_size
    assert "\n" not in str(error.value)
    with open(f"{qwen}/tokenizer.json") as file:
        (tmp_path / "tokenizer.json").write_text(file.read())
    with pytest.raises(ValueError, match=r"names the end-of-text token: pass eos_id \(EOS_ID\)"):
        _ = HuggingFaceTokenizer(str(tmp_path)).eos_id
    (tmp_path / "tokenizer_config.json").write_text("no")
    with pytest.raises(ValueError, match="tokenizer_config.json beside the tokenizer is not JSON"):
        _ = HuggingFaceTokenizer(str(tmp_path)).eos_id


def test_loader_makes_rows_of_it(qwen, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("the cat", "the mat sat")))
    tokenizer = HuggingFaceTokenizer(qwen)
    loader = Loader(JsonLines(str(path)), 64, tokenizer, cache_dir=str(tmp_path / "cache"))
    (batch,) = loader.epoch(global_batch=1)
    ids = [[*tokenizer.encode(t), tokenizer.eos_id] for t in ("the cat", "the mat sat")]
    n = sum(map(len, ids))
    assert batch["targets"][0, :n].tolist() == [i for one in ids for i in one]
    # A document begins with what stood before it: the end of another.
    np.testing.assert_array_equal(batch["tokens"][0, [0, len(ids[0])]], tokenizer.eos_id)
    assert batch["num_bytes"].tolist() == [len("the cat") + len("the mat sat")]
