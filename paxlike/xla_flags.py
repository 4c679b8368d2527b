"""Check XLA_FLAGS before a run meets them.

XLA ends the process with a C++ report when XLA_FLAGS holds a flag that it does not know, and flags
come and go with every release. The installed XLA is the only true list of its flags, so it is
asked: a short process on the CPU back end, which knows the `xla_gpu_*` flags too, reads them first.

    python -m paxlike.xla_flags

ends with status 0, or with 2 and one line that names the flag and the nearest known one.
"""

import difflib
import functools
import importlib.metadata
import importlib.util
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

# XLA:GPU then takes no kernel whose sums depend on timing (atomic adds of scatters, backward passes of cuDNN), and none
# because it was measured to be the fastest, which may be another one another day. It does what the other two flags
# below do (openxla/xla, pull request 12520).
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
_TE_ALLOWS = "NVTE_ALLOW_NONDETERMINISTIC_ALGO"  # in Transformer Engine's attention
_TRUE = ("", "true", "1")  # "": a bare flag
_DETERMINISTIC_VALUES = {
    "--xla_gpu_deterministic_ops": _TRUE,
    "--xla_gpu_exclude_nondeterministic_ops": _TRUE,
    "--xla_gpu_autotune_level": ("0",),
}
# Not all of jax, where jaxlib can do it: a fifth of the time.
_START_XLA = """
try:
    from jaxlib.xla_client import make_cpu_client as start
except ImportError:
    from jax import devices as start
start()
"""
_UNKNOWN = re.compile(r"Unknown flags? in XLA_FLAGS: (.*)")
_UNREADABLE = re.compile(r"\] ((?:Couldn't interpret value|Illegal value|Could not open file).*)")
_NAME = re.compile(
    rb"xla_[a-z0-9_]{4,80}"
)  # begins with a literal, so that 350 MB are searched fast


def is_deterministic(environ: Mapping[str, str]) -> bool:
    """Whether XLA_FLAGS ask for GPU runs that repeat to the bit."""
    return _value_of(DETERMINISTIC.partition("=")[0], environ) in _TRUE


def make_deterministic(environ: MutableMapping[str, str]) -> None:
    """Adds to XLA_FLAGS what makes GPU runs repeat to the bit; to be called before jax has started its devices.

    Raises:
      ValueError: XLA_FLAGS ask for the contrary.
    """
    for flag, right in _DETERMINISTIC_VALUES.items():
        value = _value_of(flag, environ)
        if value is not None and value.lower() not in right:
            raise ValueError(
                f"DETERMINISTIC=True, but XLA_FLAGS has {flag}={value}: take it out, or set DETERMINISTIC=False"
            )
    if environ.get(_TE_ALLOWS, "0") != "0":
        raise ValueError(
            f"DETERMINISTIC=True, but {_TE_ALLOWS}={environ[_TE_ALLOWS]}: take it out, or set DETERMINISTIC=False"
        )
    environ[_TE_ALLOWS] = "0"
    environ.setdefault("NCCL_ALGO", "Ring")  # sums in an order that the devices alone decide
    if not is_deterministic(environ):
        environ["XLA_FLAGS"] = f"{environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()


def _value_of(flag: str, environ: Mapping[str, str]) -> str | None:
    """The last value that XLA_FLAGS give a flag, "" for a bare one, None where it is not there."""
    given = [word.partition("=") for word in environ.get("XLA_FLAGS", "").split()]
    return next((value for name, _, value in reversed(given) if name == flag), None)


def check_xla_flags(flags: str) -> None:
    """Raises ValueError, in one line, if the installed XLA does not accept `flags`."""
    if not flags.strip():
        return
    report = _report_of_xla(flags)
    if unknown := _UNKNOWN.search(report):
        names = [flag.lstrip("-").split("=")[0] for flag in unknown[1].split()]
        version = importlib.metadata.version("jaxlib")
        raise ValueError(f"XLA_FLAGS: not in jaxlib {version}: " + "; ".join(map(_advice, names)))
    if unreadable := _UNREADABLE.search(report):
        raise ValueError(f"XLA_FLAGS: {unreadable[1].rstrip('.')}")
    if report:
        raise ValueError(f"XLA_FLAGS={flags!r}: {report.strip().splitlines()[-1]}")


def nearest_flag(name: str) -> str | None:
    """Returns the flag of the installed XLA whose name is nearest to `name`, if one is near."""
    # The binary holds names that are no flags as well, so XLA has the last word on each.
    for candidate in difflib.get_close_matches(name, _names_in_binary(), n=3, cutoff=0.88):
        if not _UNKNOWN.search(_report_of_xla(f"--{candidate}=1")):
            return candidate
    return None


def _advice(name: str) -> str:
    nearest = nearest_flag(name)
    return f"--{name} ({f'did you mean --{nearest}?' if nearest else 'remove it'})"


def _report_of_xla(flags: str) -> str:
    """Returns what XLA prints before it gives up on `flags`, or nothing if it accepts them."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    env |= {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "0"}
    probe = subprocess.run(
        [sys.executable, "-c", _START_XLA],
        env=env,
        capture_output=True,
        text=True,
        errors="replace",
    )
    return "" if probe.returncode == 0 else probe.stderr or f"status {probe.returncode}"


@functools.cache
def _names_in_binary() -> list[str]:
    spec = importlib.util.find_spec("jaxlib")
    names: set[bytes] = set()
    for folder in (spec.submodule_search_locations or []) if spec else []:
        library = max(Path(folder).glob("*.so"), key=lambda path: path.stat().st_size)
        with (
            library.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            names.update(_NAME.findall(data))
    return sorted(name.decode() for name in names)


if __name__ == "__main__":
    try:
        check_xla_flags(os.environ.get("XLA_FLAGS", ""))
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
