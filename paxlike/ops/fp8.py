"""Matrix products with a weight in 8-bit floating point: E4M3 forward, E5M2 for gradients (Micikevicius et al. 2022).

A tensor t is multiplied as round(t / s), where s = amax 2^margin / max(type), so that its largest value becomes the
largest that the type has. Of which tensor `amax` is the largest magnitude depends on the recipe:

* `delayed`: the largest of the last steps. It is known before the tensor is, so that rounding takes no pass over memory
  of its own. A tensor that was never seen, or was all zeros, has s = 1.
* `current`: of the tensor itself. There is no state.

The state of the delayed recipe is one array for each weight in the collection `fp8`: the amax of the input, of the
weight and of the output's gradient in each of the last steps, newest first. What is differentiated with respect to it
is not a gradient: it is what this pass has seen, in the place of the newest step and zeros elsewhere. Parts of a batch
are therefore combined by their maximum, a weight that is used twice can at most be seen too large, and the step of
training ends with `advance`.

The products are written with 8-bit operands, not as products of rounded bfloat16 that a compiler has to recognise:
where XLA does not, it falls back without a word. That is why `flax.linen.fp8_ops.Fp8DotGeneralOp` (deprecated for the
same reason) is not used; its successor has no margin and no current scaling, counts each microbatch as a step, keeps a
gathered weight for the backward pass, and lets one non-finite amax stop the scale for as long as the history is. qwix
has current scaling only.

Values that are not finite become NaN, so that a step which overflows is seen and skipped as it is without FP8; as an
amax they count as not seen.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from paxlike.ops import platform

STATE = "fp8"  # collection of the histories
FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2
RECIPES = ("delayed", "current")
COMPUTE_CAPABILITY = 8.9
MULTIPLE = 16  # what cuBLASLt wants the sides of 8-bit matrices to divide by
SCOPE = (
    "fp8_"  # names of the three products in a program: fp8_forward, fp8_input_grad, fp8_weight_grad
)
PyTree = Any


@dataclasses.dataclass(frozen=True)
class Fp8:
    """How a weight is multiplied in 8 bits; called, it gives what stands in for `jax.lax.dot_general`.

    Attributes:
      recipe: `delayed` or `current`.
      amax_history: steps whose largest amax counts; only the delayed recipe has any.
      margin: s is 2^margin times what would just fit.
    """

    recipe: str = "delayed"
    amax_history: int = 1024
    margin: int = 0

    def __post_init__(self):
        if self.recipe not in RECIPES:
            raise ValueError(f"FP8_RECIPE='{self.recipe}' is none of {', '.join(RECIPES)}")
        if self.amax_history < 1:
            raise ValueError(
                f"FP8_AMAX_HISTORY={self.amax_history} must be at least 1 step; FP8_RECIPE=current keeps no history"
            )
        if not -8 <= self.margin <= 8:
            raise ValueError(
                f"FP8_MARGIN={self.margin} is not within -8 and 8: scales are multiplied by 2^margin"
            )

    def __call__(self) -> nn.Module:
        """The module that multiplies, to be made inside a compact one."""
        return DotGeneral(self, name="fp8")


class DotGeneral(nn.Module):
    """x W with both in 8 bits; holds the history of one weight."""

    fp8: Fp8

    def setup(self):
        if self.fp8.recipe == "delayed":
            self.history = history(self, self.fp8.amax_history)

    def __call__(
        self,
        x: Float[Array, "..."],
        kernel: Float[Array, "..."],
        dimension_numbers: Any,
        precision: Any = None,
    ) -> Float[Array, "..."]:
        """`x` (*rows, p) times `kernel` (p, *features), or stacks (e, *rows, p) and (e, p, *features) one by one.

        Raises:
          ValueError: p, or the product of the features, is not a multiple of 16.
        """
        stacked = len(dimension_numbers[1][0])
        lead = tuple(range(stacked))
        if stacked > 1 or dimension_numbers != (((x.ndim - 1,), (stacked,)), (lead, lead)):
            raise ValueError(
                f"FP8 multiplies rows with a weight, not along the dimensions {dimension_numbers}"
            )
        check_sizes("/".join(self.path[:-1]), kernel.shape[stacked:])
        check_hardware()
        return product(x, kernel, self.peaks(), self.fp8.margin, stacked)

    def peaks(self) -> Float[Array, "3"] | None:
        """What the scales are made of; None: the tensors themselves."""
        return None if self.fp8.recipe == "current" else peaks(self.history)


def history(module: nn.Module, steps: int) -> Float[Array, "3 n"]:
    """The history of the weight that `module` multiplies by."""
    return module.variable(STATE, "amax_history", jnp.zeros, (3, steps), jnp.float32).value


def check_sizes(layer: str, shape: tuple[int, ...], multiple: int = MULTIPLE) -> None:
    """Raises one line where the sides of a weight (inputs, *features) are no multiples."""
    inputs, outputs = shape[0], math.prod(shape[1:])
    if inputs % multiple or outputs % multiple:
        raise ValueError(
            f"FP8 needs sizes that are multiples of {multiple}, and {layer} is {inputs} x {outputs}: change them, or "
            "leave the layer out with FP8_LAYERS"
        )


def check_hardware() -> None:
    """Raises one line where what the program is traced for has no 8-bit products; a CPU imitates them."""
    if platform.is_cpu():
        return
    if platform.is_nvidia():
        capability = platform.compute_capability()
        if capability < COMPUTE_CAPABILITY:
            raise ValueError(
                f"USE_FP8=True needs a GPU of compute capability {COMPUTE_CAPABILITY} or above (Ada, Hopper, "
                f"Blackwell), and this one has {capability:.1f}: set USE_FP8=False"
            )
        return
    raise ValueError(
        f"USE_FP8=True is made for NVIDIA GPUs, and this is a {platform.name()}: set USE_FP8=False"
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def product(
    x: Float[Array, "..."],
    w: Float[Array, "..."],
    peaks: Float[Array, "3"] | None,
    margin: int = 0,
    stacked: int = 0,
) -> Float[Array, "..."]:
    """`x` (*rows, p) times `w` (p, *features), in the dtype of `x`.

    `peaks` are the amax of input, weight and gradient that the scales are made of; None: of these tensors. Their
    "gradient" is the amax of these tensors. With `stacked` = 1 both have one more dimension in front, and each matrix
    of `w` (e, p, *features) has rows of its own, (e, *rows, p); all share the three scales.
    """
    return _forward(x, w, peaks, margin, stacked)[0]


def _forward(x, w, peaks, margin, stacked):
    seen = amax(x), amax(w)
    used = seen if peaks is None else (peaks[0], peaks[1])
    x_scale, w_scale = scale(used[0], FORWARD, margin), scale(used[1], FORWARD, margin)
    narrow = quantize(x, x_scale, FORWARD)
    with jax.named_scope(f"{SCOPE}forward"):
        over = ((x.ndim - 1,), (stacked,))
        y = _dot(narrow, quantize(w, w_scale, FORWARD), over, x.dtype, stacked)
    y = times(y, x_scale * w_scale)
    # The weight as it came: a remat policy then gathers and rounds it again, rather than keep it whole. The input as
    # bytes: what a policy keeps goes through XLA's reduce_precision, to which E4M3 above 240 is infinite.
    kept = jax.lax.bitcast_convert_type(narrow, jnp.uint8)
    return y, (kept, w, peaks, x_scale, w_scale, seen)


def _backward(margin, stacked, residuals, dy):
    kept, w, peaks, x_scale, w_scale, seen = residuals
    narrow = jax.lax.bitcast_convert_type(kept, FORWARD)
    seen_dy = amax(dy)
    dy_scale = scale(seen_dy if peaks is None else peaks[2], BACKWARD, margin)
    narrow_dy = quantize(dy, dy_scale, BACKWARD)
    rows = narrow.ndim - 1
    features = tuple(range(rows, dy.ndim))
    with jax.named_scope(f"{SCOPE}input_grad"):
        over = (features, tuple(range(stacked + 1, w.ndim)))
        dx = _dot(narrow_dy, quantize(w, w_scale, FORWARD), over, dy.dtype, stacked)
    with jax.named_scope(f"{SCOPE}weight_grad"):
        over = (tuple(range(stacked, rows)), tuple(range(stacked, rows)))
        dw = _dot(narrow, narrow_dy, over, w.dtype, stacked)
    dx, dw = times(dx, dy_scale * w_scale), times(dw, x_scale * dy_scale)
    return dx, dw, None if peaks is None else jnp.stack([*seen, seen_dy])


product.defvjp(_forward, _backward)


def amax(x: Float[Array, "..."]) -> Float[Array, ""]:
    """The largest magnitude in float32; 0, as if nothing were there, where it is not finite."""
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    return jnp.where(jnp.isfinite(largest), largest, 0.0)


def scale(largest: Float[Array, ""], dtype: Any, margin: int = 0) -> Float[Array, ""]:
    """What a tensor with this amax is divided by; 1 where it is 0."""
    found = largest * (2.0**margin / float(jnp.finfo(dtype).max))
    # What is below the smallest normal number has no inverse.
    return jnp.where(found >= float(jnp.finfo(jnp.float32).tiny), found, 1.0)


def quantize(x: Float[Array, "..."], scale: Float[Array, ""], dtype: Any) -> Float[Array, "..."]:
    """x / scale in `dtype`; what lies outside becomes its largest value, what is not finite NaN."""
    limit = float(jnp.finfo(dtype).max)
    x = x.astype(jnp.float32)
    bounded = jnp.clip(x / scale, -limit, limit)
    # Of the scale, or a loop over layers would keep an array of this constant beside.
    return jnp.where(jnp.isfinite(x), bounded, jnp.nan * scale).astype(dtype)


def times(x: Float[Array, "..."], factor: Float[Array, ""]) -> Float[Array, "..."]:
    """What is multiplied by scales again; in float32, and in the dtype that it had."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def advance(history: Float[Array, "*layers 3 n"], seen: Float[Array, "*layers 3 n"]) -> Array:
    """The history one step later, with the amax that the "gradient" `seen` has in its first place."""
    return jnp.concatenate([seen[..., :1], history[..., :-1]], axis=-1)


