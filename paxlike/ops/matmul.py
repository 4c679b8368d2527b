"""Matrix product with a weight, and its gradient, in the form that is fast where they run.

Shape legend: n rows (tokens), p inputs, q outputs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from paxlike.ops import platform

_WEIGHT = (((1,), (0,)), ((), ()))  # x w
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


def matmul(x: Float[Array, "n p"], w: Float[Array, "p *q"]) -> Float[Array, "n *q"]:
    """x w."""
    # What differentiation writes down for the gradient of w is the transpose of dy^T x. On a mesh of CPUs it stays so.
    return _matmul(x, w) if platform.is_cpu() else jax.lax.dot_general(x, w, _WEIGHT)


@jax.custom_vjp
def _matmul(x, w):
    return jax.lax.dot_general(x, w, _WEIGHT)


def _forward(x, w):
    # The product itself, not `_matmul`: inside of that a policy of rematerialisation would not see it.
    return jax.lax.dot_general(x, w, _WEIGHT), (x, w)


def _backward(residuals, dy):
    x, w = residuals
    features = tuple(range(1, w.ndim))
    dx = jax.lax.dot_general(dy, w, ((features, features), ((), ())))
    if w.ndim == 2:
        return dx, contract_rows(x, dy).astype(w.dtype)
    # XLA has no bfloat16 product of this form with a float32 result for a CPU.
    return dx, jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ()))).astype(w.dtype)


_matmul.defvjp(_forward, _backward)


def _transposed(p: int, q: int) -> bool:
    return platform.is_cpu() and p > q and 4 * p * q <= CPU_TRANSPOSED_BYTES


def _contract_rows(a, b):
    batch = tuple(range(a.ndim - 2))
    dimensions = (((a.ndim - 2,), (a.ndim - 2,)), (batch, batch))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
