"""Streaming text: whole characters, stop strings across tokens, the same result for every size of chunk."""

import random

import pytest

from paxlike.data.tokenizers import ByteTokenizer, train_sentencepiece
from paxlike.decode.text import TextStream

BYTES = ByteTokenizer()


def stream_in_chunks(text_stream, tokens, size):
    pieces = []
    for first in range(0, len(tokens), size):
        pieces.append(text_stream.push(tokens[first : first + size]))
    return [*pieces, text_stream.finish()]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_pieces_are_whole_characters_and_add_up(size):
    text = "naïve → 東京 🎉 done"
    pieces = stream_in_chunks(TextStream(BYTES), BYTES.encode(text), size)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_is_shown_as_soon_as_it_is_whole():
    stream = TextStream(BYTES)
    shown = [stream.push([token]) for token in BYTES.encode("é🎉")]
    assert shown == ["", "é", "", "", "", "🎉"]


def test_bytes_that_never_become_a_character_are_shown_in_the_end():
    stream = TextStream(BYTES)
    assert stream.push(BYTES.encode("a🎉")[:-1]) == "a"
    assert stream.finish() == "\ufffd" == stream.text[1:]


def test_bytes_that_turn_out_wrong_are_shown_when_that_is_known():
    stream = TextStream(BYTES)
    assert stream.push([0xE6 + 2]) == ""
    assert stream.push(BYTES.encode("b")) == "\ufffdb"


@pytest.mark.parametrize("size", [1, 2, 5, 50])
def test_text_and_tokens_end_at_a_stop_string_whatever_the_chunk(size):
    tokens = BYTES.encode("one two END three END")
    stream = TextStream(BYTES, stop_strings=("END", "three"))
    pieces = stream_in_chunks(stream, tokens, size)
    assert "".join(pieces) == stream.text == "one two "
    assert stream.is_stopped
    assert stream.tokens == tokens[: len("one two END")]


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_clear():
    stream = TextStream(BYTES, stop_strings=("abcd", "\n\n"))
    assert [stream.push(BYTES.encode(c)) for c in "xabcabe\nf"] == [
        "x",
        "",
        "",
        "",
        "abc",
        "",
        "abe",
        "",
        "\nf",
    ]
    assert not stream.is_stopped


def test_of_two_stop_strings_the_first_to_be_complete_counts():
    for size in (1, 6):
        stream = TextStream(BYTES, stop_strings=("abcd", "bc"))
        stream_in_chunks(stream, BYTES.encode("xabcde"), size)
        assert (stream.text, stream.tokens) == ("xa", BYTES.encode("xabc"))


def test_what_comes_after_a_stop_string_changes_nothing():
    stream = TextStream(BYTES, stop_strings=("b",))
    stream.push(BYTES.encode("ab"))
    assert stream.push(BYTES.encode("c")) == ""
    assert stream.text == "a"


@pytest.fixture(scope="module")
def sentencepiece_tokenizer(tmp_path_factory):
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "while",
        "rain",
        "fell",
        "over",
        "tokyo",
        "and",
        "nobody",
        "said",
        "anything",
        "about",
        "it",
    ]
    rng = random.Random(0)
    texts = [" ".join(rng.choices(words, k=12)) + ".\n" for _ in range(300)]
    path = tmp_path_factory.mktemp("spm") / "tiny.model"
    return train_sentencepiece(texts, output=str(path), vocab_size=350, num_threads=1)


@pytest.mark.parametrize("size", [1, 3])
def test_sentencepiece_with_byte_fallback(sentencepiece_tokenizer, size):
    prompt, text = "the cat", " sat → 東京 on the mat."
    tokens = sentencepiece_tokenizer.encode(text)
    assert len(tokens) > len(text.split())  # the foreign characters are bytes
    stream = TextStream(sentencepiece_tokenizer, sentencepiece_tokenizer.encode(prompt), ("mat",))
    pieces = stream_in_chunks(stream, tokens, size)
    assert "".join(pieces) == stream.text == " sat → 東京 on the "
    assert stream.is_stopped
    assert not any("\ufffd" in piece for piece in pieces)


def test_the_space_before_the_first_piece_is_kept(tmp_path):
    """A tokenizer with a dummy prefix (C4, LLaMA) drops the space of the first piece that it decodes."""
    import sentencepiece

    from paxlike.data.tokenizers import SentencePieceTokenizer

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "a cat and a mat"] * 50),
        model_prefix=str(tmp_path / "prefix"),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = SentencePieceTokenizer(str(tmp_path / "prefix.model"))
    tokens = tokenizer.encode("sat on")
    assert tokenizer.decode(tokens) == "sat on"
    stream = TextStream(tokenizer, tokenizer.encode("the cat"))
    assert "".join(stream_in_chunks(stream, tokens, 1)) == " sat on"
