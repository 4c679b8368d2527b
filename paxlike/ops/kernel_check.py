"""Is a fast kernel right on this machine? Compared with the plain reference before a run relies on it.

Fused attention is code of the driver's libraries, chosen by shape, type and chip, and it has been wrong before: a run
that diverges after days is how people found out. So the first run on a machine takes each kernel that it is going to
use, forward and backward, on its own lengths, heads and masks, and compares it with float32. The verdict is kept beside
the compiled programs; a kernel that is beyond the tolerance of its type is not used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from paxlike.ops import attention_kernels as kernels
from paxlike.ops import platform
from paxlike.ops.attention_kernels import Choice, Kernel, Request
from paxlike.ops.reference_attention import whole_attention

# See `_error`. Tiles have at most 4e-6, 3e-3 and 3e-2, in the gradient of queries, which is a difference of what was
# rounded; a wrong mask has 0.1 or more.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}
SCORES_BYTES = 1 << 30  # of one group of heads, in the reference; longer rows are checked on a part
ROWS = 2
RESULTS = ("result", "gradient of queries", "gradient of keys", "gradient of values")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a comparison found: the largest error of each of `RESULTS`, or why the kernel did not run."""

    errors: tuple[float, ...]
    tolerance: float
    length: int
    failure: str = ""
    seconds: float = 0.0

    @property
    def refusal(self) -> str | None:
        """Why the kernel is not to be used, as the end of a sentence; None where it is right."""
        if self.failure:
            return f"failed in the check: {self.failure}"
        worst = max(range(len(self.errors)), key=lambda i: _not_a_number_last(self.errors[i]))
        if self.errors[worst] <= self.tolerance:  # false for a NaN
            return None
        return (
            f"differs from the reference: its {RESULTS[worst]} by {self.errors[worst]:.2g} of its length "
            f"(at most {self.tolerance:.2g})"
        )


@dataclasses.dataclass(frozen=True)
class Settled:
    """A traced program whose kernels are known to be right, and what is to be said about them.

    Attributes:
      line: the kernels, and why not faster ones.
      checks: one line for each comparison that was made now.
      refusals: one line for each kernel that was replaced.
    """

    traced: Any
    choices: tuple[Choice, ...]
    checks: tuple[str, ...]
    refusals: tuple[str, ...]

    @property
    def line(self) -> str:
        """See `attention_kernels.summary`."""
        return kernels.summary(self.choices)

    def report(self, write: Callable[[str], None], warn: Callable[[str], None]) -> None:
        """What was compared and what was replaced."""
        for line in self.checks:
            write(f"checked: {line}")
        for line in self.refusals:
            warn(line)

    def news(self, said: str) -> str:
        """The line, where it is worth saying and is not what was `said` before; else nothing."""
        return self.line if self.is_news and self.line != said else ""

    @property
    def is_news(self) -> bool:
        """Whether it is anything but the plain form where there is no other."""
        is_fast = any(choice.kernel.name != "reference" for choice in self.choices)
        return is_fast or (bool(self.choices) and not platform.is_cpu())