def copies(state: PyTree, count: int) -> PyTree:
    """Each history (layers, 3, n) as `count` histories of one step, (layers, count, 3, 1), that give the same scales.

    What the copies have seen comes back as the maximum: one for each part of a batch that a pipeline works on.
    """
    return jax.tree.map(lambda history: _copies(history, count), state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _copies(history, count):
    peaks = jnp.max(history, axis=-1, keepdims=True)[:, None]
    return jnp.broadcast_to(peaks, (history.shape[0], count, 3, 1))


def _copies_backward(count, like, seen):
    return (_newest(like, jnp.max(seen, axis=1)[..., 0]),)


_copies.defvjp(lambda history, count: (_copies(history, count), history), _copies_backward)


@jax.custom_vjp
def peaks(history: Float[Array, "3 n"]) -> Float[Array, "3"]:
    """The largest of a history; what is given back for it is what was seen."""
    return jnp.max(history, axis=-1)


peaks.defvjp(lambda history: (peaks(history), history), lambda like, seen: (_newest(like, seen),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def for_each(peaks: Float[Array, "3"], count: int) -> Float[Array, "count 3"]:
    """`peaks` for each of so many devices; what they have seen comes back as the maximum."""
    return jnp.broadcast_to(peaks, (count, *peaks.shape))


for_each.defvjp(
    lambda peaks, count: (for_each(peaks, count), None),
    lambda count, _, seen: (jnp.max(seen, axis=0),),
)


def _newest(like, seen):
    """An array like a history with `seen` in the place of the newest step and zeros elsewhere."""
    return jnp.zeros_like(like).at[..., 0].set(seen)


def _dot(a, b, contracted, dtype, stacked):
    lead = tuple(range(stacked))
    return jax.lax.dot_general(a, b, (contracted, (lead, lead)), preferred_element_type=dtype)
