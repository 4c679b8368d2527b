"""The benchmark runs, writes what it says, and compares steps that do the same thing."""

import json
import re
import subprocess
import sys
from collections import Counter

import jax
import numpy as np
import pytest
from collectives import collectives

from scripts import benchmark
from scripts.benchmarks import bare_jax, paxlike_step
from scripts.benchmarks.shapes import SHAPES

SMOKE = SHAPES["smoke"]


@pytest.mark.parametrize("mesh_shape", [(1, 1, 1), (1, 4, 1), (1, 2, 2)])
def test_the_bare_step_is_the_step_of_paxlike(mesh_shape):
    """Losses, accuracy and norms of three steps from the same parameters; as many collectives and elements in them."""
    (ours, our_step), (bare, bare_step) = (_run(m, mesh_shape) for m in (paxlike_step, bare_jax))
    np.testing.assert_allclose(ours, bare, rtol=2e-5)
    our_traffic, bare_traffic = _traffic(our_step), _traffic(bare_step)
    assert our_traffic.keys() == bare_traffic.keys()
    for kind, (number, elements) in our_traffic.items():
        assert number <= bare_traffic[kind][0], kind
        assert elements == pytest.approx(bare_traffic[kind][1], rel=0.1), kind
    assert _products(our_step) == _products(bare_step)  # none transposed


def test_the_bare_step_is_the_same_scanned_with_remat():
    plain, _ = _run(bare_jax, (1, 1, 1))
    scanned, _ = _run(bare_jax, (1, 1, 1), scan=True, remat=True)
    np.testing.assert_allclose(plain, scanned, rtol=1e-5)


@pytest.mark.slow
def test_parts_write_json(tmp_path, root):
    command = [
        sys.executable,
        "scripts/benchmark.py",
        "--smoke",
        "--parts=step,data",
        f"--output={tmp_path}",
    ]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "step.json").read_text())
    assert record["command"].startswith("python scripts/benchmark.py --smoke")
    sides = record["result"]["smoke"]["sides"]
    assert list(sides) == ["paxlike", "bare"]
    assert sides["paxlike"]["loss"] == pytest.approx(sides["bare"]["loss"], rel=1e-5)
    assert len(sides["paxlike"]["rounds"]) == 2
    assert sides["paxlike"]["first_over_this"] == 1.0
    for name, side in sides.items():
        assert name in done.stdout
        assert side["tokens_per_second"] == pytest.approx(SMOKE.tokens / side["median_seconds"])
    packed = json.loads((tmp_path / "data.json").read_text())["result"]["packed"]
    assert packed["tokens_per_second"] > 0


def test_an_unknown_part(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--parts=step,steep"])
    assert "--parts: steep is none of step, mesh" in capsys.readouterr().err


def test_a_python_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--torch-python=/no/python"])
    assert "--torch-python: there is no /no/python" in capsys.readouterr().err


def _run(module, mesh_shape, **options):
    with jax.numpy_rank_promotion("allow"):  # the bare step is as terse as it can be
        step, state, data = module.make(SMOKE, mesh_shape=mesh_shape, **options)
    rows = []
    for batch in data[:3]:
        state, metrics = jax.block_until_ready(step(state, batch))
        plain = {k: getattr(v, "value", lambda v=v: v)() for k, v in metrics.items()}
        rows.append([float(plain[k]) for k in ("loss", "accuracy", "grad_norm", "param_norm")])
    return rows, step


def _products(step):
    """Shapes of the results of matrix products -> how many there are."""
    return Counter(re.findall(r"= (\w+\[[\d,]*\])\S* dot\(", step.as_text()))


def _traffic(step):
    """kind -> number of collectives and elements of their results."""
    return {
        kind: (len(found), sum(sum(one.sizes) for one in found))
        for kind, found in collectives(step).items()
    }