@dataclasses.dataclass(frozen=True)
class KernelCheck:
    """Compares the kernels of a program with the reference.

    Attributes:
      enabled: False trusts every kernel.
      folder: for the verdicts; None is that of compiled programs, and nothing is kept where there is none.
    """

    enabled: bool = True
    folder: str | None = None

    def settle(self, trace: Callable[[], Any]) -> Settled:
        """Calls `trace`, and again whenever a kernel that it chose is refused.

        All processes agree: a kernel that is wrong on one is used on none. Raises ValueError in one line where the
        kernel was named by the config.
        """
        checks: list[str] = []
        refusals: list[str] = []
        while True:
            with kernels.recording() as choices:
                traced = trace()
            fast = [choice for choice in choices if choice.kernel.name != "reference"]
            refused = self._check(fast, checks) if self.enabled and fast else {}
            if not refused:
                return Settled(traced, tuple(choices), tuple(checks), tuple(refusals))
            for (kernel, request), reason in refused.items():
                kernels.refuse(kernel.name, request, reason)
                refusals.append(f"{kernel.title} attention is not used: it {reason}")

    def _check(
        self, choices: list[Choice], checks: list[str]
    ) -> Mapping[tuple[Kernel, Request], str]:
        asked = list(
            dict.fromkeys((choice.kernel, choice.request.of_one_row) for choice in choices)
        )
        rows = dict.fromkeys(asked, 1)
        for choice in choices:
            key = (choice.kernel, choice.request.of_one_row)
            rows[key] = max(rows[key], min(ROWS, choice.request.rows))
        refusals = [self._verdict(*key, rows[key], checks).refusal for key in asked]
        bad = np.array([refusal is not None for refusal in refusals])
        if jax.process_count() > 1:
            bad = multihost_utils.process_allgather(bad).reshape(-1, len(asked)).any(axis=0)
        return {
            key: refusal or "was refused by another process"
            for key, refusal, is_bad in zip(asked, refusals, bad, strict=True)
            if is_bad
        }

    def _verdict(self, kernel: Kernel, request: Request, rows: int, checks: list[str]) -> Verdict:
        path = self._path(kernel, request, rows)
        if path is not None and path.exists():
            try:
                kept = json.loads(path.read_text())["verdict"]
                return Verdict(**{**kept, "errors": tuple(kept["errors"])})
            except (OSError, ValueError, KeyError, TypeError):
                pass  # torn or of another version: checked again
        verdict = compare(kernel, request, rows=rows)
        part = "" if verdict.length == request.length else f" on {verdict.length:,} positions"
        found = (
            verdict.failure or f"largest error {max(verdict.errors):.2g} of {verdict.tolerance:.2g}"
        )
        checks.append(
            f"{kernel.title} attention against the reference{part}: {found} ({verdict.seconds:.1f} s)"
        )
        if path is not None and not verdict.failure:  # a failure may be that of the moment
            _write(path, {"about": _about(kernel, request, rows), **_as_json(verdict)})
        return verdict

    def _path(self, kernel: Kernel, request: Request, rows: int) -> Path | None:
        folder = self.folder or jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
        if not folder:
            return None
        about = json.dumps(_about(kernel, request, rows), sort_keys=True)
        name = hashlib.sha256(about.encode()).hexdigest()[:24]
        return Path(folder) / "kernels" / f"{name}.json"


def compare(kernel: Kernel, request: Request, *, rows: int = ROWS, seed: int = 0) -> Verdict:
    """Runs a kernel and the reference on random inputs of the shapes and masks of `request`, on one device."""
    started = time.monotonic()
    tolerance, length = TOLERANCE[request.dtype], _checked_length(request)
    keys = request.keys if length == request.length else length
    request = dataclasses.replace(request, rows=rows, length=length, keys=keys)
    inputs = _inputs(request, np.random.default_rng(seed))
    errors: tuple[float, ...] = ()
    failure = ""
    try:
        got = _alone(lambda: _run(kernel, request, inputs))
        expected = _alone(lambda: _expected(request, inputs))
        errors = tuple(_error(a, b) for a, b in zip(got, expected, strict=True))
    except (ValueError, NotImplementedError, RuntimeError, AssertionError) as error:
        failure = " ".join(str(error).split())[:200] or type(error).__name__
    seconds = round(time.monotonic() - started, 3)
    return Verdict(errors, tolerance, length, failure, seconds)


def _checked_length(request: Request) -> int:
    """As much of a row as leaves room for all scores of a group of heads."""
    group = request.heads // request.kv_heads
    length = request.length
    while (
        4 * group * length * max(length, request.keys if length == request.length else 0)
        > SCORES_BYTES
    ):
        length //= 2
    return length


