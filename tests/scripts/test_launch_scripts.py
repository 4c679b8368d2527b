"""The launch scripts: what they hand to main.py, and how they end."""

import os
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

PILE = {
    "--fdl_config": "configs.gpt.Pile126M",
    "--tfds_data_dir": "/data",
    "--fdl.FPROP_DTYPE": "bfloat16",
    "--fdl.ICI_MESH_SHAPE": "[8,1,1]",
    "--fdl.DCN_MESH_SHAPE": "[1,1,1]",
    "--fdl.PERCORE_BATCH_SIZE": "4",
    "--job_log_dir": "test_logdir",
}
SLURM = {"SLURM_NTASKS": "16", "SLURM_PROCID": "3", "SLURM_JOB_NUM_NODES": "2"}
SLURM |= {"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1", "SERVER_PORT": "12345"}

# Stands for main.py where only the way a script ends is looked at.
PROGRAM = """
import os, signal, sys, time
def stop(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it comes twice: to the group, and handed on
    print("saved", flush=True)
    sys.exit(83)
signal.signal(signal.SIGTERM, stop)
print("started", *sys.argv[1:], flush=True)
if "--fail" in sys.argv or f"--host_idx={os.environ.get('FAIL')}" in sys.argv:
    sys.exit(5)
if "--wait" in sys.argv:
    time.sleep(60)
"""


