"""A GPT training step in plain JAX: functions and dicts, no framework; the yardstick for paxlike's.

It is written for speed on a CPU, with every form that was found to help (see docs/benchmarks.md), and knows as much of
meshes as a comparison needs. The mathematics is that of `Decoder`, `CausalLanguage`, `Optimizer` and `TrainStep`.

Shape legend: b rows, s length, d width, h heads, k head size, f hidden, v vocabulary, n rows of a matrix product.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from scripts.benchmarks import shapes

ROWS = ("data", "fsdp")
SPECS = {  # of parameters, by the last two names of their path
    "embedding/table": P("tensor", "fsdp"),
    "position/table": P(None, "fsdp"),
    "qkv/kernel": P(None, "fsdp", None, "tensor", None),
    "qkv/bias": P(None, None, "tensor", None),
    "out/kernel": P(None, "tensor", None, "fsdp"),
    "ffn1/kernel": P(None, "fsdp", "tensor"),
    "ffn1/bias": P(None, "tensor"),
    "ffn2/kernel": P(None, "tensor", "fsdp"),
}


def make(shape: shapes.Shape, *, mesh_shape=(1, 1, 1), dtype="float32", scan=False, remat=False):
    """The compiled step, the first state and the batches on the devices.

    Args:
      mesh_shape: sizes of the axes data, fsdp, tensor.
      scan, remat: loop over the layers; keep only the input of each for the backward pass.
    """
    devices = np.array(jax.devices()[: math.prod(mesh_shape)]).reshape(mesh_shape)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        place = jax.tree_util.tree_map_with_path(
            lambda path, _: NamedSharding(mesh, SPECS.get("/".join(p.key for p in path[-2:]), P())),
            jax.eval_shape(lambda: shapes.initial_parameters(shape)),
        )
        params = jax.device_put(shapes.initial_parameters(shape), place)
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)
        scalar = NamedSharding(mesh, P())
        state = (params, zeros(), zeros(), jax.device_put(jnp.zeros((), jnp.int32), scalar))
        rows = NamedSharding(mesh, P(ROWS, None))
        data = [jax.device_put(batch, rows) for batch in shapes.batches(shape)]
        function = functools.partial(
            _step,
            shape=shape,
            dtype=dtype,
            scan=scan,
            remat=remat,
            mesh_shape=mesh_shape,
            place=place,
        )
        jitted = jax.jit(function, donate_argnums=0, out_shardings=((place,) * 3 + (scalar,), None))
        return jitted.lower(state, data[0]).compile(), state, data


def _step(state, batch, *, place, mesh_shape, **model):
    params, m, v, count = state
    sharded = math.prod(mesh_shape) > 1
    loss = functools.partial(
        _loss, shard=_shard if sharded else lambda x, *_: x, tensor=mesh_shape[2], **model
    )
    (value, correct), gradients = jax.value_and_grad(loss, has_aux=True)(params, batch)
    if sharded:
        gradients = lax.with_sharding_constraint(gradients, place)
    norm, param_norm = _norm(gradients), _norm(params)
    factor = jnp.minimum(1.0, shapes.CLIP_NORM / jnp.maximum(norm, 1e-30))
    accepted, count = jnp.isfinite(norm), count + 1
    debias1 = 1 - shapes.B1 ** count.astype(jnp.float32)
    debias2 = 1 - shapes.B2 ** count.astype(jnp.float32)

    def update(p, g, m, v):
        g = g * factor
        m_new = shapes.B1 * m + (1 - shapes.B1) * g
        v_new = shapes.B2 * v + (1 - shapes.B2) * g * g
        direction = (m_new / debias1) / (jnp.sqrt(v_new / debias2) + shapes.EPSILON)
        p_new = p - shapes.LEARNING_RATE * (direction + shapes.WEIGHT_DECAY * p)
        return tuple(jnp.where(accepted, a, b) for a, b in ((p_new, p), (m_new, m), (v_new, v)))

    updated = jax.tree.map(update, params, gradients, m, v)
    params, m, v = (jax.tree.map(lambda _, u, i=i: u[i], params, updated) for i in range(3))
    return (params, m, v, count), {
        "loss": value,
        "accuracy": correct,
        "grad_norm": norm,
        "param_norm": param_norm,
    }


def _loss(params, batch, *, shape, dtype, scan, remat, shard, tensor):
    embedding = params["embedding"]["table"].astype(dtype)
    x = jnp.take(shard(embedding, "tensor", None), batch["tokens"], axis=0, mode="clip")
    x = shard(x + params["position"]["table"].astype(dtype)[None], ROWS, None, None)
    block = functools.partial(_block, heads=shape.heads, dtype=dtype, shard=shard)
    if remat:
        block = jax.checkpoint(block, prevent_cse=not scan)
    layers = params["stack"]["period_0"]
    if scan:
        x, _ = lax.scan(lambda x, layer: (block(x, layer), None), x, layers)
    else:
        for i in range(shape.layers):
            x = block(x, jax.tree.map(lambda leaf, i=i: leaf[i], layers))
    x = _layer_norm(x, params["norm"])
    weights = batch["weights"]
    chunks = 1 if shard is _shard else _num_chunks(shape)
    total, correct = _cross_entropy(x, embedding, batch["targets"], weights, chunks, tensor)
    weight = jnp.sum(weights)
    return total / (weight + 1e-6), correct / weight


def _block(x, layer, *, heads, dtype, shard):
    b, s, d = x.shape
    y = _layer_norm(x, layer["mixer_norm"])
    qkv = _linear(y, layer["mixer"]["qkv"], dtype).reshape(b, s, 3, heads, d // heads)
    q, k, v = jnp.moveaxis(shard(qkv, ROWS, None, None, "tensor", None), 2, 0)
    context = shard(_attention(q, k, v), ROWS, None, "tensor", None)
    x = x + shard(_linear(context.reshape(b, s, d), layer["mixer"]["out"], dtype), ROWS, None, None)
    y = _layer_norm(x, layer["ffn_norm"])
    hidden = jax.nn.gelu(shard(_linear(y, layer["ffn"]["ffn1"], dtype), ROWS, None, "tensor"))
    return x + shard(_linear(hidden, layer["ffn"]["ffn2"], dtype), ROWS, None, None)


def _layer_norm(x, p):
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(wide - mean), axis=-1, keepdims=True)
    return ((wide - mean) * lax.rsqrt(variance + 1e-5) * (1 + p["scale"]) + p["bias"]).astype(
        x.dtype
    )


def _linear(x, p, dtype):
    """On tokens flattened to two dimensions; the result is (b, s, features)."""
    b, s, d = x.shape
    kernel, bias = p["kernel"].astype(dtype), p["bias"].astype(dtype)
    # Kernels keep their heads dimension where it is an output: flattening it would lose its sharding.
    kernel = kernel.reshape(d, -1) if kernel.shape[0] != d else kernel
    y = _matmul(x.reshape(b * s, d), kernel)
    return y.reshape(b, s, *kernel.shape[1:]) + bias


@jax.custom_vjp
def _matmul(x, w):
    return lax.dot_general(x, w, (((1,), (0,)), ((), ())))


def _matmul_backward(residuals, dy):
    x, w = residuals
    outputs = tuple(range(1, w.ndim))
    dx = lax.dot_general(dy, w, ((outputs, outputs), ((), ())))
    return dx, _contract_rows(x, dy).astype(w.dtype)


_matmul.defvjp(lambda x, w: (_matmul(x, w), (x, w)), _matmul_backward)


def _contract_rows(a, b):
    """a^T b in float32. A small result that is taller than wide is computed lying: up to 1.5 x as fast."""
    if b.ndim > 2:  # XLA's CPU has no bfloat16 product of this form with a float32 result
        return lax.dot_general(a, b, (((0,), (0,)), ((), ())))
    product = functools.partial(
        lax.dot_general,
        dimension_numbers=(((0,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    if a.shape[1] > b.shape[1] and 4 * a.shape[1] * b.shape[1] <= 12 << 20:
        return lax.optimization_barrier(product(b, a)).T
    return product(a, b)


def _attention(q, k, v):
    """Causal, in up to four blocks of queries, each with the keys up to its end."""
    s, scale = q.shape[1], q.shape[-1] ** -0.5
    number = next((n for n in (4, 3, 2) if s % n == 0 and s // n >= 128), 1)
    size, parts = s // number, []
    for start in range(0, s, size):
        end = start + size
        scores = jnp.einsum(
            "bshk,bthk->bhst", q[:, start:end], k[:, :end], preferred_element_type=jnp.float32
        )
        mask = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :]
        scores = jnp.where(mask[None, None], scores * scale, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
        parts.append(jnp.einsum("bhst,bthk->bshk", weights, v[:, :end]))
    return jnp.concatenate(parts, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(x, table, targets, weights, chunks, tensor):
    return _cross_entropy_forward(x, table, targets, weights, chunks, tensor)[0]


def _cross_entropy_forward(x, table, targets, weights, chunks, tensor):
    """Loss, number of right guesses, and both gradients in one pass, a chunk of the logits in the cache at a time."""
    d = x.shape[-1]

    def one(gradient, piece):
        x, targets, weights = piece
        logits = lax.dot_general(
            x, table, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        index = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, :]
        onehot = targets[:, None] == index
        if tensor > 1:
            at = jnp.sum(jnp.where(onehot, logits, 0.0), axis=-1)
        else:
            at = jnp.take_along_axis(logits, targets[:, None], axis=-1, mode="clip")[:, 0]
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        beaten = jnp.where(index < targets[:, None], logits >= at[:, None], logits > at[:, None])
        probabilities = jnp.exp(logits - normaliser[:, None]) * weights[:, None]
        dlogits = (probabilities - jnp.where(onehot, weights[:, None], 0.0)).astype(x.dtype)
        dx = lax.dot_general(dlogits, table, (((1,), (0,)), ((), ())))
        sums = jnp.sum((normaliser - at) * weights), jnp.sum(~jnp.any(beaten, axis=-1) * weights)
        return gradient + _contract_rows(dlogits, x), (sums, dx)

    zeros = jnp.zeros(table.shape, jnp.float32)
    if chunks == 1:
        gradient, (sums, dx) = one(
            zeros, (x.reshape(-1, d), targets.reshape(-1), weights.reshape(-1))
        )
    else:
        pieces = x.reshape(chunks, -1, d), targets.reshape(chunks, -1), weights.reshape(chunks, -1)
        gradient, (sums, dx) = lax.scan(one, zeros, pieces)
        sums = jax.tree.map(jnp.sum, sums)
    return sums, (dx.reshape(x.shape), gradient.astype(table.dtype), targets, weights)


def _cross_entropy_backward(chunks, tensor, residuals, cotangents):
    del chunks, tensor
    dx, dtable, targets, weights = residuals
    g = cotangents[0]
    none = np.zeros(targets.shape, jax.dtypes.float0)
    return g.astype(dx.dtype) * dx, g.astype(dtable.dtype) * dtable, none, jnp.zeros_like(weights)


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _num_chunks(shape: shapes.Shape) -> int:
    """Logits of a chunk: 16 MiB, and no smaller than the gradient of the table."""
    limit = max(16 << 20, 4 * shape.width * shape.vocab)
    wanted = -(-4 * shape.tokens * shape.vocab // limit)
    return next(n for n in range(wanted, shape.tokens + 1) if shape.tokens % n == 0)


def _norm(tree):
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


def _shard(x, *axes):
    return lax.with_sharding_constraint(x, P(*axes))
