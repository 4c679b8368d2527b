"""A recorded step is taken again, and the module at fault is named."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from paxlike import parallel
from paxlike.checkpoint import Checkpointer
from paxlike.train import findings, program
from tests.train.odd_run import experiment, one_device


@pytest.fixture
def alone():
    with one_device():
        yield


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A run with an odd batch at step 18."""
    directory = tmp_path_factory.mktemp("odd")
    run = experiment(18, MAX_STEPS=20)
    with one_device():
        assert run.train(str(directory)) == 0
    return directory, run


def files(directory):
    """Every file of a run with its contents, but for the folders of spikes."""
    return {
        path: path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and "spikes" not in path.parts
    }


def test_an_odd_batch_is_replayed_to_the_bit(odd, alone, capsys):
    directory, run = odd
    before = files(directory)
    assert run.replay(str(directory)) == 0
    assert files(directory) == before
    place = directory / "spikes" / "step_00000018"
    found = json.loads((place / "replay.json").read_text())
    spike = json.loads((place / "spike.json").read_text())
    assert (found["step"], found["checkpoint"]) == (18, 16)
    assert (found["loss"], found["grad_norm"]) == (spike["loss"], spike["grad_norm"])
    assert found["same_loss"] is True and found["compared_with_step_before"] is True
    out = capsys.readouterr().out
    assert "step 18 again, from the checkpoint of step 16" in out
    assert ", the loss that was recorded" in out


def test_what_is_measured_is_what_the_model_gives(odd, alone):
    directory, run = odd
    # From the checkpoint of step 16, whose parameters are those of the step.
    run.replay(str(directory), step=17)
    found = json.loads((directory / "spikes" / "step_00000017" / "replay.json").read_text())
    assert found["same_loss"] is None and found["compared_with_step_before"] is False
    _, state, batch = restored(run, directory, 16, first_row=64)
    _, seen = run.model.apply(
        state.variables(),
        jax.numpy.asarray(batch["tokens"]),
        capture_intermediates=True,
        mutable=["intermediates"],
    )
    rows = {(row["name"], row["layer"]): row for row in found["modules"]}
    for name, half in (("ffn1", "ffn"), ("qkv", "mixer")):
        (outputs,) = seen["intermediates"]["stack"]["period_0"][half][name]["__call__"]
        for layer in range(2):
            wide = np.asarray(outputs[layer], np.float64)
            row = rows[f"stack/period_0/{half}/{name}", layer]
            # The forward pass is bfloat16, and another program: a rounding apart.
            assert row["max"] == pytest.approx(np.abs(wide).max(), rel=2e-2)
            assert row["rms"] == pytest.approx(np.sqrt((wide**2).mean()), rel=1e-3)
            assert row["non_finite"] == 0
    names = [(row["name"], row["layer"]) for row in found["modules"]]
    assert names[0] == ("embedding", None) and names[-1] == ("model", None)
    order = [names.index((f"stack/period_0/{part}", layer)) for layer in (0, 1) for part in PARTS]
    assert order == sorted(order)
    norms = [row["norm"] for row in found["parameters"]]
    assert np.sqrt(np.sum(np.square(norms))) == pytest.approx(found["grad_norm"], rel=1e-5)
    assert all(row["update"] is None or row["update"] > 0 for row in found["parameters"])


PARTS = ("mixer_norm", "mixer/qkv", "mixer", "ffn_norm", "ffn/ffn1", "ffn/ffn2", "ffn")


def restored(run, directory, step, *, first_row):
    """The run on these devices, the state of a checkpoint, and the batch that came next."""
    run = run.on_these_devices()
    mesh = run.mesh.build()
    with parallel.activate(mesh, run.training_rules):
        factory = program.state_factory(run, run.train_data.spec(run.global_batch_size), mesh)
        with Checkpointer(directory, read_only=True) as checkpoints:
            state = checkpoints.restore(factory.abstract(), step=step).state
    with run.train_data.batches(global_batch=run.global_batch_size, first_row=first_row) as batches:
        return run, state, next(batches)


def plant(run, directory, module, size):
    """A fresh state as the checkpoint of step 5, with weights of +-`size` in layer 1 of a module."""
    run = run.on_these_devices()
    mesh = run.mesh.build()
    with parallel.activate(mesh, run.training_rules):
        factory = program.state_factory(run, run.train_data.spec(run.global_batch_size), mesh)
        state = factory.initialize(run.seed)
        node = state.params["stack"]["period_0"]
        *path, last = module.split("/")
        for name in (*path, last):
            node = node[name]
        kernel = np.array(node["kernel"])
        signs = np.random.default_rng(0).choice([-1.0, 1.0], kernel[1].shape)
        kernel[1] = size * signs
        node["kernel"] = jax.device_put(kernel, node["kernel"].sharding)
        state = dataclasses.replace(state, step=jax.device_put(5 + state.step * 0))
        with Checkpointer(directory) as checkpoints:
            rows = 5 * run.global_batch_size
            data = {"rows": rows, "fingerprint": run.train_data.fingerprint()}
            checkpoints.save(5, state, data=data, config="{}", wait=True, force=True)
    return run