def start(script, *arguments, environment=(), **options):
    inherited = {key: value for key, value in os.environ.items() if "SLURM" not in key}
    for name in ("XLA_FLAGS", "BASE_XLA_FLAGS", "VOCAB_PATH", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        inherited.pop(name, None)
    return subprocess.Popen(
        ["bash", script, *arguments],
        env=inherited | {"PYTHON": sys.executable} | dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def run(script, *arguments, environment=(), **options):
    process = start(script, *arguments, environment=environment, **options)
    process.stdout_text, process.stderr_text = process.communicate(timeout=60)
    return process


def dry_run(script, *arguments, environment=()):
    """Returns the flags for main.py, the environment and the log of a script."""
    process = run(script, *arguments, environment=dict(environment) | {"DRY_RUN": "1"})
    assert process.returncode == 0, process.stderr_text
    *variables, command, log = process.stdout_text.splitlines()
    _, main, *flags = shlex.split(command)
    assert main.endswith("main.py")
    named = dict(flag.split("=", 1) if "=" in flag else (flag, "") for flag in flags)
    return named, dict(shlex.split(line)[0].split("=", 1) for line in variables), log


def test_all_scripts_are_bash(root):
    scripts = [*root.glob("scripts/**/*.sh"), *root.glob("scripts/*.sub"), root / ".ci/run"]
    assert len(scripts) > 8
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
        assert os.access(script, os.X_OK) or script.parent.name == "lib"


@pytest.mark.parametrize(
    "name",
    [
        "lock",
        "quickstart",
        "run_base_config_multinode",
        "run_lambada_singlenode",
        "run_llama_boolq",
        "run_multiprocess_local",
        "run_pile_multinode",
        "run_pile_singlenode",
        "run_stage",
        "setup_env",
        "slurm_loopback",
        "test",
    ],
)
def test_help_names_the_script_and_its_arguments(root, name):
    process = run(root / f"scripts/{name}.sh", "--help")
    assert process.returncode == 0
    assert f"{name}.sh" in process.stdout_text
    assert "set -euo" not in process.stdout_text


def test_pile_singlenode_defaults(root):
    flags, variables, log = dry_run(root / "scripts/run_pile_singlenode.sh", "/data", "/vocab")
    assert flags == PILE
    assert variables["VOCAB_PATH"] == "/vocab"
    assert log == "log: test_logdir/pile_output.log"


def test_pile_singlenode_arguments_in_the_order_of_pax(root):
    arguments = ["/data", "/vocab", "float32", "4", "0.5", "/logs/a b", "--fdl.MAX_STEPS=7"]
    flags, _, log = dry_run(root / "scripts/run_pile_singlenode.sh", *arguments)
    assert flags == PILE | {
        "--fdl.FPROP_DTYPE": "float32",
        "--fdl.ICI_MESH_SHAPE": "[4,1,1]",
        "--fdl.PERCORE_BATCH_SIZE": "0.5",
        "--job_log_dir": "/logs/a b",
        "--fdl.MAX_STEPS": "7",
    }
    assert log == "log: /logs/a b/pile_output.log"


def test_pile_multinode_takes_mesh_and_processes_from_slurm(root):
    script = root / "scripts/run_pile_multinode.sh"
    flags, variables, log = dry_run(script, "/data", "/vocab", environment=SLURM)
    assert flags == PILE | {
        "--fdl.DCN_MESH_SHAPE": "[2,1,1]",
        "--multiprocess_gpu": "",
        "--server_addr": "10.0.0.1:12345",
        "--num_hosts": "16",
        "--host_idx": "3",
    }
    assert variables["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.85"
    assert log == "log: test_logdir/pile_output-3.log"


def test_lambada_evaluates_the_run_in_its_log_dir(root):
    arguments = ["/data", "/vocab", "", "", "", "/run"]
    flags, _, log = dry_run(root / "scripts/run_lambada_singlenode.sh", *arguments)
    assert flags == PILE | {
        "--fdl_config": "configs.gpt.Lambada126M",
        "--mode": "eval",
        "--job_log_dir": "/run",
    }
    assert log == "log: /run/lambada_output.log"


def test_base_config_needs_no_vocabulary_and_splits_the_additional_arguments(root):
    more = "--fdl.NUM_LAYERS=2 --fdl.ICI_MESH_SHAPE=[1,8,1]"
    script = root / "scripts/run_base_config_multinode.sh"
    arguments = ["Synthetic126M", "", "", "/run", "", "", more]
    flags, variables, _ = dry_run(script, *arguments, environment=SLURM)
    assert flags == {
        "--fdl_config": "Synthetic126M",
        "--job_log_dir": "/run",
        "--fdl.FPROP_DTYPE": "bfloat16",
        "--multiprocess_gpu": "",
        "--server_addr": "10.0.0.1:12345",
        "--num_hosts": "16",
        "--host_idx": "3",
        "--fdl.NUM_LAYERS": "2",
        "--fdl.ICI_MESH_SHAPE": "[1,8,1]",
    }
    assert "VOCAB_PATH" not in variables
    assert variables["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.9"


def test_base_config_leaves_the_address_to_jax_where_slurm_names_none(root):
    environment = SLURM | {"SLURM_LAUNCH_NODE_IPADDR": ""}
    script = root / "scripts/run_base_config_multinode.sh"
    flags, *_ = dry_run(script, "Synthetic126M", "", "", "/run", environment=environment)
    assert "--multiprocess_gpu" in flags
    assert "--server_addr" not in flags


BOOLQ = {"VOCAB_PATH": "/vocab", "TFDS_DATA_DIR": "/data", "CHECKPOINT_RESTORE_PATH": "/weights"}


def boolq_commands(root, **environment):
    """The flags of each command that run_llama_boolq.sh would run."""
    process = run(
        root / "scripts/run_llama_boolq.sh",
        environment=BOOLQ | {"LOG_DIR": "/logs", "DRY_RUN": "1"} | environment,
    )
    assert process.returncode == 0, process.stderr_text
    lines = [line for line in process.stdout_text.splitlines() if "main.py" in line]
    flags = [dict(word.split("=", 1) for word in shlex.split(line)[2:]) for line in lines]
    return [{name.removeprefix("--fdl."): value for name, value in each.items()} for each in flags]


def test_llama_boolq_trains_with_the_numbers_of_pax_and_evaluates(root):
    train, evaluate = boolq_commands(root)
    assert (train["--mode"], evaluate["--mode"]) == ("train", "eval")
    assert train["--job_log_dir"] == evaluate["--job_log_dir"] == "/logs/llama-LLaMA7B-mbs-2-lora-0"
    expected = {
        "--fdl_config": "LLaMA7B",
        "CHECKPOINT_RESTORE_PATH": "/weights",
        "MAX_STEPS": "1000",
    }
    expected |= {"LEARNING_RATE": "1e-6", "LR_COS_WARMUP": "500", "LR_COS_DECAY_END": "1000"}
    assert expected.items() <= train.items()
    assert not {"USE_LORA", "ICI_MESH_SHAPE", "--checkpoint"} & train.keys()


def test_llama_boolq_with_adapters(root):
    train, evaluate = boolq_commands(
        root, USE_LORA="1", CONFIG="LLaMA70B", ICI_MESH_SHAPE="[1,8,1]", LORA_TARGET_LAYERS="mlp"
    )
    expected = {"USE_LORA": "True", "LORA_RANK": "32", "LORA_TARGET_LAYERS": "mlp"}
    expected |= {"LEARNING_RATE": "1e-4", "LR_SCHEDULE": "constant", "MAX_STEPS": "600"}
    expected |= {"--fdl_config": "LLaMA70B", "ICI_MESH_SHAPE": "[1,8,1]"}
    assert expected.items() <= train.items()
    assert expected.items() <= evaluate.items()


def test_llama_boolq_evaluates_weights_as_they_are(root):
    (evaluate,) = boolq_commands(root, EVAL_ONLY="1")
    assert evaluate["--mode"] == "eval" and evaluate["--checkpoint"] == "/weights"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"VOCAB_PATH": ""}, "set VOCAB_PATH"),
        ({"CHECKPOINT_RESTORE_PATH": ""}, "set CHECKPOINT_RESTORE_PATH"),
        ({"USE_LORA": "True"}, "USE_LORA=True: it must be 0 or 1"),
        ({"USE_MULTIPROCESS": "1"}, "set LOG_DIR to a folder that all processes see"),
    ],
)
def test_llama_boolq_says_what_is_wrong_in_one_line(root, environment, message):
    process = run(root / "scripts/run_llama_boolq.sh", environment=BOOLQ | environment)
    assert process.returncode == 2
    (line,) = process.stderr_text.splitlines()
    assert message in line