def _inputs(request: Request, rng: np.random.Generator) -> dict[str, np.ndarray | None]:
    """Scores of standard deviation 2, so that a softmax has something to choose; packed rows end in padding."""
    b, s, t = request.rows, request.length, request.keys
    size = request.head_dim

    def draw(*shape: int) -> np.ndarray:
        return np.asarray(rng.standard_normal(shape), np.float32)

    sharp = 2.0 / (request.scores.scale * math.sqrt(size))
    segments = None
    if request.segments:
        starts = rng.random((b, s)) < 5 / s
        segments = 1 + np.cumsum(starts, axis=1)
        segments[:, s - s // 16 :] = 0
        segments = segments.astype(np.int32)
    return {
        "q": np.float32(sharp) * draw(b, s, request.heads, size),
        "k": draw(b, t, request.kv_heads, size),
        "v": draw(b, t, request.kv_heads, size),
        "dy": draw(b, s, request.heads, size),
        "segments": segments,
    }


def _run(kernel: Kernel, request: Request, inputs) -> list[np.ndarray]:
    """Result and gradients of the kernel."""

    def both(q, k, v, dy, segments):
        attend = lambda q, k, v: kernel.attend(
            q, k, v, segments, None, scores=request.scores, causal=request.causal
        )
        y, back = jax.vjp(attend, q, k, v)
        return y, *back(dy)

    arrays = [inputs[name].astype(jnp.dtype(request.dtype)) for name in ("q", "k", "v", "dy")]
    with jax.default_matmul_precision("highest" if request.dtype == "float32" else "default"):
        found = jax.jit(both)(*arrays, inputs["segments"])
    return [np.asarray(a, np.float32) for a in jax.device_get(found)]


def _expected(request: Request, inputs) -> list[np.ndarray]:
    """The same by the reference in float32 from the same rounded inputs, one group of heads and one row at a time."""
    g, segments = request.kv_heads, inputs["segments"]

    def split(name):
        a = inputs[name].astype(jnp.dtype(request.dtype)).astype(np.float32)
        b, s, h, size = a.shape  # (rows x groups, 1, s, heads of a group, size)
        return a.reshape(b, s, g, h // g, size).swapaxes(1, 2).reshape(b * g, 1, s, h // g, size)

    def one(mine):
        q, k, v, dy, documents = mine
        attend = lambda q, k, v: whole_attention(
            q, k, v, documents, scores=request.scores, causal=request.causal
        )
        y, back = jax.vjp(attend, q, k, v)
        return y, *back(dy)

    documents = None if segments is None else np.repeat(segments, g, axis=0)[:, None]
    with jax.default_matmul_precision("highest"):
        run = jax.jit(lambda *arrays: jax.lax.map(one, arrays))
        found = run(*(split(name) for name in ("q", "k", "v", "dy")), documents)

    def join(a):
        n, _, s, r, size = a.shape
        return a.reshape(n // g, g, s, r, size).swapaxes(1, 2).reshape(n // g, s, g * r, size)

    return [join(np.asarray(a)) for a in jax.device_get(found)]


def _error(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest distance of two vectors of a head, over the length of the right one and a usual one together.

    Position by position: late queries average over many values and have small results, whose errors a maximum over the
    whole array would not see. The usual length is there because a gradient may be a difference of nearly equal
    numbers: that of a query which chooses one key is next to nothing.
    """
    distance = np.linalg.norm(got - expected, axis=-1)
    length = np.linalg.norm(expected, axis=-1)
    usual = np.median(length, axis=1, keepdims=True)
    return float(np.max(distance / (length + usual + 1e-30)))


def _alone(function: Callable[[], Any]) -> Any:
    """Runs it in a thread of its own, where no mesh is in force, on this process's first device."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with jax.default_device(jax.local_devices()[0]):
                results.append(function())
        except BaseException as error:  # raised again below
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _about(kernel: Kernel, request: Request, rows: int) -> dict[str, Any]:
    """All that a verdict depends on."""
    device = jax.local_devices()[0]
    driver = Path("/proc/driver/nvidia/version")
    return {
        "kernel": kernel.name,
        "request": dataclasses.asdict(dataclasses.replace(request, rows=rows)),
        "tolerance": TOLERANCE[request.dtype],
        "versions": {
            name: importlib.metadata.version(name) for name in ("jax", "jaxlib", *kernel.packages)
        },
        "device": device.device_kind,
        "platform": device.client.platform_version,
        "driver": driver.read_text().split("\n")[0] if driver.exists() else "",
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _as_json(verdict: Verdict) -> dict[str, Any]:
    return {"verdict": dataclasses.asdict(verdict)}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all; a folder that cannot be written is a check that is made again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}")
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(path)
    except OSError:
        return


def _not_a_number_last(error: float) -> float:
    return math.inf if math.isnan(error) else error
