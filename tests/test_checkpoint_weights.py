"""Weights alone: from where, renamed, ignored, averaged, and what does not fit."""

import shutil

import jax
import jax.numpy as jnp
import pytest

from paxlike.checkpoint import Checkpointer, CheckpointOptions, restore_params
from tests.checkpoint_worker import CONFIG, abstract, assert_same_bits, host_state, mesh_of, put

STATE = host_state(3, ema=True)
ONE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with Checkpointer(folder, CheckpointOptions(every_n_steps=1)) as checkpointer:
        for step, state in ((2, host_state(2)), (3, STATE)):
            checkpointer.save(step, put(state, mesh_of(2, 2)), data={}, config=CONFIG)
    return folder


def wanted(mesh=(1, 4)):
    return abstract(STATE.params, mesh_of(*mesh))


@pytest.mark.parametrize("below", ["", "checkpoints", "checkpoints/checkpoint_00000003"])
def test_from_a_run_its_checkpoints_or_one_of_them(run, below):
    params = restore_params(run / below, wanted())
    assert_same_bits(params, STATE.params)
    assert params["decoder"]["w"].sharding == wanted()["decoder"]["w"].sharding


def test_from_a_step(run):
    assert_same_bits(restore_params(run, wanted(), step=2), host_state(2).params)
    with pytest.raises(ValueError, match="no checkpoint of step 5 in .*; there are steps 2, 3"):
        restore_params(run, wanted(), step=5)
    with pytest.raises(
        ValueError, match="step 2 was asked of .*, which is the checkpoint of step 3"
    ):
        restore_params(run / "checkpoints/checkpoint_00000003", wanted(), step=2)


def test_nothing_there(tmp_path):
    with pytest.raises(
        ValueError, match="no checkpoint in .*: give a job_log_dir, its checkpoints/"
    ):
        restore_params(tmp_path, wanted())


def test_averaged_weights(run):
    assert_same_bits(restore_params(run, wanted(), use="ema"), STATE.ema)
    with pytest.raises(
        ValueError, match="checkpoint_00000002 has no 'ema' weights; it has opt_state"
    ):
        restore_params(run, wanted(), step=2, use="ema")
    with pytest.raises(ValueError, match="use='average': it must be one of 'params', 'ema'"):
        restore_params(run, wanted(), use="average")


def test_other_dtype(run):
    half = {
        "scale": wanted()["scale"],
        "decoder": {
            "b": wanted()["decoder"]["b"],
            "w": wanted()["decoder"]["w"].update(dtype=jnp.bfloat16),
        },
    }
    assert restore_params(run, half)["decoder"]["w"].dtype == jnp.bfloat16


def test_renamed(run):
    target = {"scale": wanted()["scale"], "lm": {"block": wanted()["decoder"]}}
    params = restore_params(run, target, rules=[(r"lm/block/(\w+)", r"decoder/\1")])
    assert_same_bits(params["lm"]["block"], STATE.params["decoder"])
    assert_same_bits(params["scale"], STATE.params["scale"])


def test_ignored_here_keeps_the_initial_values(run):
    head = jax.ShapeDtypeStruct((5,), jnp.float32, sharding=ONE)
    target = wanted() | {"head": {"w": head}}
    init = {"head": {"w": jnp.full(5, 7.0)}}
    params = restore_params(run, target, rules=[("head/.*", None)], init_params=init)
    assert_same_bits(params["decoder"], STATE.params["decoder"])
    assert params["head"]["w"].tolist() == [7.0] * 5
    with pytest.raises(ValueError, match="the rules ignore head/w: give init_params, whose values"):
        restore_params(run, target, rules=[("head/.*", None)])
    with pytest.raises(ValueError, match="the rules ignore head/w: init_params does not have it"):
        restore_params(run, target, rules=[("head/.*", None)], init_params={})


def test_an_ignored_array_may_have_another_shape_in_the_checkpoint(run):
    wide = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=ONE)
    target = wanted()
    target["decoder"]["w"] = wide
    init = {"decoder": {"w": jnp.ones((8, 64))}}
    params = restore_params(run, target, rules=[("decoder/w", None)], init_params=init)
    assert params["decoder"]["w"].shape == (8, 64)


def test_ignored_in_the_checkpoint(run):
    target = {"decoder": wanted()["decoder"]}
    assert_same_bits(
        restore_params(run, target, rules=[("scale", None)]), {"decoder": STATE.params["decoder"]}
    )
    with pytest.raises(ValueError, match=r"scale is not here and has shape \[\] in the checkpoint"):
        restore_params(run, target)


def test_what_does_not_fit_is_one_line(run):
    more = wanted() | {"head": wanted()["scale"]}
    with pytest.raises(
        ValueError, match=r"head has shape \[\] here and is not in the che"
    ) as caught:
        restore_params(run, more)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("1 of 4 arrays differ; rename or ignore them by rules")
    wide = abstract(host_state(3, width=32).params, mesh_of(1, 4))
    with pytest.raises(
        ValueError, match=r"decoder/b has shape \[32\] here and \[16\] in the checkpoint; 2 of 3"
    ):
        restore_params(run, wide)


def test_rules_that_make_no_sense(run, caplog):
    with pytest.raises(ValueError, match=r"rule '\(' is no regular expression: missing \)"):
        restore_params(run, wanted(), rules=[("(", None)])
    with pytest.raises(ValueError, match=r"fails on scale: invalid group reference 3"):
        restore_params(run, wanted(), rules=[("scale", r"\3")])
    with pytest.raises(ValueError, match="take 'scale' of the checkpoint for more than one array"):
        restore_params(run, wanted() | {"b": wanted()["scale"]}, rules=[("b", "scale")])
    restore_params(run, wanted(), rules=[("head/.*", None)])
    assert "rule 'head/.*' matches no array, here or in" in caplog.text


def test_a_damaged_checkpoint_is_passed_over(run, tmp_path, caplog):
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "checkpoints/checkpoint_00000003/state/manifest.ocdbt").write_bytes(b"")
    assert_same_bits(restore_params(copy, wanted()), host_state(2).params)
    assert "checkpoint_00000003 is damaged (state/manifest.ocdbt has 0 bytes" in caplog.text


def test_without_checksums_only_sizes_are_compared(run, tmp_path, caplog):
    copy = shutil.copytree(run, tmp_path / "copy")
    config = copy / "checkpoints/checkpoint_00000003/config/metadata"
    config.write_bytes(config.read_bytes()[::-1])
    assert_same_bits(restore_params(copy, wanted()), host_state(2).params)
    assert "checkpoint_00000003 is damaged (config/metadata has CRC-32" in caplog.text
    assert_same_bits(restore_params(copy, wanted(), checksums=False), STATE.params)
