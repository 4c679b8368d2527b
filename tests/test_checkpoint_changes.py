"""Which changed settings make another model, though every array has its shape."""

import functools

import pytest
from runs import ONE_LAYER

from configs import flags
from paxlike.checkpoint import changes


@functools.cache
def text(*overrides, config="Synthetic126M"):
    """The resolved config of a tiny run, as it is written beside its checkpoints."""
    knobs = [*(f"{name}={value}" for name, value in ONE_LAYER.items()), *overrides]
    argv = ["main.py", f"--fdl_config={config}", *(f"--fdl.{knob}" for knob in knobs)]
    return flags.resolve(flags.split(argv)[0], {}).text


@pytest.mark.parametrize(
    ("change", "clause"),
    [
        ("ACTIVATION=relu", "ACTIVATION was 'gelu' and is 'relu'"),
        ("LAYERNORM_EPSILON=0.1", "LAYERNORM_EPSILON was 1e-05 and is 0.1"),
        ("SEED=7", "SEED was 1234 and is 7"),
        ("model.logit_cap=30.0", "model.logit_cap was None and is 30.0"),
        ("model.stack.period[0].mixer.causal=False", "[0].mixer.causal was True and is False"),
    ],
)
def test_what_makes_another_model_is_refused(change, clause):
    assert clause in changes.refused(text(), text(change))
    assert changes.refused(text(change), text(change)) is None
    assert (changes.applied(text(), text(change)) is None) == (change == "SEED=7")


@pytest.mark.parametrize(
    ("change", "clause"),
    [
        ("USE_REPEATED_LAYER=False", None),
        ("CHECKPOINT_POLICY=SAVE_DOT_ONLY", None),
        ("ATTENTION_KERNEL=chunked", None),
        ("NUM_MICROBATCHES=2", None),
        ("PERCORE_BATCH_SIZE=4", None),
        ("LEARNING_RATE=1.0", None),
        ("MAX_STEPS=3", None),
        ("model.embedding.table_init.stddev=0.5", None),
        ("FPROP_DTYPE=float32", "FPROP_DTYPE was 'bfloat16' and is 'float32'"),
        ("DROPOUT_PROB=0.5", "DROPOUT_PROB was 0.0 and is 0.5"),
        ("USE_FP8=True", "dot_general_cls was None and is "),
        ("Z_LOSS_WEIGHT=0.01", "Z_LOSS_WEIGHT was 0.0 and is 0.01"),
        ("task.chunk=64", None),
    ],
)
def test_what_may_change_is_not_refused(change, clause):
    old, new = text(), text(change)
    assert old != new and changes.refused(old, new) is None
    said = changes.allowed(old, new)
    assert said is None if clause is None else clause in said


@pytest.mark.parametrize(
    ("knob", "was", "value"),
    [
        ("EXPERT_CAPACITY_FACTOR", "2.0", "1.5"),
        ("EXPERT_BUFFER_FACTOR", "2.0", "1.5"),
        ("MOE_EXCHANGE", "'all_to_all'", "gather"),
    ],
)
def test_room_at_the_experts_may_change(knob, was, value):
    base = ["NUM_LAYERS=2", "NUM_EXPERTS=4", "ICI_MESH_SHAPE=[1,4,1]", "DCN_MESH_SHAPE=[1,1,1]"]
    if knob != "EXPERT_CAPACITY_FACTOR":
        base += ["EXPERT_CAPACITY_FACTOR=None", "MOE_EXCHANGE=all_to_all"]
    if knob == "EXPERT_BUFFER_FACTOR":
        base += ["EXPERT_BUFFER_FACTOR=2.0"]
    glam = functools.partial(text, *base, config="SyntheticGLaM126M64E")
    old, new = glam(), glam(f"{knob}={value}")
    assert old != new and changes.refused(old, new) is None
    told = None if knob == "MOE_EXCHANGE" else f"{knob} was {was} and is {value}"
    assert changes.allowed(old, new) == told


def test_fields_of_another_version_and_texts_that_are_not_there_are_passed_over():
    lines = text().splitlines(keepends=True)
    older = "".join(line for line in lines if ".logit_cap" not in line)
    older = older.replace("<paxlike.layers.", "<paxlike.older.")
    assert older != text()
    assert changes.changes(older, text()) == changes.changes(text(), older) == []
    assert changes.changes("", text()) == changes.changes(text(), "") == []


def test_a_node_that_came_is_one_line_and_many_changes_are_short():
    old = "# tree\nmodel = <a.Net>\n" + "".join(f"model.f{n} = None\n" for n in range(5))
    assert changes.refused(old, old.replace("f1 = None", "f1 = <a.Rope>\nmodel.f1.x = 2")) == (
        "model.f1 was None and is Rope"
    )
    assert changes.refused(old, old.replace("None", "1")).endswith("is 1, 2 more")
