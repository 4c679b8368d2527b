"""What a run ran on: versions, devices, command line, revision; enough to repeat or to doubt it."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import socket
import subprocess
import sys
from typing import Any

import jax

_PACKAGES = ("paxlike", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")


def describe_environment() -> dict[str, Any]:
    """Versions, devices, processes, host, command line, XLA flags and the git revision."""
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "platform": device.platform,
        "device_kind": device.device_kind,
        "num_devices": jax.device_count(),
        "num_local_devices": jax.local_device_count(),
        "num_processes": jax.process_count(),
        "hostname": socket.gethostname(),
        "cpu_count": os.cpu_count(),
        "command_line": sys.argv,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "jax_optimization_level": str(jax.config.jax_optimization_level),  # type: ignore[attr-defined]
        "git_revision": git_revision(pathlib.Path(__file__).resolve().parent),
    }


def git_revision(folder: str | os.PathLike) -> str | None:
    """The commit of the repository that tracks `folder`, or None; "-dirty" when it is changed."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return result.stdout.strip()

    try:
        # An installed package may lie inside somebody else's repository: are files tracked here?
        if not git("ls-files", "--", "."):
            return None
        is_changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if is_changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
