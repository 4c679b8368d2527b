"""Cross-entropy of a linear output layer that never holds the logits of the whole batch.

The loss of a row of hidden states needs one row of logits; with a vocabulary of 50,000 those of a batch are larger than
everything else in the model. `linear_cross_entropy` walks over the sequence in chunks and, because the loss is a scalar
whose derivative is known as soon as the logits are, computes the gradients in the same pass: nothing is recomputed.

Shape legend: b batch, s length, d width, v vocabulary. Softmax, loss and gradient sums are float32.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from paxlike import parallel
from paxlike.ops import platform
from paxlike.ops.matmul import contract_rows

AUTO_CHUNK_BYTES = 256 << 20  # float32 logits that one device may hold at a time
# Rows of a table that the products of a GPU want; XLA pads to 8, anew in every chunk.
GPU_MULTIPLE = 64
CPU_CHUNK_BYTES = 16 << 20  # of them that a CPU's last cache keeps between the passes over them


class CrossEntropy(NamedTuple):
    """Sums over the positions of a batch, each weighted."""

    loss: Float[Array, ""]  # nats
    z_loss: Float[Array, ""]  # sum of logsumexp^2 (PaLM, section 5)
    num_correct: Float[Array, ""]  # positions whose target is the argmax


def linear_cross_entropy(
    x: Float[Array, "b s d"],
    table: Float[Array, "v d"],
    targets: Int[Array, "b s"],
    weights: Float[Array, "b s"],
    *,
    chunk: int | None = None,
    z_loss: float = 0.0,
    logit_cap: float | None = None,
) -> tuple[Float[Array, ""], CrossEntropy]:
    """Sum of `weights * (nll + z_loss * logsumexp^2)` where the logits are `x @ table.T`, and its parts.

    Only the first result is differentiable. Derivatives reach `x` and `table`.

    Args:
      chunk: positions of a row whose logits exist at a time; `0` is the whole row, None chooses by the size of the
        logits on one device (256 MiB in float32; less on a CPU, see `_auto_chunk_bytes`).
      z_loss: coefficient of the squared log normaliser.
      logit_cap: the logits are cap * tanh(x @ table.T / cap) (Gemma 2).
    """
    x, targets, weights = (_as_rows(a) for a in (x, targets, weights))
    num_chunks, padding = _num_chunks(x.shape, table.shape[0], chunk)
    x, targets, weights = (_pad(a, padding) for a in (x, targets, weights))
    return _chunked(x, table, targets, weights, num_chunks, float(z_loss), logit_cap)


def token_cross_entropy(
    x: Float[Array, "b s d"],
    table: Float[Array, "v d"],
    targets: Int[Array, "b s"],
    *,
    chunk: int | None = None,
    logit_cap: float | None = None,
) -> tuple[Float[Array, "b s"], Bool[Array, "b s"]]:
    """Per position: negative log-likelihood in nats, and whether the target is the argmax. For evaluation."""
    b = x.shape[0]
    x, targets = _as_rows(x), _as_rows(targets)
    length = x.shape[1]
    num_chunks, padding = _num_chunks(x.shape, table.shape[0], chunk)
    x, targets = _pad(x, padding), _pad(targets, padding)
    table = _gather_table(table, x.dtype)

    def one(piece):
        x, targets = piece
        logits, log_normaliser = _logits(x, table, logit_cap)
        at = _at(logits, targets)
        return log_normaliser - at, _is_argmax(logits, at, targets)

    if num_chunks == 1:
        nll, correct = one((x, targets))
    else:
        nll, correct = jax.lax.map(one, (_split(x, num_chunks), _split(targets, num_chunks)))
        nll, correct = _join(nll)[:, :length], _join(correct)[:, :length]
    return _from_rows(nll, b), _from_rows(correct, b)


def _as_rows(x):
    """(b, s, ...) -> (c * b, s / c, ...) where each row is spread over c devices: each of its parts is a row here.

    A loss does not ask which row a token is of. Nothing moves, and the chunks below are of what a device has.
    """
    parts = parallel.num_shards("length")
    if parts == 1:
        return x
    b, s, *rest = x.shape
    rows = jnp.swapaxes(x.reshape(b, parts, s // parts, *rest), 0, 1)
    rows = rows.reshape(parts * b, s // parts, *rest)
    return parallel.shard(rows, "batch_shards", *(None,) * (x.ndim - 1))


def _from_rows(x, b: int):
    """The inverse of `_as_rows`, to b rows."""
    if x.shape[0] == b:
        return x
    parts, length = x.shape[0] // b, x.shape[1]
    return jnp.swapaxes(x.reshape(parts, b, length), 0, 1).reshape(b, parts * length)


def _num_chunks(shape: tuple[int, ...], vocab_size: int, chunk: int | None) -> tuple[int, int]:
    """Number of chunks, and positions of weight 0 that each row is lengthened by so that it divides."""
    b, s, width = shape
    if chunk == 0:
        return 1, 0
    if chunk is None:
        rows = max(1, b // parallel.num_shards("batch_shards"))
        columns = vocab_size // parallel.num_shards("act_vocab")
        wanted = -(-4 * rows * s * columns // _auto_chunk_bytes(4 * width * columns))
    else:
        wanted = -(-s // chunk)
    wanted = min(max(wanted, 1), s)
    even = next(n for n in range(wanted, s + 1) if s % n == 0)
    if even <= 2 * wanted:
        return even, 0
    return wanted, -s % wanted  # a length without small divisors


def _pad(x, padding: int):
    """`x` with zeros behind its rows."""
    return jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2)) if padding else x


def _auto_chunk_bytes(table_bytes: int) -> int:
    """Logits of one chunk. On a CPU as many as stay in the cache: a tenth off the time of the loss.

    But no smaller than the gradient of the table, which each chunk reads and writes.
    """
    if not platform.is_cpu():
        return AUTO_CHUNK_BYTES
    return min(AUTO_CHUNK_BYTES, max(CPU_CHUNK_BYTES, table_bytes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _chunked(x, table, targets, weights, num_chunks, z_loss, logit_cap):
    """The value alone: what runs where nothing is differentiated."""
    full, vocab_size = _padded(_gather_table(table, x.dtype), logit_cap), table.shape[0]

    def one(piece):
        return _sums(*piece, full, vocab_size, z_loss, logit_cap)[0]

    pieces = [_split(a, num_chunks) for a in (x, targets, weights)]
    if num_chunks == 1:
        parts = one([p[0] for p in pieces])
    else:
        parts = jax.tree.map(lambda a: jnp.sum(a, axis=0), jax.lax.map(one, pieces))
    return parts.loss + z_loss * parts.z_loss, parts


def _chunked_forward(x, table, targets, weights, num_chunks, z_loss, logit_cap):
    full, vocab_size = _padded(_gather_table(table, x.dtype), logit_cap), table.shape[0]
    shards = _row_shards(x.shape[0])

    def one(gradient, piece):
        x, targets, weights = piece
        parts, dlogits = _sums(
            x, targets, weights, full, vocab_size, z_loss, logit_cap, gradient=True
        )
        dx = _contract(dlogits, full, ((2,), (0,)))
        gradient = gradient + _table_gradient(dlogits, x, shards)
        return gradient, (
            parts,
            parallel.shard(dx.astype(x.dtype), "batch_shards", None, "act_embed"),
        )

    zeros = jnp.zeros((shards, *full.shape), jnp.float32)
    if num_chunks == 1:
        gradient, (parts, dx) = one(zeros, (x, targets, weights))
    else:
        zeros = parallel.shard(zeros, "batch_shards" if shards > 1 else None, "vocab", None)
        pieces = tuple(_split(a, num_chunks) for a in (x, targets, weights))
        gradient, (parts, dx) = jax.lax.scan(one, zeros, pieces)
        parts, dx = jax.tree.map(lambda a: jnp.sum(a, axis=0), parts), _join(dx)
    # One reduction over the shards of the batch, after the loop rather than in it.
    gradient = jnp.sum(gradient, axis=0)[:vocab_size]
    dtable = parallel.shard(gradient, "vocab", "embed").astype(table.dtype)
    return (parts.loss + z_loss * parts.z_loss, parts), (dx, dtable, targets, weights)


def _chunked_backward(num_chunks, z_loss, logit_cap, residuals, cotangents):
    del num_chunks, z_loss, logit_cap
    dx, dtable, targets, weights = residuals
    g = cotangents[0]
    zero = jnp.zeros(targets.shape, jax.dtypes.float0)
    # In float32: rounded to 16 bits, 1 / tokens would scale the body otherwise than the table.
    dx = (g * dx.astype(jnp.float32)).astype(dx.dtype)
    return dx, (g * dtable).astype(dtable.dtype), zero, jnp.zeros_like(weights)


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _sums(x, targets, weights, table, vocab_size, z_loss, logit_cap, gradient: bool = False):
    """Weighted sums over one chunk and, if asked, the derivative with respect to its logits in the compute dtype."""
    logits, log_normaliser = _logits(x, table, logit_cap, vocab_size)
    at = _at(logits, targets)
    nll = log_normaliser - at
    parts = CrossEntropy(
        loss=jnp.sum(nll * weights),
        z_loss=jnp.sum(jnp.square(log_normaliser) * weights),
        num_correct=jnp.sum(_is_argmax(logits, at, targets) * weights),
    )
    if not gradient:
        return parts, None
    # d nll/d logits = softmax - onehot;  d lse^2/d logits = 2 lse softmax
    probabilities = jnp.exp(logits - log_normaliser[..., None])
    factor = weights * (1.0 + 2.0 * z_loss * log_normaliser) if z_loss else weights
    onehot = _onehot(targets, logits.shape[-1])
    dlogits = probabilities * factor[..., None] - jnp.where(onehot, weights[..., None], 0.0)
    if logit_cap is not None:  # d cap tanh(l / cap) / dl
        dlogits = dlogits * (1.0 - jnp.square(logits / logit_cap))
    return parts, parallel.shard(dlogits.astype(x.dtype), "batch_shards", None, "act_vocab")


def _logits(x, table, logit_cap, vocab_size: int | None = None):
    logits = _contract(x, table, ((2,), (1,)), preferred_element_type=jnp.float32)
    if vocab_size is not None and vocab_size < table.shape[0]:  # no token has the rows behind
        logits = jnp.where(jnp.arange(table.shape[0]) < vocab_size, logits, -jnp.inf)
    if logit_cap is not None:
        logits = logit_cap * jnp.tanh(logits / logit_cap)
    logits = parallel.shard(logits, "batch_shards", None, "act_vocab")
    return logits, jax.nn.logsumexp(logits, axis=-1)


def _contract(x, w, dims, **kwargs):
    """Contraction of the last dimension of (b, s, n), as one matrix product of b*s rows."""
    b, s, n = x.shape
    flat = jax.lax.dot_general(x.reshape(b * s, n), w, (((1,), dims[1]), ((), ())), **kwargs)
    return flat.reshape(b, s, -1)


def _table_gradient(dlogits, x, shards: int):
    """(shards, v, d): each shard of the batch sums its own rows, so that no reduction is needed in the loop."""
    b, s, v = dlogits.shape
    rows = b // shards * s
    if shards == 1:  # without a batch dimension, which would cost a transposition
        return contract_rows(dlogits.reshape(rows, v), x.reshape(rows, -1))[None]
    gradient = contract_rows(dlogits.reshape(shards, rows, v), x.reshape(shards, rows, -1))
    return parallel.shard(gradient, "batch_shards", "vocab", None)


def _row_shards(b: int) -> int:
    shards = parallel.num_shards("batch_shards")
    return shards if b % shards == 0 else 1


def _at(logits, targets):
    if parallel.num_shards("act_vocab") == 1:
        # A masked sum would be one more pass over the logits, and on a CPU one more array of their size.
        return jnp.take_along_axis(logits, targets[..., None], axis=-1, mode="clip")[..., 0]
    # Right where the vocabulary is sharded, too: a gather would bring all logits to each device.
    return jnp.sum(jnp.where(_onehot(targets, logits.shape[-1]), logits, 0.0), axis=-1)


def _onehot(targets, vocab_size: int):
    return targets[..., None] == jnp.arange(vocab_size, dtype=targets.dtype)[None, None, :]


def _is_argmax(logits, at, targets):
    """Whether the target, whose logit is `at`, is the first of the largest.

    Compared rather than searched for: an argmax is a reduction over pairs, which a CPU does one by one.
    """
    index = jnp.arange(logits.shape[-1], dtype=targets.dtype)[None, None, :]
    before = index < targets[..., None]
    beaten = jnp.where(before, logits >= at[..., None], logits > at[..., None])
    return ~jnp.any(beaten, axis=-1)


def _gather_table(table, dtype):
    """The table in the compute dtype, whole along its width: gathered over fsdp once, not in every chunk."""
    return parallel.shard(table.astype(dtype), "vocab", None)


def _padded(table, logit_cap):
    """The table with rows of zeros up to a multiple that suits the products of a GPU: once, not in every chunk."""
    missing = -table.shape[0] % GPU_MULTIPLE
    whole = parallel.num_shards("vocab") == parallel.num_shards("act_vocab") == 1
    if not platform.is_nvidia() or not whole or logit_cap is not None or not missing:
        return table
    return jnp.pad(table, ((0, missing), (0, 0)))


def _split(x, num_chunks: int):
    """(b, s, ...) -> (chunks, b, s / chunks, ...)."""
    b, s, *rest = x.shape
    return jnp.moveaxis(x.reshape(b, num_chunks, s // num_chunks, *rest), 1, 0)


def _join(x):
    """The inverse of `_split`."""
    chunks, b, s, *rest = x.shape
    return jnp.moveaxis(x, 0, 1).reshape(b, chunks * s, *rest)
