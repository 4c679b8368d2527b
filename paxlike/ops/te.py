"""Transformer Engine as a backend of the same layers: matrix products with a weight, and attention, by its kernels.

The only file that imports it. Parameters, and the state of FP8, are those of `ops.fp8`, so that a checkpoint can be
gone on with by either: Transformer Engine is called as a function, is given scales and an empty history, and what it
enters there is handed back as what was seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from paxlike import compat, parallel
from paxlike.ops import fp8, platform
from paxlike.ops.attention import is_plain
from paxlike.ops.scores import Scores

# Ours -> theirs.
RECIPES = {
    "delayed": "DelayedScaling",
    "current": "Float8CurrentScaling",
    "mxfp8": "MXFP8BlockScaling",
}
_AXES = {"data": "dp", "fsdp": "fsdp", "tensor": "tp", "pipeline": "pp", "context": "cp"}
_AXES |= {"expert": "ep"}
NAMES = ("batch", "length", "act_embed", "act_mlp")  # logical axes that it may be told
_MULTIPLES = {"mxfp8": 32}  # of the sides of a matrix; 16 in the others
_lasting = contextlib.ExitStack()
_WITHOUT = "set USE_TE=False, or install it (the Dockerfile does; scripts/build_te_cpu.sh where there is no GPU)"


@dataclasses.dataclass(frozen=True)
class TransformerEngine:
    """Multiplies by a weight with Transformer Engine; called, it gives what stands in for `jax.lax.dot_general`.

    Attributes:
      recipe: one of `RECIPES`; None multiplies in the compute dtype.
      amax_history, margin: as in `ops.fp8.Fp8`, of the delayed recipe.
      fused: norms in front of these products are part of them (`ops.te_fused`): None where that can be, True says
        where it cannot, False nowhere.

    Raises:
      ValueError: it is not installed, or cannot be imported.
    """

    recipe: str | None = None
    amax_history: int = 1024
    margin: int = 0
    fused: bool | None = False

    def __post_init__(self):
        if self.recipe not in (None, *RECIPES):
            raise ValueError(f"FP8_RECIPE='{self.recipe}' is none of {', '.join(RECIPES)}")
        fp8.Fp8("delayed", self.amax_history, self.margin)  # refuses bad numbers
        engine()

    def __call__(self) -> nn.Module:
        """The module that multiplies, to be made inside a compact one."""
        return DotGeneral(self, name="fp8")


class DotGeneral(nn.Module):
    """x W by Transformer Engine; with the delayed recipe it holds the history of one weight, as `ops.fp8` does."""

    te: TransformerEngine

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "..."],
        kernel: Float[Array, "..."],
        dimension_numbers: Any,
        precision: Any = None,
    ) -> Float[Array, "..."]:
        """`x` (*rows, p) times `kernel` (p, *features).

        Raises:
          ValueError: a size that the recipe does not take, or a recipe that the device does not have.
        """
        te = self.te
        peaks = _state(self, te, kernel.shape)
        if is_plain():  # FLOPs are counted on products that can be seen
            return jax.lax.dot_general(x, kernel, dimension_numbers)
        if platform.is_nvidia() and not platform.is_here():
            raise ValueError(
                "USE_TE=True cannot be planned: Transformer Engine asks the GPU that it runs on while it is compiled; "
                "plan with USE_TE=False (USE_FP8=True then plans our FP8 of the same layers)"
            )
        return product(x, kernel, peaks, te.recipe, te.margin)


class State(nn.Module):
    """What `DotGeneral` holds of a weight, where something else multiplies by it."""

    te: TransformerEngine

    @nn.compact
    def __call__(self, shape: tuple[int, ...]) -> Float[Array, "3"] | None:
        """The peaks of the weight of this shape, inputs flat, with the delayed recipe; errors as in `DotGeneral`."""
        return _state(self, self.te, shape)


def _state(module: nn.Module, te: TransformerEngine, shape: tuple[int, ...]):
    if te.recipe is not None:
        multiple = _MULTIPLES.get(te.recipe, fp8.MULTIPLE)
        fp8.check_sizes("/".join(module.path[:-1]), shape, multiple)
        check_recipe(te.recipe)
    return fp8.peaks(fp8.history(module, te.amax_history)) if te.recipe == "delayed" else None


def product(
    x: Float[Array, "..."],
    w: Float[Array, "..."],
    peaks: Float[Array, "3"] | None,
    recipe: str | None,
    margin: int = 0,
) -> Float[Array, "..."]:
    """`x` (*rows, p) times `w` (p, *features); `peaks` as in `ops.fp8.product`."""
    peaks = None if peaks is None else peaks[None]
    return run(Operation(_dense), (x, w), peaks, recipe, margin)


def _dense(arrays, sets):
    x, w = arrays
    options = {} if sets is None else {"quantizer_set": sets[0]}
    return engine().jax.dense.dense(x, w, contracting_dims=((x.ndim - 1,), (0,)), **options)


@dataclasses.dataclass(frozen=True)
class Operation:
    """Something that Transformer Engine does with weights.

    Attributes:
      call: called with the arrays, and a quantiser set for each weight or None.
      gradients: to each quantiser set, the weight whose output's gradient it is used for.
    """

    call: Callable[..., jax.Array]
    gradients: tuple[int, ...] = (0,)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def run(operation: Operation, arrays: Any, peaks: Any, recipe: str | None, margin: int = 0) -> Any:
    """What `operation` makes of `arrays`.

    `peaks`, (weights, 3) with the delayed recipe, are as in `ops.fp8.product`, for each weight.
    """
    return _forward(operation, arrays, peaks, recipe, margin)[0]


def _forward(operation, arrays, peaks, recipe, margin):
    def call(arrays, scales, histories):
        sets = None
        if recipe is not None:
            sets = tuple(
                _quantizers(recipe, margin, *(_of_set(part, i, j) for part in (scales, histories)))
                for i, j in enumerate(operation.gradients)
            )
        return operation.call(arrays, sets)

    scales = histories = None
    if peaks is not None:
        types = (fp8.FORWARD, fp8.FORWARD, fp8.BACKWARD)
        scales = [
            [(1.0 / fp8.scale(row[i], types[i], margin))[None] for i in range(3)] for row in peaks
        ]
        # Transformer Engine enters an amax in front, turns by one, and clears the place: it is found at the end.
        histories = [[jnp.zeros((2,), jnp.float32)] * 3 for _ in scales]
    with _its_ways():
        y, back = jax.vjp(call, arrays, scales, histories)
    # As in `ops.fp8`: what a remat policy keeps of 8-bit floats is not what they were.
    return y, (jax.tree.map(_Kept.of, back), peaks)


def _of_set(part, weight: int, gradient: int):
    """Of scales or histories, those of a quantiser set."""
    return None if part is None else [*part[weight][:2], part[gradient][2]]


def _backward(operation, recipe, margin, residuals, dy):
    kept, peaks = residuals
    back = jax.tree.map(lambda leaf: leaf.restored(), kept, is_leaf=lambda k: isinstance(k, _Kept))
    with _its_ways():
        gradients, _, histories = back(dy)
    if peaks is None:
        return gradients, None
    seen = jnp.stack([jnp.concatenate([history[-1:] for history in row]) for row in histories])
    return gradients, jnp.where(jnp.isfinite(seen), seen, 0.0)


run.defvjp(_forward, _backward)


def attention(
    q: Float[Array, "b s h k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t g k"],
    *,
    scores: Scores,
    causal: bool,
) -> Float[Array, "b s h k"]:
    """Its fused attention (cuDNN's kernels) of whole rows, on one device, whatever the mesh."""
    return _attention(q, k, v, scores, causal)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attention(q, k, v, scores: Scores, causal: bool):
    return _attention_forward(q, k, v, scores, causal)[0]


def _attention_forward(q, k, v, scores: Scores, causal: bool):
    its = engine().jax.attention
    lengths = tuple(jnp.full(a.shape[:1], a.shape[1], jnp.int32) for a in (q, k))

    def attend(q, k, v):
        return its.fused_attn(
            (q, k, v),
            None,
            its.SequenceDescriptor.from_seqlens(lengths),
            None,
            attn_bias_type=its.AttnBiasType.NO_BIAS,
            attn_mask_type=its.AttnMaskType.CAUSAL_MASK if causal else its.AttnMaskType.NO_MASK,
            qkv_layout=its.QKVLayout.BSHD_BSHD_BSHD,
            softmax_type=its.AttnSoftmaxType.VANILLA_SOFTMAX,
            scaling_factor=scores.scale,
            dropout_probability=0.0,
            is_training=True,
            window_size=None if scores.window is None else (scores.window - 1, 0),
        )

    with _its_ways(engine().jax.MeshResource()):
        return jax.vjp(attend, q, k, v)


def _attention_backward(scores: Scores, causal: bool, back, dy):
    with _its_ways(engine().jax.MeshResource()):
        return back(dy)


_attention.defvjp(_attention_forward, _attention_backward)


def missing() -> str | None:
    """Why its attention cannot be used on this machine, as the end of a sentence; None where it can."""
    if not platform.is_here():
        return "cannot be planned: it asks the GPU that it runs on while it is compiled"
    try:
        engine()
    except ValueError as error:
        return str(error).partition("Transformer Engine ")[2].partition(": set USE_TE")[0]
    return None


@contextlib.contextmanager
def _its_ways(resource: Any = None) -> Iterator[None]:
    """It is told the mesh and our names of axes, and may broadcast and promote as numpy does."""
    rules = [(name, parallel.mesh_axes(name) or None) for name in NAMES]
    guard = engine().jax.sharding.global_shard_guard
    if resource is None:
        resource = mesh_resource()
        # Its operations are divided over the mesh when the program is compiled, and look there again.
        _lasting.close()
        _lasting.enter_context(guard(resource))
    with (
        guard(resource),
        nn.logical_axis_rules(rules),
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
    ):
        yield


@functools.partial(jax.tree_util.register_dataclass, data_fields=["bits"], meta_fields=["dtype"])
@dataclasses.dataclass(frozen=True)
class _Kept:
    """An array, or a constant, that waits for the backward pass, 8-bit floats as bytes."""

    bits: Any
    dtype: Any

    @classmethod
    def of(cls, array: Any) -> _Kept:
        dtype = jnp.asarray(array).dtype
        if dtype.itemsize == 1 and jnp.issubdtype(dtype, jnp.floating):
            return cls(jax.lax.bitcast_convert_type(array, jnp.uint8), dtype)
        return cls(array, None)

    def restored(self) -> Any:
        if self.dtype is None:
            return self.bits
        return jax.lax.bitcast_convert_type(self.bits, self.dtype)


def _quantizers(recipe, margin, scales, histories):
    quantize = engine().jax.quantize
    metas = [quantize.QuantizeMeta() for _ in range(3)]
    if scales is not None:
        metas = [
            quantize.QuantizeMeta(scale=scale, amax_history=history)
            for scale, history in zip(scales, histories)
        ]
    x, kernel, grad = metas
    return quantize.QuantizerFactory.create_set(
        fp8_recipe=_recipe(recipe, margin),
        quantize_meta_set=quantize.QuantizeMetaSet(x=x, kernel=kernel, grad=grad),
    )


def _recipe(name: str, margin: int) -> Any:
    made = getattr(engine().recipe, RECIPES[name])
    return made(margin=margin, amax_history_len=2) if name == "delayed" else made()


def check_recipe(name: str) -> None:
    """Raises one line where Transformer Engine, or the device, does not have the recipe."""
    there = engine()
    if not hasattr(there.recipe, RECIPES[name]):
        raise ValueError(
            f"FP8_RECIPE={name}: this Transformer Engine has no {RECIPES[name]}; use another recipe"
        )
    supported, why = there.jax.quantize.is_quantize_recipe_supported(RECIPES[name])
    if not supported:
        raise ValueError(f"FP8_RECIPE={name} cannot be used with USE_TE=True here: {why}")


def mesh_resource() -> Any:
    """The mesh axes in force, as Transformer Engine calls them."""
    axes = compat.current_mesh_shape()
    named = {f"{theirs}_resource": ours for ours, theirs in _AXES.items() if axes.get(ours, 1) > 1}
    return engine().jax.MeshResource(**named)


def engine() -> SimpleNamespace:
    """Its modules: `jax`, and `recipe`; one line where they are missing."""
    try:
        return SimpleNamespace(
            jax=importlib.import_module("transformer_engine.jax"),
            recipe=importlib.import_module("transformer_engine.common.recipe"),
        )
    except ImportError as error:
        text = f"USE_TE=True, but Transformer Engine is not installed ({error}): {_WITHOUT}"
    except (OSError, RuntimeError, AssertionError) as error:
        text = f"USE_TE=True, but Transformer Engine cannot be imported ({error}): {_WITHOUT}"
    raise ValueError(" ".join(text.split()))
