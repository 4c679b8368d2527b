"""FLOPs of a function, counted from the shapes in its jaxpr.

The count is of what the model needs, not of what a compiler makes of it: matrix products and
convolutions, 2 FLOPs per multiply-add. Everything else is below a percent of a transformer's work
at the sizes where utilisation matters. The function is traced on abstract arguments, so a model of
175B parameters is counted on a laptop with nothing allocated. Of whole models the forward pass is
counted: `train_flops` takes the backward pass as twice the forward (one product for the gradient of
each operand), so that recomputation under remat is no work.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax

CAUSAL_ATTENTION = "causal_attention"
"""The name of the jitted function in which a query attends to itself and to earlier keys only."""

CAUSAL_SHARE = 0.5
"""The counted share of the products of causal attention: it needs the lower triangle only."""

_FUSED_FORWARD = re.compile(r"^dot_product_attention(_fp8)?_fwd(_wrapper)?$")
_FUSED_BACKWARD = re.compile(r"^dot_product_attention(_fp8)?_bwd(_wrapper)?$")
_TURNS = re.compile(r"about_(\d+)_turns\)*(?:/while)?$")
_OPAQUE = re.compile(r"gemm|matmul|attn|attention")


def matmul_flops(
    function: Callable[..., Any], *abstract_args: Any, causal_share: float = CAUSAL_SHARE
) -> int:
    """FLOPs of the matrix products and convolutions in one call of `function`, over all devices.

    A scan counts its length times, a `cond` its dearest branch, a `shard_map` once per shard, a
    Pallas kernel once per grid point (masks inside a kernel are not seen). A `while` loop has no
    known length, unless its name tells one (`turns`).

    Args:
        function: traceable by `jax.make_jaxpr`; not executed.
        *abstract_args: arrays or `jax.ShapeDtypeStruct`s, or pytrees of them.
        causal_share: the share counted inside functions jitted under the name `causal_attention`.

    Raises:
        ValueError: matrix products in a `while` loop, or hidden in a primitive of another library.

    Example:
        >>> import jax.numpy as jnp
        >>> matmul_flops(jnp.dot, jax.ShapeDtypeStruct((2, 3), "float32"), jnp.zeros((3, 5)))
        60
    """
    return round(_count(jax.make_jaxpr(function)(*abstract_args), causal_share))


def train_flops(
    forward: Callable[..., Any], *abstract_args: Any, causal_share: float = CAUSAL_SHARE
) -> int:
    """FLOPs of one training step whose loss is `forward`: three times the forward pass."""
    return 3 * matmul_flops(forward, *abstract_args, causal_share=causal_share)


def traced_flops(jaxpr: Any, *, causal_share: float = 1.0) -> int:
    """FLOPs of what was traced, backward pass and recomputation included; see `matmul_flops`.

    Args:
        jaxpr: of a traced function (`jax.make_jaxpr`, `Traced.jaxpr`).
        causal_share: 1.0, as a plain causal attention computes all scores.
    """
    return round(_count(jaxpr, causal_share))


def _count(jaxpr: Any, causal_share: float) -> float:
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)  # a ClosedJaxpr holds the Jaxpr
    return sum(_count_equation(equation, causal_share) for equation in jaxpr.eqns)


def _count_equation(equation: Any, causal_share: float) -> float:
    name, params = equation.primitive.name, equation.params
    if name in _LEAVES:
        return _LEAVES[name](equation)
    if _FUSED_FORWARD.match(name):
        return _fused_attention(equation, num_products=2)
    if _FUSED_BACKWARD.match(name):
        return _fused_attention(equation, num_products=5)
    if name.startswith("te_") or name == "ffi_call":
        _refuse_opaque(name, params)
    if name == "while":
        return _while(equation, causal_share)
    inner = [_count(jaxpr, causal_share) for jaxpr in _inner_jaxprs(params)]
    if name == "cond":
        return max(inner)
    return sum(inner) * _times(name, params, causal_share)


def _times(name: str, params: dict[str, Any], causal_share: float) -> float:
    """How often the jaxpr inside an equation runs."""
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        shape = dict(params["mesh"].shape)
        axes = params.get("newly_manual_axes", params.get("manual_axes", shape))
        return math.prod(shape[axis] for axis in axes)
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    # Transformations wrap the name: "jvp(causal_attention)".
    if re.split(r"[()]", str(params.get("name", "")).rstrip(")"))[-1] == CAUSAL_ATTENTION:
        return causal_share
    return 1


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns") or hasattr(getattr(item, "jaxpr", None), "eqns"):
                yield item


def turns(name: str) -> int | None:
    """How often a loop turns, about, whose length is computed, from the last scope of its name: `about_8_turns`."""
    found = _TURNS.search(name)
    return int(found[1]) if found else None


def _while(equation: Any, causal_share: float) -> float:
    flops = sum(_count(jaxpr, causal_share) for jaxpr in _inner_jaxprs(equation.params))
    about = turns(str(equation.source_info.name_stack))
    if about is not None:
        return about * flops
    if flops:
        raise ValueError(
            f"cannot count FLOPs: a while loop with {flops:,.0f} FLOPs a turn has no known number "
            "of turns; use jax.lax.scan, or fori_loop with constant bounds"
        )
    return 0


def _refuse_opaque(name: str, params: dict[str, Any]) -> None:
    target = str(params.get("target_name", name)).lower()
    if _OPAQUE.search(target):
        raise ValueError(
            f"cannot count FLOPs: the primitive {target!r} hides its matrix products; "
            "count the same model built with the plain XLA backend"
        )


def _dot_general(equation: Any) -> int:
    """Output elements times the length of the contraction."""
    ((contracting, _), _) = equation.params["dimension_numbers"]
    lhs, out = equation.invars[0].aval, equation.outvars[0].aval
    return 2 * out.size * math.prod(lhs.shape[dim] for dim in contracting)


def _ragged_dot_general(equation: Any) -> int:
    """Grouped products (mixture of experts): each row meets the matrix of its own group only."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    ((contracting, _), _) = numbers.dot_dimension_numbers
    lhs, groups, out = equation.invars[0].aval, equation.invars[2].aval, equation.outvars[0].aval
    flops = 2 * out.size * math.prod(lhs.shape[dim] for dim in contracting)
    # With a ragged contraction the groups share its length; the output has a matrix for each.
    is_split = set(numbers.lhs_ragged_dimensions) & set(contracting)
    return flops // groups.shape[-1] if is_split else flops


