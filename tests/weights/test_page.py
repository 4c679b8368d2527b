"""docs/weights.md: its commands and programs run as they stand, in their order."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.parity, pytest.mark.slow]


def commands(page: str) -> str:
    """A shell script of all blocks: Python by `python -`, and what stands behind `$ `, with its here-documents."""
    lines = []
    for kind, body in re.findall(r"```(\w*)\n(.*?)```", page, re.S):
        if kind == "python":
            lines += ["python - <<'PROGRAM'", body.rstrip(), "PROGRAM"]
        inside = False
        for line in body.splitlines() if not kind else []:
            if line.startswith("$ "):
                lines.append(line[2:])
                inside = "<<'END'" in line
            elif inside:
                lines.append(line)
                inside = line != "END"
    return "\n".join(lines)


def test_the_page(root, tmp_path):
    pytest.importorskip("transformers")
    script = commands((root / "docs" / "weights.md").read_text())
    assert script.count("scripts/convert.py") == 2 and script.count("PROGRAM") == 4
    (tmp_path / "scripts").symlink_to(root / "scripts")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    assert "runs/tiny: paxlike, float32\nruns/back: huggingface, bfloat16\n" in done.stdout
    assert done.stdout.endswith("model.safetensors.index.json\nTrue\n")
