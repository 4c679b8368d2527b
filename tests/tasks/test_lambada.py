"""LAMBADA with a GLaM: from a file and a config to the metrics, beside each passage alone."""

import json

import fiddle as fdl
import jax
import jax.numpy as jnp
import numpy as np
from data.data_helpers import byte_fallback_model

from configs import glam
from paxlike import parallel
from paxlike.data.lambada import split_passage
from paxlike.evaluate import make_evaluators
from paxlike.train.state import abstract_variables

PASSAGES = [
    "the cat saw the cat cat",  # the model mostly says its input again: right
    "the cat saw the dog",
    "\u201cdog\u201d said the dog dog",
    "a",
    "the dog saw cats",
]


def test_a_glam_over_devices_says_of_all_passages_what_it_says_of_each_alone(tmp_path):
    text = tmp_path / "lambada_test.jsonl"
    text.write_text("\n".join(json.dumps({"text": passage}) for passage in PASSAGES))
    tokenizer = byte_fallback_model(
        tmp_path / "m.model", ["the cat and the dog saw", "a word said again, by those"]
    )
    config = glam.LambadaGLaM126M64E(
        NUM_LAYERS=2, NUM_HEADS=2, DIMS_PER_HEAD=8, MODEL_DIMS=16, HIDDEN_DIMS=16, MAX_SEQ_LEN=80,
        VOCAB_SIZE=tokenizer.vocab_size, VOCAB_PATH=str(tmp_path / "m.model"), LAMBADA_FILE=str(text),
        NUM_EXPERTS=4, EXPERT_CAPACITY_FACTOR=4.0, PERCORE_BATCH_SIZE=1, ICI_MESH_SHAPE=(1, 2, 1),
        FPROP_DTYPE="float32",
    )  # fmt: skip
    experiment = fdl.build(config.experiment())
    assert experiment.train_data is None and list(experiment.eval_data) == ["LambadaValidation"]
    mesh = experiment.mesh.build(jax.devices()[:2])
    with parallel.activate(mesh, experiment.rules):
        abstract = abstract_variables(experiment.model, mesh)
        random = np.random.default_rng(0)
        # Kernels are small beside the table, so that most often a token is followed by itself.
        sizes = {"kernel": 0.1, "scale": 0.0}
        made = lambda path, leaf: jnp.asarray(
            (path[-1].key == "scale")
            + sizes.get(path[-1].key, 1.0) * random.standard_normal(leaf.shape),
            leaf.dtype,
        )
        variables = jax.tree_util.tree_map_with_path(made, abstract)
        (evaluator,) = make_evaluators(experiment, mesh)
        here = jax.device_put(variables, jax.tree.map(lambda leaf: leaf.sharding, abstract))
        metrics = evaluator.run(here)
    logits_of = jax.jit(lambda ids: experiment.model.apply(variables, ids).logits())
    loss, right = [], []
    for passage in PASSAGES:  # places for all: nobody takes a place that another passage needs
        context, target = map(tokenizer.encode, split_passage(passage))
        ids = np.zeros((1, 80), np.int32)
        ids[0, : len(context + target)] = [tokenizer.bos_id, *context, *target][:-1]
        said = np.asarray(logits_of(ids))[0, len(context) : len(context + target)]
        said = np.float64(said) - np.log(np.sum(np.exp(np.float64(said)), axis=-1, keepdims=True))
        loss += [-said[i, token] for i, token in enumerate(target)]
        right.append(list(np.argmax(said, axis=-1)) == target)
    assert 0 < sum(right) < len(PASSAGES)
    strict = metrics["acc_strict"]
    assert (strict.sum, strict.weight) == (sum(right), len(PASSAGES))
    assert metrics["loss"].weight == len(loss)
    np.testing.assert_allclose(metrics["loss"].sum, np.sum(loss), rtol=1e-5)