def test_xla_flags_are_added_to_the_base_flags(root):
    script, arguments = root / "scripts/run_pile_singlenode.sh", ("/data", "/vocab")
    _, variables, _ = dry_run(script, *arguments, environment={"XLA_FLAGS": "--xla_mine=1"})
    assert "--xla_gpu_enable_triton_gemm=false" in variables["XLA_FLAGS"]
    assert variables["XLA_FLAGS"].endswith(" --xla_mine=1")
    environment = {"XLA_FLAGS": "--xla_mine=1", "BASE_XLA_FLAGS": "--xla_base=2"}
    _, variables, _ = dry_run(script, *arguments, environment=environment)
    assert variables["XLA_FLAGS"] == "--xla_base=2 --xla_mine=1"


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("run_pile_singlenode", ["/data"], "needs TFDS_DATA_DIR and VOCAB_PATH"),
        ("run_pile_multinode", ["/data", "/vocab"], "SLURM_NTASKS and SLURM_PROCID are not set"),
        ("run_lambada_singlenode", ["/data", "/vocab", "", "", "4"], "as the sixth, LOG_DIR"),
        ("run_base_config_multinode", ["Synthetic126M"], "as the fourth, LOG_DIR"),
        ("run_multiprocess_local", ["two"], "needs the number of processes first, not 'two'"),
    ],
)
def test_missing_arguments_end_in_one_line(root, script, arguments, message):
    process = run(root / f"scripts/{script}.sh", *arguments)
    assert process.returncode == 2
    assert process.stdout_text == ""
    (line,) = process.stderr_text.splitlines()
    assert message in line


def test_unknown_xla_flag_ends_in_one_line_before_anything_starts(root, tmp_path):
    process = run(
        root / "scripts/run_pile_singlenode.sh",
        *("/data", "/vocab", "", "", "", str(tmp_path / "logs")),
        environment={"XLA_FLAGS": "--xla_gpu_enable_triton_gem=false"},
    )
    assert process.returncode == 2
    (line,) = process.stderr_text.splitlines()
    assert "did you mean --xla_gpu_enable_triton_gemm?" in line
    assert not (tmp_path / "logs").exists()


@pytest.fixture
def copied(root, tmp_path):
    """The scripts beside a main.py that does what its arguments say."""
    shutil.copytree(root / "scripts", tmp_path / "scripts")
    (tmp_path / "paxlike").symlink_to(root / "paxlike")
    (tmp_path / "main.py").write_text(PROGRAM)
    return tmp_path


def pile(copied, *more):
    arguments = ["/data", "/vocab", "", "", "", str(copied / "logs"), *more]
    return copied / "scripts/run_pile_singlenode.sh", arguments


def test_status_of_main_comes_through_the_log(copied):
    script, arguments = pile(copied)
    process = run(script, *arguments)
    assert process.returncode == 0
    assert process.stdout_text.endswith("Pile126M: success\n")

    process = run(script, *arguments, "--fail")
    assert process.returncode == 5
    assert "FAILED with status 5" in process.stderr_text
    assert (copied / "logs/pile_output.log").read_text().count("started") == 2  # appended


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_main_save_and_loses_no_output(copied, number):
    script, arguments = pile(copied, "--wait")
    process = start(script, *arguments, start_new_session=True)
    assert process.stdout.readline().startswith("started")
    os.killpg(process.pid, number)  # as a terminal or Slurm sends it: to all of the step
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 83
    assert "goes on from there" in errors
    assert "saved" in (copied / "logs/pile_output.log").read_text()


def test_log_folder_that_cannot_be_written_is_named(copied):
    (copied / "logs").write_text("a file")
    script, arguments = pile(copied)
    process = run(script, *arguments)
    assert process.returncode == 2
    assert "cannot write" in process.stderr_text.splitlines()[-1]


