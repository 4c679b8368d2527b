"""BoolQ from a file to the metric, with an answer counted by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data.data_helpers import byte_fallback_model
from flax import linen as nn

from paxlike import parallel
from paxlike.data.boolq import BoolQ
from paxlike.data.builders.boolq import BoolQ as Builder
from paxlike.data.builders.prepare import prepare
from paxlike.data.loader import Loader
from paxlike.data.sources import JsonLines, TfdsSource
from paxlike.evaluate import Evaluator
from paxlike.models.decoder import Output
from paxlike.tasks.language import CausalLanguage

# (question, passage, label), and whether a model that says yes where it has read "green" is right.
RECORDS = [
    ("is grass green", "Grass grows.", 1),  # says yes: right
    ("is sand green", "Sand is yellow.", 0),  # says yes: wrong
    ("is it", "It is green.", 1),  # says yes: right
    ("is it", "It is red.", 0),  # says no: right
    ("is it", "It is not red.", 1),  # says no: wrong
    ("is the green cat a cat", "Yes.", 1),  # says yes: right
    ("is it wet", "No.", 0),  # says no: right
]


class Reader(nn.Module):
    """The logit of yes is 2 behind `word` and 0 before it; that of no is 1; another's is 9."""

    word: int
    yes: int
    no: int
    vocab_size: int

    @nn.compact
    def __call__(self, tokens, *, train=False, positions=None, segments=None):
        seen = jnp.cumsum(tokens == self.word, axis=1) > 0
        hidden = jnp.stack([seen, jnp.ones_like(seen)], axis=-1).astype(jnp.float32)
        table = jnp.zeros((self.vocab_size, 2)).at[self.yes, 0].set(2).at[self.no, 1].set(1)
        return Output(hidden, table.at[self.word, 1].set(9))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    sentences = ["yes no green", "question answer"]
    return byte_fallback_model(tmp_path_factory.mktemp("spm") / "m.model", sentences)


@pytest.mark.parametrize("form", ["tfds", "json_lines"])
def test_boolq_acc(tokenizer, tmp_path, form):
    records = [
        {"question": q, "passage": p, ("label" if form == "tfds" else "answer"): bool(label)}
        for q, p, label in RECORDS
    ]
    for name in ("train", "val", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    source = JsonLines(str(tmp_path / "val.jsonl"))
    if form == "tfds":
        prepare(Builder, data_dir=str(tmp_path), source=str(tmp_path))
        source = TfdsSource("super_glue/boolq", "validation", str(tmp_path))
    data = Loader(BoolQ(source), 160, tokenizer, packing="documents")
    data.check()
    no, yes = data.source.answer_ids(tokenizer)
    (green,) = tokenizer.encode("green")
    model = Reader(green, yes, no, tokenizer.vocab_size)
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[:4]).reshape(2, 2, 1),
        ("data", "fsdp", "tensor"),
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
    )
    with parallel.activate(mesh):
        evaluator = Evaluator("BoolQ", data, CausalLanguage(), model, global_batch=4, mesh=mesh)
        metrics = evaluator.run({})
    assert (metrics["boolq_acc"].sum, metrics["boolq_acc"].weight) == (5, 7)
    assert (metrics["acc_strict"].sum, metrics["acc_strict"].weight) == (0, 7)
    assert metrics["loss"].weight == 7, "one scored token for each question"
