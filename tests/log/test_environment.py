"""The git revision of the code, and only of the code."""

import pathlib
import shutil
import subprocess

import pytest

from paxlike.log.environment import git_revision


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_revision(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def write(name, text):
        path = pathlib.Path(tmp_path / name)
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    assert git_revision(tmp_path) is None  # no repository
    git("init", "-q")
    write("code/a.py", "1")
    git("add", "code")
    assert git_revision(tmp_path / "code") is None  # no commit
    git("commit", "-q", "-m", "one")
    commit = git("rev-parse", "HEAD")
    assert git_revision(tmp_path / "code") == commit
    write("code/a.py", "2")
    assert git_revision(tmp_path / "code") == commit + "-dirty"
    write("installed/b.py", "1")
    assert git_revision(tmp_path / "installed") is None  # inside the repository, but not of it
