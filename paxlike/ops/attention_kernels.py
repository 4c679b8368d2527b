"""The kernels of attention: what each can do, which one is chosen, and which was found wrong on this machine.

`choose` takes the first of `KERNELS`, the fastest first, that lacks nothing of what is asked, is worth it, and was not
refused; Transformer Engine's serves by name only. The table in `docs/attention.md` is made from here
(`scripts/attention_table.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp

from paxlike import compat, parallel
from paxlike.ops import platform
from paxlike.ops.chunked_attention import chunked_attention
from paxlike.ops.reference_attention import reference_attention
from paxlike.ops.scores import Scores
from paxlike.scoped import Scoped

LONG = 4096  # keys; all scores of 32 heads and 4 rows take 8 GiB then


@dataclasses.dataclass(frozen=True)
class Request:
    """What a call of attention asks for: static, and of one device.

    Attributes:
      rows, length, keys: of the batch, queries of a row, keys of a row.
      heads, kv_heads, head_dim: of queries, of keys and values, and their size.
      segments: rows are packed.
      cache: queries start at an offset among the keys.
    """

    rows: int
    length: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    scores: Scores
    causal: bool
    segments: bool = False
    cache: bool = False

    @classmethod
    def of(cls, q: jax.Array, k: jax.Array, scores: Scores, *, causal, segments, cache) -> Request:
        """From the arrays of a call on the mesh in force."""
        b, s, h, size = q.shape
        rows, heads = parallel.num_shards("batch"), parallel.num_shards("act_heads")
        share = lambda number, parts: number // parts if number % parts == 0 else number
        return cls(
            rows=share(b, rows),
            length=s,
            keys=k.shape[1],
            heads=share(h, heads) if k.shape[2] % heads == 0 else h,
            kv_heads=share(k.shape[2], heads),
            head_dim=size,
            dtype=q.dtype.name,
            scores=scores,
            causal=causal,
            segments=segments,
            cache=cache,
        )

    @property
    def of_one_row(self) -> Request:
        """Rows do not meet: what is right for one is right for all."""
        return dataclasses.replace(self, rows=1)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A form of attention.

    Attributes:
      name: value of the knob `ATTENTION_KERNEL`.
      title: for messages.
      attend: (q, k, v, segments, offset, scores=, causal=) -> result.
      lacks: what keeps it from a request, as the end of a sentence; None where it serves.
      is_worth: whether `auto` takes it where it serves.
      missing: what keeps it from this machine, as the end of a sentence; None where it is there.
      by_name: `auto` never takes it.
      packages: that it is from, besides jax.
    """

    name: str
    title: str
    attend: Callable[..., jax.Array]
    lacks: Callable[[Request], str | None]
    is_worth: Callable[[Request], bool] = lambda request: True
    missing: Callable[[], str | None] = lambda: None
    by_name: bool = False
    packages: tuple[str, ...] = ()

    def reason_against(self, request: Request) -> str | None:
        """Why it does not serve such a request here, as the end of a sentence; None where it does."""
        return self.lacks(request) or self.missing() or REFUSED.get((self.name, request.of_one_row))


@dataclasses.dataclass(frozen=True)
class Choice:
    """A kernel, and why not those that would be faster: (title, reason) each."""

    request: Request
    kernel: Kernel
    passed_over: tuple[tuple[str, str], ...] = ()

    @property
    def line(self) -> str:
        """`chunked, because cuDNN has no soft cap`."""
        reasons = " and ".join(f"{title} {reason}" for title, reason in self.passed_over)
        return f"{self.kernel.title}, because {reasons}" if reasons else self.kernel.title


def choose(request: Request, name: str = "auto") -> Choice:
    """The kernel for a request: the first of `auto` or `fused` that serves, or the one of this name.

    Raises ValueError in one line where what was named cannot serve.
    """
    if name == "auto":
        candidates = [kernel for kernel in KERNELS if not kernel.by_name]
    else:
        candidates = [find(each) for each in (FUSED[1:] if name == "fused" else (name,))]
    passed_over: list[tuple[str, str]] = []
    for kernel in candidates:
        reason = kernel.reason_against(request)
        if reason is None and (name != "auto" or kernel.is_worth(request)):
            return Choice(request, kernel, tuple(passed_over))
        if reason is not None:
            passed_over.append((kernel.title, reason))
    reasons = " and ".join(f"{title} attention {reason}" for title, reason in passed_over)
    raise ValueError(
        f"{reasons}: set USE_CUDNN_FLASH_ATTENTION=None and ATTENTION_KERNEL=auto, which take a kernel that can serve"
    )


def find(name: str) -> Kernel:
    """The kernel of this name; ValueError that lists them."""
    for kernel in KERNELS:
        if kernel.name == name:
            return kernel
    raise ValueError(f"attention implementation '{name}' is none of {', '.join(IMPLEMENTATIONS)}")


def attend(choice: Choice, q, k, v, segments, offset) -> jax.Array:
    """Runs the chosen kernel, and tells `recording` of it."""
    _record(choice)
    how = {"scores": choice.request.scores, "causal": choice.request.causal}
    return choice.kernel.attend(q, k, v, segments, offset, **how)