def _convolution(equation: Any) -> int:
    """Output elements times kernel taps times input features of a group; taps on padding count."""
    lhs, rhs = equation.invars[0].aval, equation.invars[1].aval
    numbers = equation.params["dimension_numbers"]
    taps = math.prod(rhs.shape[dim] for dim in numbers.rhs_spec[2:])
    if any(dilation > 1 for dilation in equation.params["lhs_dilation"]):
        # A transposed convolution: most taps meet zeros between the inputs. Count from the input.
        out_features = rhs.shape[numbers.rhs_spec[0]] // equation.params["feature_group_count"]
        return 2 * lhs.size * taps * out_features
    return 2 * equation.outvars[0].aval.size * taps * rhs.shape[numbers.rhs_spec[1]]


def _fused_attention(equation: Any, *, num_products: int) -> int:
    """cuDNN attention: each product has b h s t k multiply-adds (2 forward, 5 backward)."""
    query, key, value = (variable.aval.shape for variable in equation.invars[:3])
    sequence = 2 if equation.params["layout"] == 1 else 1  # layout 0 is (b s h k), 1 is (b h s k)
    pairs = query[0] * query[3 - sequence] * query[sequence] * key[sequence]
    if num_products == 2:
        return 2 * pairs * (query[3] + value[3])
    return 2 * pairs * (3 * query[3] + 2 * value[3])


_LEAVES = {
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot_general,
    "conv_general_dilated": _convolution,
}
