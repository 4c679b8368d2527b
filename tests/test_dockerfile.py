"""The Dockerfile, read rather than built: what can be checked where there is no Docker engine."""

import fnmatch
import re
import shutil
import subprocess

import pytest


@pytest.fixture(scope="module")
def instructions(root):
    """(instruction, text) with continued lines joined and comments taken out."""
    lines = [
        line for line in (root / "Dockerfile").read_text().splitlines() if not line.startswith("#")
    ]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def test_hadolint_finds_nothing(root):
    program = shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed")
    # DL3008: Ubuntu takes the old version of a package away when there is a new one.
    words = [program, "--no-color", "--ignore=DL3008", root / "Dockerfile"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def stages(instructions):
    """name -> its instructions, in order."""
    found, name = {}, None
    for word, text in instructions:
        if word == "FROM":
            parts = text.split(" AS ")
            name = parts[1] if len(parts) > 1 else "final"
            found[name] = []
        if name is not None:
            found[name].append((word, text))
    return found


def test_every_stage_stands_on_a_pinned_image_or_a_stage_before_it(instructions):
    known = set()
    for word, text in instructions:
        if word != "FROM":
            continue
        base, *name = text.split(" AS ")
        assert base in known or base == "${VARIANT}" or re.fullmatch(r"[\w./-]+:[\w.-]+", base), (
            base
        )
        assert not base.endswith(":latest")
        known |= set(name)
    assert {"gpu", "cpu"} <= known
    assert ("ARG", "VARIANT=gpu") in instructions


def test_what_is_copied_exists_and_is_not_kept_out(root, instructions):
    ignore = [line for line in (root / ".dockerignore").read_text().split() if line]
    assert ignore[0] == "*"  # only what is named comes in: no run, cache, key or .git
    allowed = [line[1:] for line in ignore if line.startswith("!")]
    for entry in allowed:
        assert (root / entry).exists(), entry
    for word, text in instructions:
        if word == "COPY" and "--from" not in text:
            source = text.split()[0].rstrip("/")
            assert source == "." or any(fnmatch.fnmatch(source, entry) for entry in allowed), text
            assert (root / source).exists(), text


def test_every_list_of_packages_is_locked_by_hash(root, instructions):
    for word, text in instructions:
        if word != "RUN":
            continue
        for command in text.split("&&"):
            files = re.findall(r"-r (\S+)", command)
            if files:
                assert "--require-hashes" in command, command
            for file in files:
                locked = (root / file).read_text()
                assert "--hash=sha256:" in locked, file


def test_layers_are_small(instructions):
    for word, text in instructions:
        if word == "RUN" and "apt-get install" in text:
            assert "--no-install-recommends" in text and "rm -rf /var/lib/apt/lists" in text
            assert text.index("apt-get update") < text.index("apt-get install")
    for variable in ("PIP_NO_CACHE_DIR=1", "UV_NO_CACHE=1"):
        assert any(word == "ENV" and variable in text for word, text in instructions)


def test_the_compiler_stays_out_of_the_image_that_runs(instructions):
    parts = stages(instructions)
    assert "build-essential" in str(parts["transformer-engine"])
    for name in ("python", "cpu", "gpu", "final"):
        assert "build-essential" not in str(parts[name]), name


def test_it_runs_as_a_user_without_rights(instructions):
    users = [text for word, text in instructions if word == "USER"]
    assert users and users[-1] not in ("root", "0")
    after = instructions[[word for word, _ in instructions].index("USER") + 1 :]
    assert {word for word, _ in after} <= {"ENTRYPOINT", "CMD", "ENV", "WORKDIR"}


def test_nothing_secret_is_in_it(root, instructions):
    text = (root / "Dockerfile").read_text()
    assert not re.search(r"(?i)(api_?key|token|passw|secret)\s*=", text)
    assert not any(word == "ADD" for word, _ in instructions)  # it fetches what nobody checks


def test_the_gpu_variant_sets_nccl_and_the_driver(instructions):
    gpu = " ".join(text for word, text in stages(instructions)["gpu"] if word == "ENV")
    for name in ("NVIDIA_DRIVER_CAPABILITIES", "NCCL_NVLS_ENABLE", "CUDA_DEVICE_MAX_CONNECTIONS"):
        assert f"{name}=" in gpu
    assert "CUDA" not in str(stages(instructions)["cpu"])


def test_scripts_that_run_in_the_container_are_in_it(root, instructions):
    """The job files start scripts under /opt/paxlike."""
    assert ("WORKDIR", "/opt/paxlike") in stages(instructions)["python"]
    for script in root.glob("scripts/*.sub"):
        if "CONTAINER" in script.read_text():
            assert "/opt/paxlike" in script.read_text()
