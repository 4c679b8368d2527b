"""What main.py says of flags: wrong use in one clear line, lists, help, and the flags of Pax."""

import json
import os

import jax
import pytest
import runs
from absl.testing import flagsaver


def call(*argv, environ=None):
    """main.main in this process, flags as if given anew."""
    import main

    with flagsaver.flagsaver():
        return main.main(["main.py", *argv])


TINY_SYNTHETIC = [f"--fdl.{k}={v}" for k, v in runs.TINY.items()] + [
    "--fdl.ICI_MESH_SHAPE=[4,1,1]",
    "--fdl.DCN_MESH_SHAPE=[1,1,1]",
]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--fdl_config=Pile126N"], "Pile126M"),
        (["--fdl_config=configs.gtp.Pile126M"], "configs.gpt"),
        (["--fdl_config=Quickstart", "--fdl.NUM_LAYER=2"], "NUM_LAYERS"),
        (["--fdl_config=Quickstart", "--fdl.NUM_LAYERS=two"], "int"),
        (["--fdl_config=Quickstart", "--fdl.model.stak.repeats=2"], "stack"),
        (["--fdl_config=Quickstart", "--mod=eval"], "mode"),
        (["--fdl_config=Quickstart", "--mode=evaluate"], "eval"),
        (["--fdl_config=Synthetic126M"], "needs 64 devices .* there are 4"),
        (
            ["--fdl_config=Synthetic126M", *TINY_SYNTHETIC, "--fdl.PERCORE_BATCH_SIZE=0.3"],
            "PERCORE_BATCH_SIZE=0.3 x 4 devices",
        ),
        (
            [
                "--fdl_config=Synthetic126M",
                *TINY_SYNTHETIC,
                "--fdl.ICI_MESH_SHAPE=[1,1,4]",
                "--fdl.NUM_HEADS=2",
            ],
            "'heads' = 2",
        ),
        (
            [
                "--fdl_config=Synthetic126M",
                *TINY_SYNTHETIC,
                "--fdl.VOCAB_SIZE=513",
                "--fdl.ICI_MESH_SHAPE=[1,1,4]",
            ],
            "'vocab' = 513",
        ),
        (
            ["--fdl_config=Synthetic126M", *TINY_SYNTHETIC, "--fdl.NUM_STAGES=2"],
            r"NUM_STAGES=2, but the mesh has 1 pipeline stage\(s\)",
        ),
        (
            [
                "--fdl_config=Synthetic126M",
                *TINY_SYNTHETIC,
                "--fdl.NUM_STAGES=4",
                "--fdl.ICI_MESH_SHAPE=[4,1,1,1]",
            ],
            "2 repeats of the stack's blocks do not divide over NUM_STAGES=4",
        ),
        (
            [
                "--fdl_config=Synthetic126M",
                *TINY_SYNTHETIC,
                "--fdl.NUM_STAGES=2",
                "--fdl.ICI_MESH_SHAPE=[2,2,1,1]",
                "--fdl.NUM_MICROBATCHES=3",
            ],
            "NUM_MICROBATCHES=3 is not a multiple of NUM_STAGES=2; use 4",
        ),
        (
            ["--fdl_config=Synthetic126M", *TINY_SYNTHETIC, "--fdl.MICROBATCH_SIZE=3"],
            "MICROBATCH_SIZE=3 does not divide the batch",
        ),
        (
            [
                "--fdl_config=Synthetic126M",
                *TINY_SYNTHETIC,
                "--fdl.MESH_AXES=[data,context,tensor]",
                "--fdl.ICI_MESH_SHAPE=[1,4,1]",
                "--fdl.MAX_SEQ_LEN=20",
            ],
            "MAX_SEQ_LEN=20 does not divide into 2 x context = 8 parts",
        ),
        (
            ["--fdl_config=Synthetic126M", *TINY_SYNTHETIC, "--fdl.CHECKPOINT_LAYERS=last:1"],
            "CHECKPOINT_LAYERS='last:1' is none of all, first:K",
        ),
        (
            ["--fdl_config=Synthetic126M", *TINY_SYNTHETIC, "--fdl.NUM_MICROBATCHES=3"],
            "NUM_MICROBATCHES=3",
        ),
        (
            ["--fdl_config=Synthetic126M", *TINY_SYNTHETIC, "--fdl.CHECKPOINT_POLICY=SAVE_NOTING"],
            "SAVE_NOTHING",
        ),
        (["--fdl_config=Quickstart", "--fdl.VOCAB_PATH=/nowhere/x.model"], "/nowhere/x.model"),
        (["--fdl_config=Quickstart"], "VOCAB_PATH"),
        (["--fdl_config=Synthetic126M", *TINY_SYNTHETIC, "--mode=eval"], "no held-out set"),
        (["--fdl_config=Lambada126M", *TINY_SYNTHETIC], "seq_len=32 must be at least 65"),
        (
            ["--fdl_config=Lambada126M", *TINY_SYNTHETIC, "--fdl.MAX_SEQ_LEN=80"],
            "no training data|there is no tokenizer",
        ),
    ],
)
def test_wrong_use_ends_in_one_clear_line(argv, message, tmp_path, monkeypatch):
    for variable in ("VOCAB_PATH", "TFDS_DATA_DIR"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ValueError, match=message) as error:
        call(*argv, f"--job_log_dir={tmp_path}/run")
    assert "\n" not in str(error.value).strip()


