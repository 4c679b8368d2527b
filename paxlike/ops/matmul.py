"""Matrix product with a weight, and its gradient, in the form that is fast where they run.

Shape legend: n rows (tokens), p inputs, q outputs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from paxlike.ops import platform

_WEIGHT = (((1,), (0,)), ((), ()))  # x w
_OTHER = (((1,), (1,)), ((), ()))  # dy w^T
CPU_TRANSPOSED_BYTES = (
    12 << 20
)  # of a result that is cheap to transpose: it is still in a CPU's cache


def contract_rows(
    a: Float[Array, "*batch n p"], b: Float[Array, "*batch n q"]
) -> Float[Array, "*batch p q"]:
    """a^T b, accumulated and returned in float32: the gradient of a weight from its inputs and their cotangents."""
    if _transposed(a.shape[-1], b.shape[-1]):
        # XLA's CPU product of this form takes up to 1.5 x the time when its result is taller than wide. The barrier
        # keeps the compiler from undoing the transposition.
        return jnp.swapaxes(jax.lax.optimization_barrier(_contract_rows(b, a)), -1, -2)
    return _contract_rows(a, b)


def matmul(x: Float[Array, "n p"], w: Float[Array, "p q"]) -> Float[Array, "n q"]:
    """x w."""
    # Only where `contract_rows` differs from what differentiation writes down.
    if _transposed(*w.shape):
        return _matmul(x, w)
    return jax.lax.dot_general(x, w, _WEIGHT)


@jax.custom_vjp
def _matmul(x, w):
    return jax.lax.dot_general(x, w, _WEIGHT)


def _forward(x, w):
    return _matmul(x, w), (x, w)


def _backward(residuals, dy):
    x, w = residuals
    return jax.lax.dot_general(dy, w, _OTHER), contract_rows(x, dy).astype(w.dtype)


_matmul.defvjp(_forward, _backward)


def _transposed(p: int, q: int) -> bool:
    return platform.is_cpu() and p > q and 4 * p * q <= CPU_TRANSPOSED_BYTES


def _contract_rows(a, b):
    batch = tuple(range(a.ndim - 2))
    dimensions = (((a.ndim - 2,), (a.ndim - 2,)), (batch, batch))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
