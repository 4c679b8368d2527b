"""The suite of GPU rows: measured on a CPU at a toy size, resumed, and what is committed of it."""

import argparse
import json

import pytest
import runs

from scripts.benchmarks import suite, suite_row

TOY = {
    **runs.ONE_LAYER,
    "ICI_MESH_SHAPE": [1, 1, 1],
    "DCN_MESH_SHAPE": [1, 1, 1],
}


def options(folder, **changes) -> argparse.Namespace:
    """Of the command line."""
    given = {
        "rows": None,
        "minutes": 9.5,
        "wheelhouse": None,
        "plan_only": True,
        "output": folder,
        "smoke": True,
    }
    return argparse.Namespace(**{**given, **changes})


def test_a_row_is_measured(monkeypatch):
    monkeypatch.setattr(suite_row, "STEPS", 3)
    monkeypatch.setattr(suite_row, "SECONDS", 0.0)
    task = {"config": "configs.gpt.Synthetic126M", "knobs": TOY, "whole": 4, "layers": 1}
    found = suite_row._measured({**task, "plan": False, "smoke": True})
    assert (found["layers"], found["whole_layers"], found["rows"], found["tokens"]) == (1, 4, 2, 32)
    assert found["seconds"] > 0 and found["compile_seconds"] > 0
    # Embedding once, layers four times.
    of_layers = (found["whole_flops"] - found["flops"]) / 3
    assert found["flops"] - of_layers == 6 * 32 * 16 * 64
    assert found["attention"].startswith("reference")
    line = suite.table({"toy": {**found, "pax": (2.0, "x"), "plan_seconds": 1.0}}).splitlines()[-1]
    assert line.startswith("| toy | 1 of 4 | 2 |") and "not measured" not in line


@pytest.mark.parametrize("row", suite.ROWS, ids=lambda row: row.name)
def test_every_row_names_a_config_and_its_knobs(row):
    if row.needs:
        pytest.skip("the switches of Transformer Engine")
    experiment, knobs = suite_row.experiment_of({"config": row.config, "knobs": row.knobs}, None)
    assert experiment.train_data is not None
    assert row.layers in (None, knobs["NUM_LAYERS"])


def test_a_switch_without_its_backend_is_no_row(monkeypatch):
    monkeypatch.setattr("configs.cli.environment.VARIABLES", {"ENABLE_TE": (("NO_SUCH",), "0")})
    monkeypatch.setenv("ENABLE_TE", "1")
    with pytest.raises(ValueError, match="ENABLE_TE=1 has no effect"):
        suite_row.experiment_of({"config": "configs.gpt.Synthetic126M", "knobs": {}}, None)


def test_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    asked = []

    def measure(row, *_, **__):
        asked.append(row.name)
        if row.name == "5b fp8":
            return {"failed": "out of luck", "pax": None, "config": row.config}
        return {**PLANNED, "config": row.config}

    monkeypatch.setattr(suite, "measure", measure)
    assert suite.run(options(tmp_path, rows="5b")) == 1
    assert "5b fp8: out of luck" in capsys.readouterr().out
    asked.clear()
    assert suite.run(options(tmp_path)) == 1
    assert "5b fp8" in asked and "126m cudnn" in asked  # failed, or never begun
    assert "5b cudnn" not in asked and len(asked) == len(set(asked))
    kept = json.loads((tmp_path / "h100_plan.json").read_text())
    assert kept["measured"] is False and set(kept["rows"]) == {row.name for row in suite.ROWS}


def test_no_row_is_begun_when_the_time_is_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite, "_device", lambda environment: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(suite, "measure", lambda *_, **__: pytest.fail("begun"))
    suite.run(options(tmp_path, plan_only=False, minutes=-1.0))
    assert f"{len(suite.ROWS)} rows are left" in capsys.readouterr().out


def test_a_row_that_does_not_fit_is_measured_with_fewer_layers(monkeypatch):
    asked = []

    def answer(task, env):
        asked.append(task["layers"])
        if task["layers"] > 15:
            return {"failed": "JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory"}
        return {"seconds": 1.0, "layers": task["layers"]}

    monkeypatch.setattr(suite, "_in_a_process", answer)
    (row,) = (row for row in suite.ROWS if row.name == "5b cudnn")
    planned = {"layers": 16, "plan_seconds": 0.8, "plan_peak_bytes": 1}
    found = suite.measure(row, planned, {}, "NVIDIA H100 80GB HBM3")
    assert asked == [16, 15] and found["layers"] == 15 and "plan_seconds" not in found
    found = suite.measure(row, {**planned, "layers": 12}, {}, "NVIDIA H100 80GB HBM3")
    assert found["layers"] == 12 and found["plan_seconds"] == 0.8


def test_a_backend_that_was_not_planned_takes_the_fewest_layers_of_the_others():
    planned = json.loads(suite.PLANNED.read_text())["rows"]
    for row in suite.ROWS:
        known = suite._known(row, planned)
        assert known["layers"] == planned[row.name].get("layers", known["layers"])
        if row.name == "7b te fp8":
            fewest = min(planned[name]["layers"] for name in ("7b sft", "7b fp8"))
            assert known["layers"] == fewest < planned["7b lora"]["layers"]


def test_a_missing_backend_is_said(tmp_path):
    row = suite.Row("x", config="configs.gpt.Synthetic126M", knobs={}, needs=("no_such_module",))
    found = suite.measure(row, {}, {"PATH": ""}, None)
    assert found["skipped"] == "no_such_module is not installed"
    assert "no_such_module is not installed" in suite.table({"x": found})


def test_a_wheelhouse_without_wheels(tmp_path):
    with pytest.raises(SystemExit, match="there is no wheel in"):
        suite.run(options(None, wheelhouse=tmp_path))


def test_the_committed_plan_and_its_table(root):
    kept = json.loads(suite.PLANNED.read_text())
    assert kept["measured"] is False
    assert set(kept["rows"]) == {row.name for row in suite.ROWS}
    assert all("seconds" not in row for row in kept["rows"].values())
    assert suite.table(kept["rows"]) in (root / "docs" / "benchmarks.md").read_text()


PLANNED = {
    "layers": 1,
    "whole_layers": 1,
    "rows": 1,
    "tokens": 8,
    "flops": 10,
    "whole_flops": 10,
    "peak_flops": 1e12,
    "plan_seconds": 1.0,
    "plan_peak_bytes": 1 << 30,
    "compile_seconds": 1.0,
    "pax": None,
}
