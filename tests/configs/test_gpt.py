"""The GPT configs: Pax's numbers, golden trees, and each of them, shrunk, through its paces."""

import pathlib

import fiddle as fdl
import numpy as np
import pytest

from configs import flags, gpt
from configs.knobs import knobs
from paxlike.data.tokenizers import ByteTokenizer
from paxlike.train.state import num_parameters
from tests.configs.golden_files import compare, tree_of_parameters, variables

GOLDEN = pathlib.Path(__file__).parent / "golden"
NAMES = [
    "Pile126M",
    "Pile5B",
    "Pile175B",
    "Synthetic126M",
    "Synthetic5B",
    "Synthetic175B",
    "Lambada126M",
    "Quickstart",
]


@pytest.mark.parametrize(
    ("name", "millions"),
    [("Pile126M", 125.26), ("Pile5B", 5048), ("Pile175B", 174600), ("Lambada126M", 125.26)],
)
def test_parameter_counts_are_those_of_pax(name, millions):
    count = num_parameters(variables(getattr(gpt, name)())["params"])
    assert count / 1e6 == pytest.approx(millions, rel=5e-4)


PAX = {
    "Pile126M": {
        "NUM_LAYERS": 12, "NUM_HEADS": 12, "DIMS_PER_HEAD": 64, "MODEL_DIMS": 768, "HIDDEN_DIMS": 3072,
        "VOCAB_SIZE": 50304, "MAX_SEQ_LEN": 2048, "LEARNING_RATE": 6e-4, "LR_COS_WARMUP": 636,
        "LR_COS_DECAY_START": 637, "LR_COS_DECAY_END": 500000, "LR_COS_MIN_RATIO": 0.1, "ADAM_BETA1": 0.9,
        "ADAM_BETA2": 0.95, "ADAM_EPSILON": 1e-8, "WEIGHT_DECAY": 0.1, "CLIP_GRADIENT_NORM_TO_VALUE": 1.0,
        "MAX_STEPS": 600000, "CHECKPOINT_EVERY_N_STEPS": 5000, "CHECKPOINT_MAX_TO_KEEP": 10,
        "SUMMARY_INTERVAL_STEPS": 100, "PERCORE_BATCH_SIZE": 4, "ICI_MESH_SHAPE": (8, 1, 1),
        "DCN_MESH_SHAPE": (8, 1, 1), "FPROP_DTYPE": "bfloat16", "INIT_STD": 0.023, "USE_REPEATED_LAYER": False,
        "EMBEDDING_DROPOUT_PROB": 0.0, "WEIGHT_DECAY_EXCLUDE": None,
    },
    "Pile5B": {
        "NUM_LAYERS": 24, "NUM_HEADS": 32, "DIMS_PER_HEAD": 128, "MODEL_DIMS": 4096, "HIDDEN_DIMS": 16384,
        "VOCAB_SIZE": 50304, "LEARNING_RATE": 1.6e-4, "LR_COS_WARMUP": 115, "LR_COS_DECAY_START": 116,
        "LR_COS_DECAY_END": 62500, "MAX_STEPS": 75000, "CHECKPOINT_EVERY_N_STEPS": 250,
        "SUMMARY_INTERVAL_STEPS": 10, "PERCORE_BATCH_SIZE": 8, "ICI_MESH_SHAPE": (1, 8, 1),
        "DCN_MESH_SHAPE": (1, 32, 1), "INIT_STD": 0.01, "USE_REPEATED_LAYER": True,
        "CHECKPOINT_POLICY": "SAVE_DOT_WITH_NO_BATCH_DIM", "EMBEDDING_DROPOUT_PROB": 0.1,
    },
    "Pile175B": {
        "NUM_LAYERS": 96, "NUM_HEADS": 96, "DIMS_PER_HEAD": 128, "MODEL_DIMS": 12288, "HIDDEN_DIMS": 49152,
        "VOCAB_SIZE": 50257, "LEARNING_RATE": 2e-5, "LR_COS_WARMUP": 265, "LR_COS_DECAY_START": 266,
        "LR_COS_DECAY_END": 108600, "MAX_STEPS": 75000, "CHECKPOINT_EVERY_N_STEPS": 100,
        "SUMMARY_INTERVAL_STEPS": 10, "PERCORE_BATCH_SIZE": 6, "ICI_MESH_SHAPE": (1, 8, 1),
        "DCN_MESH_SHAPE": (1, 32, 1), "INIT_STD": 0.023, "USE_REPEATED_LAYER": True,
        "CHECKPOINT_POLICY": "SAVE_NOTHING", "EMBEDDING_DROPOUT_PROB": 0.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PAX)
def test_numbers_of_pax(name):
    values = {knob.name: knob.default for knob in knobs(getattr(gpt, name))}
    assert {knob: values[knob] for knob in PAX[name]} == PAX[name]


@pytest.mark.parametrize(
    ("name", "rows"), [("Pile126M", 256), ("Pile5B", 2048), ("Pile175B", 1536)]
)
def test_global_batches_of_pax(name, rows):
    assert fdl.build(getattr(gpt, name)().experiment()).global_batch_size == rows


def test_synthetic_configs_differ_in_data_and_steps_only():
    for synthetic, pile in (
        ("Synthetic126M", "Pile126M"),
        ("Synthetic5B", "Pile5B"),
        ("Synthetic175B", "Pile175B"),
    ):
        ours = {knob.name: knob.default for knob in knobs(getattr(gpt, synthetic))}
        theirs = {knob.name: knob.default for knob in knobs(getattr(gpt, pile))}
        assert {k for k in theirs if ours[k] != theirs[k]} == {"MAX_STEPS", "EVAL_SETS"}
        assert ours["MAX_STEPS"] == 100


def test_aliases():
    assert gpt.GPT5B is gpt.Pile5B and gpt.GPT175B is gpt.Pile175B


@pytest.mark.parametrize("name", NAMES)
def test_golden_tree(name, request):
    """A change of a config shows in the diff. Renew with `pytest tests/configs/test_gpt.py --renew-golden`."""
    compare(
        GOLDEN / f"{name}.txt", flags.flat_text(getattr(gpt, name)().experiment()) + "\n", request
    )


@pytest.mark.parametrize("name", ["Pile126M", "Pile5B", "Pile175B", "Quickstart"])
def test_golden_parameters(name, request):
    compare(GOLDEN / f"{name}.params.txt", tree_of_parameters(getattr(gpt, name)()), request)


def shrink(name, **changes):
    """The config at a size for seconds, everything else as it is."""
    small = {
        "NUM_LAYERS": 2,
        "NUM_HEADS": 2,
        "DIMS_PER_HEAD": 8,
        "MODEL_DIMS": 16,
        "HIDDEN_DIMS": 32,
        "VOCAB_SIZE": 64,
        "MAX_SEQ_LEN": 80,
        "ICI_MESH_SHAPE": (1, 2, 2),
        "DCN_MESH_SHAPE": (1, 1, 1),
        "PERCORE_BATCH_SIZE": 1,
        "MAX_STEPS": 2,
        **changes,
    }
    return getattr(gpt, name)(**small)


@pytest.mark.parametrize("name", NAMES)
def test_every_config_shrunk_learns_and_evaluates(name, tmp_path):
    """Built, stepped, evaluated: on made-up tokens, so that only the data differs from the real run."""
    from paxlike.data.loader import Loader
    from paxlike.data.synthetic import SyntheticTokens

    config = shrink(name, VOCAB_PATH="/nowhere.model")
    tree = config.experiment()
    packing = "packed" if config.PACKED_INPUT else "concatenated"
    rows = fdl.Config(
        Loader,
        source=fdl.Config(SyntheticTokens, vocab_size=64, seed=0, num_rows=8),
        seq_len=80,
        packing=packing,
    )
    tree.train_data, tree.eval_data, tree.tokenizer = rows, {"made_up": rows}, None
    tree.evaluation.every_n_steps = 2
    experiment = fdl.build(tree)
    assert experiment.train(str(tmp_path)) == 0
    from paxlike.log.history import read_metrics

    lines = read_metrics(tmp_path)
    losses = [line["loss"] for line in lines]
    assert {line["split"] for line in lines} == {"train", "made_up"}
    assert all(np.isfinite(losses)) and all(3 < loss < 6 for loss in losses), losses
    assert experiment.evaluate(str(tmp_path)) == 0
    assert (tmp_path / "eval_out" / "made_up" / "eval_out_00000002.json").exists()


def test_fp8_trains_and_its_scales_survive(tmp_path):
    config = shrink(
        "Synthetic126M",
        USE_FP8=True,
        VOCAB_SIZE=320,
        SYNTHETIC_RANDOM=True,
        ICI_MESH_SHAPE=(2, 2, 1),
        USE_REPEATED_LAYER=True,
        MAX_STEPS=4,
    )
    experiment = fdl.build(config.experiment())
    assert experiment.train(str(tmp_path)) == 0
    from paxlike.log.history import read_metrics

    fp8 = [line["loss"] for line in read_metrics(tmp_path)]
    assert np.isfinite(fp8).all()
    # Evaluation and decoding read the scales with the weights.
    tree = config.experiment()
    tree.eval_data = {"made_up": tree.train_data}
    tree.evaluation.max_batches = 1
    tree.tokenizer = fdl.Config(ByteTokenizer)
    experiment = fdl.build(tree)
    assert experiment.evaluate(str(tmp_path)) == 0
    assert experiment.decode(str(tmp_path), prompts=["a"]) == 0
    # And a model without FP8, as on a chip that has none, reads the weights alone.
    tree.model.stack.period[0].mixer.dot_general_cls = None
    tree.model.stack.period[0].ffn.dot_general_cls = None
    assert fdl.build(tree).evaluate(str(tmp_path)) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"CHECKPOINT_POLICY": "SAVE_NOTING"},
            "CHECKPOINT_POLICY='SAVE_NOTING' is none of .*SAVE_NOTHING",
        ),
        ({"DIMS_PER_HEAD": None, "MODEL_DIMS": 15}, "MODEL_DIMS=15 does not divide by NUM_HEADS=2"),
        ({"NUM_LAYERS": 0}, "NUM_LAYERS=0 must be at least 1"),
        ({"DIMS_PER_HEAD": 0}, "DIMS_PER_HEAD=0 must be at least 1"),
        ({"DROPOUT_PROB": 1.5}, "DROPOUT_PROB=1.5 must be at least 0 and below 1"),
        ({"LEARNING_RATE": float("nan")}, "LEARNING_RATE=nan must be a finite number"),
        ({"EVAL_MAX_BATCHES": 0}, "EVAL_MAX_BATCHES=0 must be at least 1"),
        (
            {"EVAL_SETS": ("Lambada",)},
            "'Lambada' is none of HeldOut, PileValidation, LambadaValidation",
        ),
    ],
)
def test_bad_knobs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        shrink("Pile126M", **changes).experiment()


@pytest.mark.parametrize(
    ("switch", "kernel", "expected"),
    [
        (None, "chunked", "chunked"),
        (True, "auto", "cudnn"),
        (False, "auto", "reference"),
        (False, "chunked", "chunked"),
        (True, "te", "te"),
    ],
)
def test_attention_kernel(switch, kernel, expected):
    knobs = {"USE_CUDNN_FLASH_ATTENTION": switch, "ATTENTION_KERNEL": kernel}
    assert gpt.Quickstart(**knobs).attention_backend() == expected
    if switch and kernel == "auto":
        assert gpt.Quickstart(**knobs, USE_TE=True).attention_backend() == "fused"


def test_attention_kernels_that_contradict_each_other():
    for switch, kernel in ((True, "chunked"), (False, "cudnn"), (False, "te")):
        knobs = gpt.Quickstart(USE_CUDNN_FLASH_ATTENTION=switch, ATTENTION_KERNEL=kernel)
        with pytest.raises(ValueError, match=f"{switch} and ATTENTION_KERNEL={kernel} contradict"):
            knobs.experiment()
