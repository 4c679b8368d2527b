"""Event files are read back record by record, with their checksums."""

import subprocess
import sys

import pytest

from paxlike.log.tensorboard import EventFile, tag_of


def test_scalars_and_texts_are_read_back(tmp_path, read_events):
    file = EventFile(tmp_path)
    file.scalars(3, {"loss": 2.5, "Steps/sec": 4.0})
    file.text("config", "NUM_LAYERS = 2", step=1)
    file.close()
    (path,) = tmp_path.iterdir()
    assert "tfevents" in path.name
    first, scalars, text = read_events(path)
    assert first.file_version == "brain.Event:2"
    assert scalars.step == 3
    assert scalars.wall_time > 1e9
    assert {v.tag: v.simple_value for v in scalars.summary.value} == {"loss": 2.5, "Steps/sec": 4.0}
    (value,) = text.summary.value
    assert value.tag == "config/text_summary"
    assert value.tensor.string_val == [b"NUM_LAYERS = 2"]
    assert value.metadata.plugin_data.plugin_name == "text"


def test_files_opened_in_one_second_do_not_overwrite_each_other(tmp_path, read_scalars):
    for step in range(3):
        file = EventFile(tmp_path)
        file.scalars(step, {"loss": float(step)})
        file.close()
    assert read_scalars(tmp_path) == {(step, "loss"): float(step) for step in range(3)}


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("loss", "loss"),
        ("steps_per_second", "Steps/sec"),
        ("learning_rate", "learning/lr"),
        ("raw_grad_norm", "learning/raw_grad_norm"),
        ("clipped_grad_norm", "learning/clipped_grad_norm"),
        ("param_norm", "learning/var_norm"),
        ("log_pplx", "Metrics/log_pplx"),
        ("acc_strict", "Metrics/acc_strict"),
        ("mfu", "throughput/mfu"),
        ("experts/load", "experts/load"),
    ],
)
def test_tags_are_those_of_pax(name, tag):
    assert tag_of(name) == tag


def test_torch_is_not_loaded_for_it():
    code = "import sys, paxlike.log.tensorboard; assert 'torch' not in sys.modules, 'loaded'"
    subprocess.run([sys.executable, "-c", code], check=True)
