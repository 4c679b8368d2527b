"""The order of the rooms: imports point down only, and each heavy library lives in one place."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "paxlike"

BESIDE = {"arguments", "nearest"}  # any room may import them: they need the standard library alone
# What each room may import of the others; `log`, `compat` and `scoped` stand beside the order and import none of it.
BELOW = {
    "compat": set(),
    "scoped": set(),
    "nearest": set(),
    "arguments": {"nearest"},
    "xla_flags": set(),
    "xla_bundles": {"xla_flags"},
    "log": {"compat"},
    "cluster": {"compat", "log"},
    "parallel": {"compat", "scoped"},
    "ops": {"parallel", "compat", "scoped"},
    "layers": {"ops", "parallel", "compat", "scoped"},
    "models": {"layers", "ops", "parallel", "compat"},
    "data": {"compat", "log"},
    "tasks": {"ops", "parallel", "compat", "log"},
    "checkpoint": {"cluster", "parallel", "compat", "log"},
    "weights": {"checkpoint", "cluster", "parallel", "compat", "log"},
    "train": {"checkpoint", "cluster", "evaluate", "ops", "parallel", "compat", "log"},
    "evaluate": {"checkpoint", "train", "parallel", "compat", "log"},
    "decode": {"checkpoint", "train", "ops", "parallel", "compat", "log", "data"},
    "plan": {"train", "ops", "parallel", "compat", "log"},
    "launch": set(),  # starts in no time: no jax
    "experiment": {
        "train",
        "evaluate",
        "decode",
        "checkpoint",
        "cluster",
        "data",
        "layers",  # what a base lacks that has adapters
        "ops",
        "plan",  # what a compiled step is made of
        "weights",
        "parallel",
        "compat",
        "log",
        "xla_flags",
    },
}
# Libraries and the only rooms that may import them.
ONLY_IN = {
    "fiddle": set(),
    "orbax": {"checkpoint"},
    "grain": {"data"},
    "tensorflow_datasets": {"data"},
    "sentencepiece": {"data"},
    "tokenizers": {"data"},
    "jinja2": {"data"},
    "tensorboardX": {"log"},
    "matplotlib": {"log", "plan"},
    "transformer_engine": {"ops"},
    "qwix": {"ops"},
    "tensorflow": set(),
    "configs": set(),
    "absl": set(),
}


def imports(path: pathlib.Path):
    """(module, line) of every import that runs; those for type checkers only do not count."""
    tree = ast.parse(path.read_text())
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped |= {id(child) for child in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "paxlike":
                for alias in node.names:
                    yield f"paxlike.{alias.name}", node.lineno
            else:
                yield node.module, node.lineno


FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: pathlib.Path) -> str:
    """`paxlike/layers/norm.py` -> `layers`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    here = room(path)
    if here == "__init__":
        return
    assert here in BELOW, f"a new room: say in {__name__} what {here} may import"
    for module, line in imports(path):
        parts = module.split(".")
        if parts[0] == "paxlike" and len(parts) > 1:
            assert parts[1] in {here, *BESIDE, *BELOW[here]}, f"{path}:{line} imports {module}"
        if parts[0] in ONLY_IN:
            assert here in ONLY_IN[parts[0]], f"{path}:{line} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_global_settings_of_jax_are_made_by_the_program(path):
    assert "jax.config.update" not in path.read_text(), (
        "only main.py and tests/conftest.py change jax.config"
    )
