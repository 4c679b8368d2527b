"""The documentation names only what exists: knobs, flags, configs, modules, files, remat policies."""

import importlib.util
import pathlib
import re

import pytest
from absl import flags as absl_flags

import main  # noqa: F401  (defines the flags)
from configs.cli.environment import VARIABLES
from configs.cli.registry import scan
from configs.cli.request import FLAGS
from configs.knobs import knobs
from paxlike.layers.remat import REMAT_POLICIES

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Upper-case words of the text with an underscore that are no knobs.
OTHER_NAMES = {
    "SLURM_JOB_END_TIME",
    "JAX_NUM_CPU_DEVICES",
    "OMP_NUM_THREADS",
    "JAX_PLATFORMS",
    "JAX_COMPILATION_CACHE_DIR",
    "XLA_FLAGS",
    "NCCL_ALGO",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO",
    "DRY_RUN",
    "NORMS_AND_BIASES",  # a regular expression in configs/optimization.py
    "NUM_REGISTERS",  # of an example of how to declare a knob
    "NUM_LAYRS",  # misspelt on purpose
    "NUM_LAYRES",
    "SAVE_ALL",
    "GLIBC_TUNABLES",
    "PYTHON_WITH_TORCH",  # stands for an interpreter
    # of Slurm, Kubernetes, NCCL, jax, and of the job files
    *(
        "SLURM_CONF",
        "SLURM_JOB_END_TIME",
        "JOB_COMPLETION_INDEX",
        "NCCL_DEBUG",
        "NCCL_SOCKET_IFNAME",
    ),
    *("JAX_PROCESS_ID", "JAX_NUM_PROCESSES", "JAX_COORDINATOR_ADDRESS", "SERVER_PORT", "TASK_WAIT"),
    *("LOG_DIR_LOCAL", "ADDITIONAL_ARGS", "OUTPUT_DIR", "MAX_RESTARTS", "BASE_TFDS_DATA_DIR"),
    *("BASE_VOCAB_PATH", "BASE_CHECKPOINT_RESTORE_PATH"),
}
# Flags of programs other than main.py, by the program.
OTHER_FLAGS = {
    "paxlike": {"input", "vocab_size", "output", "tfds", "split", "data_dir", "tokenizer"}
    | {"cache_dir", "workers", "text_key", "labels", "x", "reference", "title", "num", "seq_len"}
    | {"template", "max_characters", "max_megabytes"},
    "scripts": {"source", "data_dir", "output", "parts", "shapes", "rounds", "steps", "torch"}
    | {"to", "dtype", "max_shard_size", "use", "suite", "wheelhouse", "rows", "check", "minutes"}
    | {"warmup", "plan"},
    "XLA": {"xla_dump_to", "xla_dump_hlo_as_text", "xla_gpu_enable_dynamic_slice_fusion"}
    | {"xla_gpu_deterministic_ops", "xla_gpu_enable_latency_hiding_scheduler"}
    | {"xla_gpu_enable_triton_gemm", "xla_gpu_pgle_profile_file_or_directory_path"},
    "launch": {
        "nodes",
        "gpus_per_node",
        "processes_per_node",
        "partition",
        "account",
        "time",
        "where",
    }
    | {"stages", "prepare", "export", "eval_config", "chain", "container", "env", "dry_run"}
    | {"request_gpus", "sbatch", "mount", "max_restarts"},
    "Slurm": {"ntasks", "gpus", "gres", "signal", "start", "constraint", "kill", "install"},
    "absl": {"flagfile", "nomultiprocess_gpu"},
    "Pax": {"exp"},
}
# Files that a reader or a run makes, and what a reader is told to replace.
MADE = re.compile(r"mine/|runs/|checkpoints/|configs/fiddlers\.py|\.venv/|decoder_out/|eval_out/")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


@pytest.fixture(scope="module")
def configs():
    entries, broken = scan("configs")
    assert not broken
    return {name: entry.config_class for entry in entries for name in entry.names}


@pages
def test_knobs_exist(page, configs):
    known = {knob.name for cls in configs.values() for knob in knobs(cls)}
    known |= OTHER_NAMES | VARIABLES.keys() | REMAT_POLICIES.keys()
    words = set(re.findall(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b(?!\*|_)", page.read_text()))
    assert words - known == set()


@pages
def test_upper_case_overrides_are_knobs(page, configs):
    known = {knob.name for cls in configs.values() for knob in knobs(cls)} | OTHER_NAMES
    given = re.findall(r"--fdl\.([A-Z]\w*)", page.read_text())
    assert set(given) - known - {"NAME", "KNOB"} == set()


@pages
def test_flags_exist(page):
    known = set(absl_flags.FLAGS) | {name for name in FLAGS if "." not in name} | {"help"}
    known = known.union(*OTHER_FLAGS.values())
    given = re.findall(r"(?<![\w-])--([a-z]\w*)", page.read_text())
    assert set(given) - known - {"fdl"} == set()


@pages
def test_configs_exist(page, configs):
    named = re.findall(r"--fdl_config=(?:configs\.gpt\.)?(\w+)(?![\w.])", page.read_text())
    assert set(named) - configs.keys() - {"NAME"} == set()


@pages
def test_modules_and_files_exist(page):
    text = page.read_text()
    for module in re.findall(r"python -m (paxlike[\w.]*\w)", text):
        assert importlib.util.find_spec(module), module
    for module in re.findall(r"^(?:>>> )?from ((?:paxlike|configs)[\w.]*) import", text, re.M):
        assert importlib.util.find_spec(module), module
    paths = re.findall(r"(?<![\w/.=])((?:[\w.]+/)+[\w.*]*)", text)
    for path in paths:
        if path.split("/")[0] in ("paxlike", "configs", "scripts", "tests", "requirements", ".ci"):
            assert MADE.match(path) or list(ROOT.glob(path.rstrip(".") or ".")), path


@pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_all_policies_are_documented():
    text = (ROOT / "docs" / "training.md").read_text()
    assert [name for name in REMAT_POLICIES if f"`{name}`" not in text] == []
