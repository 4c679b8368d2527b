"""Plans for chips that are not here, by the compilers of jax's plug-ins: `main.py --mode=plan` as it is typed."""

import importlib.metadata
import json
import os
import subprocess
import sys

import jax
import pytest
import runs


def installed(*names):
    """Whether one of these packages is there; of the GPU's only that of jax's own version serves."""
    for name in names:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if name == "libtpu" or version == jax.__version__:
            return True
    return False


KNOBS = {
    "NUM_LAYERS": 2,
    "NUM_HEADS": 4,
    "DIMS_PER_HEAD": 64,
    "MODEL_DIMS": 256,
    "HIDDEN_DIMS": 1024,
    "VOCAB_SIZE": 1024,
    "MAX_SEQ_LEN": 256,
    "PERCORE_BATCH_SIZE": 2,
    "USE_REPEATED_LAYER": True,
}


def plan(*given, expect=0, config="Synthetic126M", **knobs):
    """What `--mode=plan` prints for a small GPT, or another model."""
    overrides = [f"--fdl.{name}={value}" for name, value in {**KNOBS, **knobs}.items()]
    command = [sys.executable, "main.py", "--mode=plan", f"--fdl_config={config}"]
    environ = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [*command, *overrides, *given],
        cwd=runs.ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == expect, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.mark.skipif(
    not installed("jax-cuda13-plugin", "jax-cuda12-plugin"),
    reason="needs the GPU compiler: requirements/plan.txt",
)
@pytest.mark.parametrize("chip", ["h100", "a100"])
def test_gpu(chip, tmp_path):
    """Two nodes of eight: fsdp inside, data across, tensor inside."""
    done = plan(
        f"--chip={chip}",
        f"--job_log_dir={tmp_path}",
        ICI_MESH_SHAPE="[1,4,2]",
        DCN_MESH_SHAPE="[2,1,1]",
    )
    assert "2 node(s) of 8: data=2 fsdp=4 tensor=2" in done.stdout and "fits: " in done.stdout
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["attention"] == "cuDNN, fused" and found["memory"]["trusted"]
    across = {"x".join(c["axes"]): c["across_nodes"] for c in found["estimate"]["collectives"]}
    assert not across["fsdp"] and not across["tensor"]
    assert all(reaches == ("data" in axes) for axes, reaches in across.items())
    # All products are found: those of the model, and of the recomputed ones none here.
    executed = found["estimate"]["flops"] * found["num_devices"]
    assert executed == pytest.approx(found["flops"], rel=0.05)
    assert found["memory"]["peak"] > found["memory"]["parameters"] + found["memory"]["moments"]


@pytest.mark.skipif(not installed("libtpu"), reason="needs libtpu: pip install jax[tpu]")
def test_tpu():
    done = plan("--chip=v5e", ICI_MESH_SHAPE="[1,4,1]", DCN_MESH_SHAPE="[1,1,1]")
    assert "fsdp=4" in done.stdout and "fits: " in done.stdout
    assert "the time is a lower bound" in done.stdout
    assert "in the compiled program" not in done.stdout


def test_cpu_as_the_fallback_says_so_and_writes_nothing(tmp_path):
    done = plan(
        "--chip=cpu", ICI_MESH_SHAPE="[1,2,1]", DCN_MESH_SHAPE="[1,1,1]", FPROP_DTYPE="float32"
    )
    assert "Synthetic126M on 2 x cpu" in done.stdout
    assert "note: compiled for a CPU" in done.stdout and "not to be trusted" in done.stdout
    assert "compiling the training step for 2 x cpu" in done.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--chip=h10"], "did you mean h100?"),
        (["--chip=cpu", "--devices=3"], "there are 3; the nearest that fits"),
        (["--chip=cpu", "--plan_tokens=-1"], "--plan_tokens=-1.0 must be above 0"),
        (["--chip=cpu", "--search_compiles=3"], "no effect without --search"),
        (["--chip=cpu", "--multiprocess_gpu"], "no effect with --mode=plan"),
        (
            ["--chip=cpu", "--mode=train", "--job_log_dir=x"],
            "--chip has no effect with --mode=train",
        ),
    ],
)
def test_mistakes_end_in_one_line(given, message):
    done = plan(*given, expect=2, ICI_MESH_SHAPE="[1,2,1]", DCN_MESH_SHAPE="[1,1,1]")
    assert message in done.stderr and "Traceback" not in done.stderr