def test_an_overflow_is_recorded_and_its_module_named(tmp_path, alone, capsys):
    # With layers unrolled, some of them computed again, and the batch in two parts.
    parts = {"NUM_MICROBATCHES": 2, "CHECKPOINT_LAYERS": "first:1", "MAX_SKIPPED_STEPS": 5}
    unrolled = {"USE_REPEATED_LAYER": False, "CHECKPOINT_POLICY": "SAVE_NOTHING", **parts}
    run = experiment(0, **unrolled)
    plant(run, tmp_path, "ffn/ffn1", 3e38)
    # Nothing but skipped steps follow: the run gives up, and what was due at step 8 has not been saved.
    with pytest.raises(ValueError, match="step 10 is the last of 5 .* the checkpoint of step 5;"):
        run.train(str(tmp_path))
    assert [path.name for path in (tmp_path / "checkpoints").glob("c*")] == ["checkpoint_00000005"]
    spike = json.loads((tmp_path / "spikes" / "step_00000006" / "spike.json").read_text())
    assert spike["why"] == "its loss is nan" and spike["checkpoint"] == 5
    assert run.replay(str(tmp_path)) == 0
    assert (
        "first output that is not finite: stack/period_0/ffn/ffn1, layer 1 ("
        in capsys.readouterr().out
    )
    found = json.loads((tmp_path / "spikes" / "step_00000006" / "replay.json").read_text())
    assert found["same_loss"] is True
    bad = [row["non_finite"] > 0 for row in found["modules"]]
    names = [(row["name"], row["layer"]) for row in found["modules"]]
    assert bad.index(True) == names.index(("stack/period_0/ffn/ffn1", 1))
    # Gradients go bad from the loss back, and a step that is skipped moves nothing.
    assert found["parameters"][0]["non_finite"] > 0
    assert all(row["update"] in (None, 0.0) for row in found["parameters"])


def test_an_outlier_is_named_where_the_run_has_a_pipeline(tmp_path, capsys):
    stages = {"ICI_MESH_SHAPE": (2, 2, 1, 1), "NUM_STAGES": 2, "NUM_MICROBATCHES": 2}
    run = experiment(0, **stages, USE_REPEATED_LAYER=True, PERCORE_BATCH_SIZE=2)
    plant(run, tmp_path, "mixer/out", 1e4)
    assert run.replay(str(tmp_path), step=6) == 0
    assert (
        "first outlying output: stack/period_0/mixer/out, layer 1 (RMS" in capsys.readouterr().out
    )


def test_what_cannot_be_replayed_ends_in_one_line(odd, alone, tmp_path):
    directory, run = odd

    def refused(message, run=run, directory=directory, **options):
        with pytest.raises(ValueError, match=message) as error:
            run.replay(str(directory), **options)
        assert "\n" not in str(error.value)

    refused(
        "no spike is recorded in .*spikes: name the step with --replay_step", directory=tmp_path
    )
    refused("--replay_step=0 must be at least 1", step=0)
    refused("step 3 cannot be replayed: .* has no checkpoint of an earlier step", step=3)
    refused("recorded with SEED=1234, and here it is 5", dataclasses.replace(run, seed=5))
    bigger = dataclasses.replace(run, percore_batch_size=8)
    refused("recorded with 4 rows from row 68 on, and here it would have 8 from row 72 on", bigger)
    refused("the training data is not that of the checkpoint", experiment(17, MAX_STEPS=20))
    changed = experiment(18, MAX_STEPS=20, NUM_LAYERS=1)
    refused("is of another model or optimizer", changed)
    refused("has no training data", dataclasses.replace(run, train_data=None))


def row(name, layer=None, rms=1.0, non_finite=0.0, **ratios):
    return findings.Row(name, layer, rms, rms, non_finite, **ratios)


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ([row("a"), row("b")], ["all outputs are finite, and none stands out"]),
        (
            [row("a", 0, to_layers=3.0), row("b", 0, to_layers=11.0), row("b", 1, to_before=99.0)],
            ["first outlying output: b, layer 0 (RMS 1, 11 x other layers)"],
        ),
        (
            [row("a", to_before=20.0), row("b", 2, non_finite=0.5), row("c", non_finite=1.0)],
            [
                "first output that is not finite: b, layer 2 (50.000% of its numbers)",
                "first outlier before it: a (RMS 1, 20 x the step before)",
            ],
        ),
        (
            [row("b", non_finite=0.5), row("c", to_before=20.0)],
            ["first output that is not finite: b (50.000% of its numbers)"],
        ),
    ],
)
def test_the_verdict(modules, expected):
    found = findings.Result({"step": 3}, 2, {}, modules, [row("b/kernel")], True).verdict()
    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found, expected))


def test_a_parameter_that_is_not_finite_is_named():
    parameters = [
        findings.Row("b/kernel", 1, 0, 0, 0.25, value_non_finite=0.01),
        findings.Row("b/kernel", 0, 0, 0, 0.0, value_non_finite=0.0),
    ]
    modules = [row("b", 0), row("b", 1, non_finite=0.5)]
    assert findings.Result({"step": 3}, 2, {}, modules, parameters, True).verdict()[1:] == [
        "its parameter b/kernel, layer 1 is not finite itself (1.000%)",
        "first gradient that is not finite, from the loss back: b/kernel, layer 1",
    ]
