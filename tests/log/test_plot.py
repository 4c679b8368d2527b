"""The picture of the loss curves."""

import json
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib import image

from paxlike.log import plot


def write_run(folder, *, num_steps=50, tokens=True, loss=5.0):
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, num_steps + 1):
            line = {"step": step, "split": "train", "loss": loss - step / num_steps}
            file.write(json.dumps(line | ({"tokens": 1000 * step} if tokens else {})) + "\n")
            if step % 10 == 0:
                file.write(json.dumps({"step": step, "split": "heldout", "loss": loss}) + "\n")
    return folder


def fraction_near(path, color):
    """The share of pixels that are near an RGB colour."""
    pixels = image.imread(path)[..., :3]
    return np.mean(np.abs(pixels - np.array(color)).max(axis=-1) < 0.1)


def test_one_run_shows_its_curve_its_points_and_the_reference(tmp_path):
    run = write_run(tmp_path / "run")
    picture = plot.plot_losses(
        run, tmp_path / "new" / "a.png", title="Run", reference={"unigram": 6.0}
    )
    blue, orange = (0.0, 0.447, 0.698), (0.835, 0.369, 0.0)
    assert fraction_near(picture, blue) > 1e-3
    assert fraction_near(picture, orange) > 2e-4
    without = plot.plot_losses(run, tmp_path / "b.png", title="Run")
    gray = (0.35, 0.35, 0.35)
    assert fraction_near(picture, gray) > fraction_near(without, gray) + 5e-4
    height, width, _ = image.imread(picture).shape
    assert width >= 1200
    assert height >= 700


def test_command_overlays_runs(tmp_path):
    runs = [write_run(tmp_path / name, loss=loss) for name, loss in (("a", 5.0), ("b", 4.0))]
    output = tmp_path / "out.png"
    command = [sys.executable, "-m", "paxlike.log.plot", *map(str, runs), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(output)
    for color in ((0.0, 0.447, 0.698), (0.835, 0.369, 0.0)):
        assert fraction_near(output, color) > 1e-3


def test_runs_without_tokens_are_drawn_over_steps(tmp_path):
    run = write_run(tmp_path / "run", tokens=False, num_steps=3)
    assert plot.plot_losses(run / "metrics.jsonl", tmp_path / "a.png").is_file()


def test_smoothing_keeps_lines_and_ends():
    line = np.linspace(5.0, 1.0, 400)
    smooth = plot._smoothed(line)
    np.testing.assert_allclose(smooth[:390], line[:390], atol=1e-9)
    assert plot._smoothed(np.array([3.0])) == [3.0]
    noise = np.random.default_rng(0).normal(size=4000)
    assert plot._smoothed(noise)[100:].std() < 0.2
    assert abs(plot._smoothed(noise)[-1]) < 0.5


def test_errors_are_one_line(tmp_path, capsys):
    assert plot.main([str(tmp_path / "nothing")]) == 1
    assert capsys.readouterr().err.startswith("error: no metrics at ")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text('{"event": "environment"}\n')
    assert plot.main([str(tmp_path / "empty")]) == 1
    assert "nothing to draw: no loss was logged in" in capsys.readouterr().err
    run = str(write_run(tmp_path / "run"))
    assert plot.main([run, "--reference", "entropy=high"]) == 1
    assert "--reference 'entropy=high' is not NAME=LOSS" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plot.main([run, "--labels", "a", "b"])
    assert "2 labels for 1 runs" in capsys.readouterr().err
    with pytest.raises(ValueError, match="x must be 'tokens' or 'steps', not 'epochs'"):
        plot.plot_losses(run, tmp_path / "a.png", x="epochs")


def test_without_matplotlib_the_remedy_is_named(tmp_path, monkeypatch, capsys):
    run = str(write_run(tmp_path / "run"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot.main([run, "-o", str(tmp_path / "a.png")]) == 1
    assert capsys.readouterr().err == (
        "error: drawing needs matplotlib, which is not installed: pip install 'paxlike[plot]'\n"
    )