def test_missing_data_checkpoint_and_vocabulary_are_named(tmp_path):
    text = runs.write_text(tmp_path)
    tiny = [f"--fdl.{k}={v}" for k, v in {**runs.TINY, **text}.items()]
    base = ["--fdl_config=Quickstart", f"--job_log_dir={tmp_path}/run", *tiny]
    with pytest.raises(ValueError, match="/nowhere"):
        call(*base, "--fdl.TRAIN_FILES=/nowhere/*.jsonl")
    with pytest.raises((ValueError, FileNotFoundError), match="checkpoint"):
        call(*base, "--mode=eval")
    with pytest.raises(ValueError, match="VOCAB_SIZE|vocab"):
        call(*base, "--fdl.VOCAB_SIZE=200")


def test_a_log_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/run"):
        call("--fdl_config=Synthetic126M", *TINY_SYNTHETIC, f"--job_log_dir={tmp_path}/file/run")


def test_no_job_log_dir():
    with pytest.raises(ValueError, match="did you mean Quickstart"):  # what was typed comes first
        call("--fdl_config=Quickstrat")
    with pytest.raises(ValueError, match="--job_log_dir=DIR is missing"):
        call("--fdl_config=Synthetic126M")
    with pytest.raises(ValueError, match="--job_log_dir= is empty"):
        call("--fdl_config=Synthetic126M", "--job_log_dir=")
    with pytest.raises(ValueError, match="no config; give --fdl_config=NAME .*--fdl_list"):
        call()
    with pytest.raises(ValueError, match="--eval_on_test=maybe: true or false wanted, got maybe$"):
        call("--fdl_config=Synthetic126M", "--eval_on_test=maybe")


def test_no_memory_is_one_line():
    import main

    of = lambda text: main._describe(jax.errors.JaxRuntimeError(text))
    line = of("RESOURCE_EXHAUSTED: Out of memory allocating 49152000000000 bytes.")
    assert line.startswith("error: a device has no memory for 45,776.37 GiB: --mode=plan")
    assert "for 12.00 GiB: " in of("RESOURCE_EXHAUSTED: ... trying to allocate 12.00GiB.")
    assert "INTERNAL: no luck" in of("INTERNAL: no luck") and "plan" not in of("INTERNAL: no luck")


