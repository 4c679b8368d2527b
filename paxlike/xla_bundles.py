"""Named bundles of compiler flags for NVIDIA GPUs: few, each with what it does.

XLA reads its flags when jax starts its devices, so they are decided before; whether there is a GPU is read from the
driver's files, not from jax. What the user gives in `XLA_FLAGS` stands. A flag that the installed XLA does not know
would end the process: a short process of its own tries all of them first, once for each set (`paxlike.xla_flags`), and
the answer is kept. What each bundle does to a program compiled for eight H100 is in docs/training.md.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from paxlike.xla_flags import check_xla_flags


@dataclasses.dataclass(frozen=True)
class Bundle:
    """Flags with what each is for, and the level of optimisation that jax asks of XLA (`jax_optimization_level`)."""

    name: str
    meaning: str
    flags: tuple[tuple[str, str], ...] = ()
    optimization_level: str | None = None


_PRODUCTS = (
    "--xla_gpu_enable_triton_gemm=false",
    "matrix products by cuBLAS: without a device to tune on, Triton takes FP8 products as 16-bit ones",
)
BUNDLES = {
    bundle.name: bundle
    for bundle in (
        Bundle("none", "no flags"),
        Bundle("gpu", "any mesh", (_PRODUCTS,)),
        Bundle(
            "gpu-sharded",
            "weights or layers over several GPUs",
            (_PRODUCTS,),
            optimization_level="O1",
        ),
    )
}
NAMES = ("auto", *BUNDLES)


def gpu_name(environ: Mapping[str, str], proc: Path = Path("/proc/driver/nvidia")) -> str | None:
    """Name of the first NVIDIA GPU that jax may use, by the files of its driver; None where there is none."""
    platforms = environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return None
    if environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    for path in sorted(proc.glob("gpus/*/information")):
        for line in path.read_text().splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    return None


def apply(
    name: str, environ: MutableMapping[str, str], *, folder: str | None
) -> tuple[Bundle, list[str]]:
    """Adds a bundle's flags to `XLA_FLAGS`; to be called before jax has started its devices.

    Args:
      name: of `NAMES`; `auto` is `gpu` where there is one, for which plans are compiled too.
      folder: where it is kept that a set of flags was tried, None for nowhere.

    Returns:
      The bundle, and the flags that it added: those that the user has given otherwise are left out.

    Raises:
      ValueError: a flag, of the bundle or of the user, that the installed XLA does not take.
    """
    if name == "auto":
        name = "none" if gpu_name(environ) is None else "gpu"
    bundle = BUNDLES[name]
    given = environ.get("XLA_FLAGS", "")
    names = {word.partition("=")[0] for word in given.split()}
    added = [flag for flag, _ in bundle.flags if flag.partition("=")[0] not in names]
    flags = " ".join([*added, given]).strip()
    check_once(flags, folder)
    if added:
        environ["XLA_FLAGS"] = flags
    return bundle, added


def check_once(flags: str, folder: str | None) -> None:
    """`check_xla_flags`, whose answer for a set of flags that were right is kept in `folder`."""
    if not flags:
        return
    about = f"jaxlib {importlib.metadata.version('jaxlib')}: {flags}"
    kept = None
    if folder:
        place = Path(folder).expanduser() / "xla_flags"
        kept = place / hashlib.sha256(about.encode()).hexdigest()[:24]
        if kept.exists():
            return
    check_xla_flags(flags)
    if kept is not None:
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(about + "\n")
        except OSError:  # tried again next time
            return