def test_local_processes_get_one_address_and_their_numbers(copied):
    script = copied / "scripts/run_multiprocess_local.sh"
    process = run(script, "3", "--fdl_config=X", environment={"SERVER_PORT": "23456"})
    assert process.returncode == 0
    assert sorted(process.stdout_text.splitlines()) == [
        f"[{idx}] started --fdl_config=X --multiprocess_gpu --server_addr=127.0.0.1:23456"
        f" --num_hosts=3 --host_idx={idx}"
        for idx in range(3)
    ]


def test_local_processes_end_together_with_the_status_of_the_first_that_fails(copied):
    script = copied / "scripts/run_multiprocess_local.sh"
    process = run(script, "3", "--wait", environment={"FAIL": "1"})
    assert process.returncode == 5
    assert sorted(line for line in process.stdout_text.splitlines() if "saved" in line) == [
        "[0] saved",
        "[2] saved",
    ]


def test_local_processes_all_hear_a_signal(copied):
    process = start(copied / "scripts/run_multiprocess_local.sh", "2", "--wait")
    for _ in range(2):
        assert "started" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 83
    assert output.count("saved") == 2


JOB_FILES = {
    "launch_base_script": {"CONFIG": "Pile126M"},
    "example_slurm_pile": {},
    "example_slurm_llama": {"BASE_CHECKPOINT_RESTORE_PATH": "/weights of mine"},
}


@pytest.mark.parametrize("name", JOB_FILES)
@pytest.mark.parametrize("container", [None, "registry/paxlike:1 $(touch owned)"])
def test_job_files_hand_their_variables_to_srun(root, tmp_path, name, container):
    """With a stand-in for srun that writes down its arguments."""
    program = tmp_path / "srun"
    program.write_text(f"#!/bin/bash\nprintf '%s\\0' \"$@\" > '{tmp_path}/call'\n")
    program.chmod(0o755)
    workspace = tmp_path / "it's a workspace"
    workspace.mkdir()
    variables = {
        "BASE_WORKSPACE_DIR": str(workspace),
        "BASE_TFDS_DATA_DIR": "/data; touch owned",
        "BASE_VOCAB_PATH": '/"vocab"',
        "LOG_DIR_LOCAL": "run one",
        "ADDITIONAL_ARGS": "--fdl.NAME=$(touch owned) --fdl.A=1",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_SUBMIT_DIR": str(root),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        **JOB_FILES[name],
    }
    if container is not None:
        variables["CONTAINER"] = container
    process = run(root / f"scripts/{name}.sub", environment=variables, cwd=tmp_path)
    assert process.returncode == 0, process.stderr_text
    call = (tmp_path / "call").read_text().split("\0")[:-1]
    code = "/opt/paxlike" if container else str(root)
    script = call.index("bash")
    assert call[script + 1].startswith(f"{code}/scripts/run_")
    assert "--kill-on-bad-exit=0" in call and "--wait=30" in call
    if container:
        assert f"--container-image={container}" in call
        mounts = next(word for word in call if word.startswith("--container-mounts="))
        assert f"{workspace}:{workspace}" in mounts and "/data; touch owned:/mnt/datasets" in mounts
    else:
        assert not any("container" in word for word in call[:script])
    if name != "example_slurm_llama":
        assert f"{workspace}/run one" in call[script:]
        assert ("/mnt/datasets" if container else "/data; touch owned") in call[script:]
    if name != "launch_base_script":
        assert call[-3:] == ["--fdl.NAME=$(touch", "owned)", "--fdl.A=1"]
    assert not list(tmp_path.rglob("owned"))


@pytest.mark.parametrize("name", ["example_slurm_pile", "example_slurm_llama"])
def test_job_files_name_what_is_missing(root, name):
    variables = {"SLURM_SUBMIT_DIR": str(root), "SLURM_JOB_ID": "7"}
    process = run(root / f"scripts/{name}.sub", environment=variables)
    assert process.returncode == 2
    assert "job 7: set BASE_TFDS_DATA_DIR" in process.stderr_text
    assert process.stderr_text.count("\n") == 1


def test_a_stage_that_is_done_is_left_out(copied):
    script, run_dir = copied / "scripts/run_stage.sh", copied / "it's a run"
    command = [script, "train", "key1", run_dir, "main.py", "--fdl_config=X"]
    first = run(*command)
    assert first.returncode == 0, first.stderr_text
    assert "started --fdl_config=X" in first.stdout_text
    assert (run_dir / "stages/train.done").read_text() == "key1"
    again = run(*command)
    assert again.returncode == 0 and again.stdout_text.startswith("train: done before")
    failed = run(script, "train", "key2", run_dir, "main.py", "--fail")
    assert failed.returncode == 5 and (run_dir / "stages/train.done").read_text() == "key1"
