"""What the tests of the data room share: tiny texts, and rows made the slow and obvious way."""

import json

import numpy as np
import sentencepiece

from paxlike.data.tokenizers import SentencePieceTokenizer

TEXTS = [
    "alpha beta",
    "x",
    "",
    "gamma\n  delta é漢🙂",
    "one two three four five six seven",
    "zz " * 30,
]


def byte_fallback_model(path, sentences):
    """A SentencePiece model like LLaMA's: bos 1, eos 2, a word boundary before every text."""
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences * 30),
            model_writer=file,
            vocab_size=300,
            model_type="bpe",
            byte_fallback=True,
            minloglevel=2,
        )
    return SentencePieceTokenizer(str(path))


def write_json_lines(path, texts, key="text"):
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return str(path)


def naive_rows(texts, tokenizer, seq_len, packing, bos_id=0, pad_id=0):
    """Rows, token by token, in pure Python."""
    stream = []  # (id, id before it or bos, document number, position)
    for number, text in enumerate(t for t in texts if t):
        ids = [*tokenizer.encode(text), tokenizer.eos_id]
        for position, token in enumerate(ids):
            stream.append((token, ids[position - 1] if position else bos_id, number, position))
    if packing == "documents":
        numbers = sorted({entry[2] for entry in stream})
        groups = [[e for e in stream if e[2] == n][:seq_len] for n in numbers]
    else:
        groups = [stream[i : i + seq_len] for i in range(0, len(stream), seq_len)]
    rows = []
    for group in groups:
        pad = [pad_id] * (seq_len - len(group))
        row = {
            "tokens": [e[1] for e in group] + pad,
            "targets": [e[0] for e in group] + pad,
            "weights": [1.0] * len(group) + [0.0] * len(pad),
        }
        if packing == "packed":
            firsts = {}
            for j, entry in enumerate(group):
                firsts.setdefault(entry[2], j)
            order = list(firsts)
            row["segments"] = [order.index(e[2]) + 1 for e in group] + [0] * len(pad)
            row["positions"] = [j - firsts[e[2]] for j, e in enumerate(group)] + [0] * len(pad)
        rows.append(row)
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}
