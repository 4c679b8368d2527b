"""The lock files: complete, hashed, of one mind, and without addresses."""

import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYTHONS = ("3.11.9", "3.12.9", "3.13.9")
EXTRAS = {
    "base": ("plot",),
    "test": ("plot", "test"),
    "parity": ("parity",),
    "gpu": ("plot", "gpu"),
    "plan": ("plan",),
}


@pytest.fixture(scope="module")
def project(root):
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


def locked(root, name, python):
    """Returns {package: version} of a lock for one version of Python on Linux."""
    environment = {
        "python_version": python.rpartition(".")[0],
        "python_full_version": python,
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
    }
    versions = {}
    for line in (root / "requirements" / f"{name}.txt").read_text().splitlines():
        if re.match(r"[A-Za-z0-9]", line):
            requirement = Requirement(line.removesuffix("\\"))
            if requirement.marker is None or requirement.marker.evaluate(environment):
                (specifier,) = requirement.specifier
                assert specifier.operator == "=="
                package = canonicalize_name(requirement.name)
                assert package not in versions, f"{package} is locked twice"
                versions[package] = specifier.version
    return versions


def test_no_lock_holds_an_address(root):
    locks = sorted((root / "requirements").iterdir())
    assert len(locks) > 5
    for lock in locks:
        text = lock.read_text()
        assert "://" not in text, lock.name
        assert not re.search(r"^\s*-", re.sub(r"^\s+--hash=", "", text, flags=re.M), flags=re.M)


def test_every_locked_package_has_a_hash(root):
    for lock in (root / "requirements").glob("*.txt"):
        for block in re.findall(r"^[A-Za-z0-9].*\n(?:[ \t].*\n)*", lock.read_text(), flags=re.M):
            assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), f"{lock.name}: {block}"


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", EXTRAS)
def test_lock_covers_the_project(root, project, name, python):
    versions = locked(root, name, python)
    wanted = list(project["dependencies"])
    for extra in EXTRAS[name]:
        wanted += project["optional-dependencies"][extra]
    for requirement in map(Requirement, wanted):
        if requirement.name == "torch":
            continue  # installed by version only: see scripts/setup_env.sh
        package = canonicalize_name(requirement.name)
        assert package in versions, f"{package} is not in {name}.txt: run scripts/lock.sh"
        assert requirement.specifier.contains(versions[package]), f"{requirement}: run lock.sh"


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", ["base", "parity", "gpu", "plan", "setup"])
def test_locks_agree_with_the_test_environment(root, name, python):
    tested, versions = locked(root, "test", python), locked(root, name, python)
    shared = tested.keys() & versions.keys()
    assert shared
    assert {key: versions[key] for key in shared} == {key: tested[key] for key in shared}


@pytest.mark.parametrize("python", PYTHONS)
def test_parity_lock_brings_neither_torch_nor_cuda(root, python):
    versions = locked(root, "parity", python)
    assert "transformers" in versions
    assert not [name for name in versions if name == "torch" or name.startswith("nvidia-")]


def test_setup_finds_the_version_of_torch(root, project):
    """setup_env.sh reads it from pyproject.toml with sed."""
    script = (root / "scripts/setup_env.sh").read_text()
    (expression,) = re.findall(r"sed -n '(.*)' pyproject\.toml", script)
    command = ["sed", "-n", expression, root / "pyproject.toml"]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert found == [item for item in project["optional-dependencies"]["parity"] if "torch" in item]


def test_what_is_installed_is_whole():
    """`setup_env.sh` installs the parity lock without its dependencies: the lock has to name all."""
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