def test_lists_and_help(capsys):
    assert call("--fdl_list") == 0
    listing = capsys.readouterr().out
    for name in (
        "Pile126M",
        "Pile5B",
        "Pile175B",
        "GPT5B",
        "GPT175B",
        "Synthetic126M",
        "Lambada126M",
        "Quickstart",
    ):
        assert name in listing
    assert call("--fdl_config=Pile5B", "--fdl_help") == 0
    page = capsys.readouterr().out
    assert "ICI_MESH_SHAPE" in page and "4096" in page
    assert max(map(len, page.splitlines())) <= 100


def test_follow_knobs_of_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("VOCAB_PATH", "/nowhere/from_environment.model")
    with pytest.raises(ValueError, match="from_environment"):
        call("--fdl_config=Quickstart", f"--job_log_dir={tmp_path}")
    assert os.environ["VOCAB_PATH"]


def test_pax_flags_are_knobs(tmp_path, monkeypatch):
    import main

    seen = []
    monkeypatch.setattr(main, "_run", lambda resolved: seen.append(resolved.knobs) or 0)
    call(
        "--fdl_config=Pile126M",
        f"--job_log_dir={tmp_path}",
        "--eval_on_test",
        "--tfds_data_dir=/data",
        "--alsologtostderr",
    )
    assert seen[0]["EVAL_ON_TEST"] is True and seen[0]["TFDS_DATA_DIR"] == "/data"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--checkpoint=x"],
            "--checkpoint has no effect with --mode=train; .*CHECKPOINT_RESTORE_PATH",
        ),
        (["--prompt=x"], "--prompt has no effect with --mode=train"),
        (["--mode=eval", "--prompt_file=x"], "--prompt_file has no effect with --mode=eval"),
        (["--mode=eval", "--follow", "--checkpoint_step=3"], "leave out --checkpoint_step"),
        (["--num_hosts=2", "--host_idx=1"], "need --multiprocess_gpu"),
        (["--fdl.NUM_MICROBATCHES=0"], "NUM_MICROBATCHES=0 must be at least 1"),
        (["--fdl.LOGITS_CHUNK=-1"], "LOGITS_CHUNK=-1"),
        (["--fdl.MESH_AXES=[replica,fsdp,tensor]"], "'replica'; .*did you mean data"),
    ],
)
def test_what_would_have_no_effect_is_refused(argv, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        call("--fdl_config=Synthetic126M", *TINY_SYNTHETIC, f"--job_log_dir={tmp_path}/run", *argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--fdl.model.stack.period[0].ffn.activation=reluu"], "ACTIVATION='reluu' is none of"),
        (["--fdl.model.stack.period[0].ffn.dropout=1.5"], r"in \[0, 1\), got 1.5"),
        (["--fdl.BEST_METRIC=foo"], "BEST_METRIC='foo' needs evaluation"),
        (["--fdl.HANG_FACTOR=1", "--fdl.num_microbatches=0"], "NUM_MICROBATCHES=0 must be"),
        (["--fdl.WEIGHT_DECAY_EXCLUDE=scales"], "WEIGHT_DECAY_EXCLUDE: 'scales' matches no"),
        (["--fdl.logging.summary_interval_steps=0"], "SUMMARY_INTERVAL_STEPS=0 must be"),
    ],
)
def test_a_check_refuses_what_training_would(argv, message, capsys):
    config = ["--mode=check", "--fdl_config=Synthetic126M", *TINY_SYNTHETIC]
    with pytest.raises(ValueError, match=message):
        call(*config, "--fdl.ICI_MESH_SHAPE=[-1,1,1]", *argv)
    assert capsys.readouterr().out == ""


def test_errors_of_libraries_keep_their_traceback():

    import main

    with pytest.raises(ValueError) as ours:
        call("--fdl_config=Synthetic126M")
    assert main._is_for_the_user(ours.value)
    with pytest.raises(ValueError) as theirs:
        json.loads("{")
    assert not main._is_for_the_user(theirs.value)