@contextlib.contextmanager
def recording() -> Iterator[list[Choice]]:
    """The different choices that are made inside it, in their order."""
    choices: list[Choice] = []
    with _choices.set(choices):
        yield choices


def refuse(name: str, request: Request, reason: str) -> None:
    """From now on this kernel does not serve such requests in this process; `reason` is the end of a sentence."""
    REFUSED[(name, request.of_one_row)] = reason


def summary(choices: Sequence[Choice]) -> str:
    """One line on all choices of a program: `cuDNN; chunked, because cuDNN has no soft cap`."""
    return "; ".join(dict.fromkeys(choice.line for choice in choices))


_choices: Scoped[list[Choice] | None] = Scoped("choices", None)
REFUSED: dict[tuple[str, Request], str] = {}  # a fact about this machine, hence of the process


def _record(choice: Choice) -> None:
    choices = _choices.get()
    if choices is not None and choice not in choices:
        choices.append(choice)


def _cudnn(q, k, v, segments, offset, *, scores: Scores, causal: bool) -> jax.Array:
    def run(q, k, v, segments):
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=None
            if segments is None
            else (segments[:, :, None] == segments[:, None, :])[:, None],
            scale=scores.scale,
            is_causal=causal,
            local_window_size=None if scores.window is None else (scores.window - 1, 0),
            implementation="cudnn",
        )

    return _on_each_device(run, q, k, v, segments)


def _on_each_device(run, q, k, v, segments, *, always: bool = False):
    """`run`, mapped by hand over the rest of the mesh where some axes are mapped by hand already (a pipeline).

    The partitioner of the fused kernel cannot be called there, not even for axes of size 1. `always`: nor elsewhere.
    """
    free = compat.current_mesh_shape()
    spread = any(size > 1 for size in free.values())
    if not (free if compat.in_manual_region() else always and spread):
        return run(q, k, v, segments)
    heads = parallel.spec("batch", None, "act_heads", None)
    rows = parallel.spec("batch", None)
    return jax.shard_map(
        run,
        in_specs=(heads, heads, heads, None if segments is None else rows),
        out_specs=heads,
        axis_names=set(free),
        check_vma=False,
    )(q, k, v, segments)


def _te(q, k, v, segments, offset, *, scores: Scores, causal: bool) -> jax.Array:
    from paxlike.ops import te  # it asks ops.attention whether FLOPs are counted

    def run(q, k, v, segments):
        return te.attention(q, k, v, scores=scores, causal=causal)

    shards = parallel.num_shards("act_heads")
    if k.shape[2] % shards:  # so that each device has the keys of its queries
        k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    return _on_each_device(run, q, k, v, None, always=True)


def _te_missing() -> str | None:
    from paxlike.ops import te

    return te.missing()


def _chunked(q, k, v, segments, offset, *, scores: Scores, causal: bool) -> jax.Array:
    return chunked_attention(q, k, v, segments, scores=scores, causal=causal)


def _te_lacks(request: Request) -> str | None:
    if request.segments:
        return (
            "of packed rows needs to be told how many documents a row has at most, and nobody knows"
        )
    return _cudnn_lacks(request)


def _cudnn_lacks(request: Request) -> str | None:
    if not platform.is_nvidia():
        return f"needs an NVIDIA GPU and this is a {platform.name()}"
    capability, size = platform.compute_capability(), request.head_dim
    limit = 256 if capability >= 9.0 else 128
    if capability < 8.0:
        return f"needs compute capability 8.0 and this GPU has {capability}"
    if request.dtype not in ("bfloat16", "float16"):
        return f"needs 16-bit inputs and these are {request.dtype}"
    if size % 8 or size > limit:
        return f"needs heads of a multiple of 8 up to {limit} and these have {size}"
    if request.segments and request.length % 2:
        return f"of packed rows needs an even length and this is {request.length}"
    if request.cache:
        return "does not read a cache"
    if request.scores.logit_cap is not None:
        return f"has no cap of the scores and ATTEN_LOGIT_CAP is {request.scores.logit_cap}"
    return None


KERNELS = (
    Kernel(
        "te",
        "Transformer Engine",
        _te,
        _te_lacks,
        missing=_te_missing,
        by_name=True,
        packages=("transformer_engine",),
    ),
    Kernel("cudnn", "cuDNN", _cudnn, _cudnn_lacks),
    Kernel(
        "chunked",
        "chunked",
        _chunked,
        lambda request: "does not read a cache" if request.cache else None,
        # Shorter rows of scores fit, and one large product is no slower than a loop over tiles.
        is_worth=lambda request: request.keys >= LONG and request.length > 1,
    ),
    Kernel("reference", "reference", reference_attention, lambda request: None),
)
FUSED = ("fused", "te", "cudnn")  # `fused`: the first of the others that serves
IMPLEMENTATIONS = ("auto", *(kernel.name for kernel in KERNELS))
