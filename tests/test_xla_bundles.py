"""Bundles of compiler flags: what they add, that the installed XLA takes them, and that the user's flags stand."""

import json
import subprocess
import sys

import pytest

from paxlike import xla_bundles
from paxlike.xla_bundles import BUNDLES, NAMES, apply, gpu_name


def test_the_installed_xla_takes_every_flag():
    flags = [flag for bundle in BUNDLES.values() for flag, _ in bundle.flags]
    xla_bundles.check_xla_flags(" ".join(dict.fromkeys(flags)))


def test_jax_takes_every_level_of_optimisation():
    levels = {bundle.optimization_level for bundle in BUNDLES.values()} - {None}
    script = (
        "import jax, sys; [jax.config.update('jax_optimization_level', v) for v in sys.argv[1:]]"
    )
    subprocess.run([sys.executable, "-c", script, *levels], check=True)


def test_the_knob_knows_the_bundles():
    from configs.gpt import Quickstart
    from configs.knobs import knobs

    (knob,) = [knob for knob in knobs(Quickstart) if knob.name == "XLA_BUNDLE"]
    assert knob.type.__args__ == NAMES


def test_flags_of_the_user_stand(monkeypatch):
    monkeypatch.setattr(xla_bundles, "check_once", lambda *_: None)
    environ = {"XLA_FLAGS": "--xla_gpu_enable_triton_gemm=true --xla_a=1"}
    bundle, added = apply("gpu-sharded", environ, folder=None)
    assert bundle.name == "gpu-sharded" and bundle.optimization_level == "O1" and added == []
    assert environ["XLA_FLAGS"] == "--xla_gpu_enable_triton_gemm=true --xla_a=1"
    environ = {"XLA_FLAGS": "--xla_a=1"}
    _, added = apply("gpu-sharded", environ, folder=None)
    assert environ["XLA_FLAGS"].split() == ["--xla_gpu_enable_triton_gemm=false", "--xla_a=1"]


@pytest.mark.parametrize("name", ["auto", "none"])
def test_without_a_gpu_nothing_is_added(name):
    environ = {"JAX_PLATFORMS": "cpu"}
    assert apply(name, environ, folder=None) == (BUNDLES["none"], [])
    assert environ == {"JAX_PLATFORMS": "cpu"}


def test_the_gpu_is_found_by_the_files_of_its_driver(tmp_path, monkeypatch):
    card = tmp_path / "gpus" / "0000:01:00.0" / "information"
    card.parent.mkdir(parents=True)
    card.write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ: 1\n")
    assert gpu_name({}, tmp_path) == "NVIDIA H100 80GB HBM3"
    assert gpu_name({"JAX_PLATFORMS": "cuda,cpu"}, tmp_path) is not None
    assert gpu_name({"JAX_PLATFORMS": "cpu"}, tmp_path) is None
    assert gpu_name({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) is None
    assert gpu_name({}, tmp_path / "none") is None
    monkeypatch.setattr(xla_bundles, "gpu_name", lambda environ: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(xla_bundles, "check_once", lambda *_: None)
    environ: dict[str, str] = {}
    bundle, added = apply("auto", environ, folder=None)
    assert bundle.name == "gpu" and environ["XLA_FLAGS"] == " ".join(added)


def test_an_unknown_flag_is_one_line_and_a_right_set_is_tried_once(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--xla_no_such_thing .remove it.") as error:
        apply("none", {"XLA_FLAGS": "--xla_no_such_thing=1"}, folder=str(tmp_path))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*"))

    right = {"XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false"}
    apply("none", dict(right), folder=str(tmp_path))
    monkeypatch.setattr(xla_bundles, "check_xla_flags", lambda flags: pytest.fail("tried again"))
    apply("none", dict(right), folder=str(tmp_path))
    with pytest.raises(pytest.fail.Exception):
        apply("none", {"XLA_FLAGS": "--xla_a=1"}, folder=str(tmp_path))


def test_the_committed_effects_and_their_table():
    from scripts import xla_bundles_table as effects

    rows = json.loads(effects.NUMBERS.read_text())["rows"]
    assert {mesh: tuple(found) for mesh, found in rows.items()} == effects.ROWS
    tables = {"flags": effects.table(rows)}
    assert not effects.page.renew(effects.PAGE, "xla_bundles_table.py", tables, check=True)
    sharded = rows["tensor 8, SEQUENCE_PARALLEL"]
    assert sharded["`gpu-sharded` (O1)"]["step_ms"] < sharded["`gpu`"]["step_ms"]
