"""What scripts/setup_env.sh says when it cannot go on.

That it can install is shown by these tests being run at all.
"""

import os
import subprocess


def setup_env(root, *arguments, **environment):
    return subprocess.run(
        [root / "scripts/setup_env.sh", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def refusal(run):
    """Returns the one line of a run that refused."""
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    return line


def interpreter(folder, version):
    """Writes something that answers as a Python of that version would."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\necho {version}\n")
    path.chmod(0o755)
    return str(path)


def test_refuses_a_python_too_old_or_too_new(root, tmp_path):
    for version in ("3.10.4", "3.14.0", "2.7.18"):
        python = interpreter(tmp_path, version)
        line = refusal(setup_env(root, PYTHON=python, VENV=str(tmp_path / "venv")))
        assert f"is Python {version}, but paxlike needs 3.11 to 3.13" in line
        assert not (tmp_path / "venv").exists()


def test_refuses_what_is_no_python(root, tmp_path):
    line = refusal(setup_env(root, PYTHON="no-such-python", VENV=str(tmp_path / "venv")))
    assert "'no-such-python' is no working Python" in line


def test_refuses_an_unknown_profile(root):
    assert "unknown profile 'tests': use 'run' or 'test'" in refusal(setup_env(root, "tests"))


def test_leaves_a_folder_that_is_no_environment_alone(root, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    line = refusal(setup_env(root, VENV=str(tmp_path)))
    assert "is no virtual environment" in line
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_says_in_one_line_that_there_is_no_network(root, tmp_path):
    nowhere = {
        "PIP_INDEX_URL": "file:///nowhere",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path),
    }
    run = setup_env(
        root, VENV=str(tmp_path / "venv"), NO_UV="1", PIP_CONFIG_FILE="/dev/null", **nowhere
    )
    assert run.returncode == 1
    assert "the first setup needs a network" in run.stderr.splitlines()[-1]
