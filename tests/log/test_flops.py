"""FLOPs counted from shapes: against hand formulas and against XLA's own count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from paxlike.log.flops import matmul_flops, train_flops


def shape(*dims, dtype="float32"):
    return jax.ShapeDtypeStruct(dims, dtype)


def xla_flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def attention(q, k, v):
    s, t = q.shape[1], k.shape[1]
    scores = jnp.einsum("bshk,bthk->bhst", q, k)
    mask = jnp.arange(s)[:, None] >= jnp.arange(t)[None, :]
    weights = jax.nn.softmax(jnp.where(mask[None, None], scores, -1e9))
    return jnp.einsum("bhst,bthk->bshk", weights, v)


def causal_attention(q, k, v):
    return attention(q, k, v)


B, S, D, H, F, V, LAYERS = 2, 64, 128, 4, 512, 1024, 2


def layer(x, w):
    q, k, v = (jnp.einsum("bsd,dhk->bshk", x, w[name]) for name in "qkv")
    out = jax.jit(causal_attention)(q, k, v)
    x = x + jnp.einsum("bshk,hkd->bsd", out, w["o"])
    return x + jax.nn.relu(x @ w["up"]) @ w["down"]


def network(w, x):
    for index in range(LAYERS):
        x = layer(x, {name: stacked[index] for name, stacked in w["layers"].items()})
    return jnp.mean(jax.nn.logsumexp(x @ w["out"], axis=-1))


def scanned_network(w, x):
    x, _ = jax.lax.scan(lambda x, w: (layer(x, w), None), x, w["layers"])
    return jnp.mean(jax.nn.logsumexp(x @ w["out"], axis=-1))


WEIGHTS = {
    "layers": {
        **{name: shape(LAYERS, D, H, D // H) for name in "qkv"},
        "o": shape(LAYERS, H, D // H, D),
        "up": shape(LAYERS, D, F),
        "down": shape(LAYERS, F, D),
    },
    "out": shape(D, V),
}
X = shape(B, S, D)
WEIGHT_FLOPS = 2 * B * S * (LAYERS * (4 * D * D + 2 * D * F) + D * V)
ATTENTION_FLOPS = LAYERS * 4 * B * S * S * D  # whole square


def test_network_by_hand():
    assert matmul_flops(network, WEIGHTS, X) == WEIGHT_FLOPS + ATTENTION_FLOPS // 2
    assert matmul_flops(network, WEIGHTS, X, causal_share=1.0) == WEIGHT_FLOPS + ATTENTION_FLOPS


def test_network_against_xla():
    # XLA counts the whole square of attention, and adds, masks, softmax and logsumexp as well: a
    # few operations for each element that a product of length >= 64 made, so less than 3 / 64.
    counted = matmul_flops(network, WEIGHTS, X, causal_share=1.0)
    assert counted <= xla_flops(network, WEIGHTS, X) <= 1.03 * counted


def test_training_against_xla():
    step = jax.value_and_grad(network, argnums=(0, 1))
    counted = train_flops(network, WEIGHTS, X, causal_share=1.0)
    assert counted == 3 * matmul_flops(network, WEIGHTS, X, causal_share=1.0)
    assert counted == matmul_flops(step, WEIGHTS, X, causal_share=1.0)
    assert counted <= xla_flops(step, WEIGHTS, X) <= 1.05 * counted


def test_the_causal_share_holds_in_a_differentiated_function():
    step = jax.value_and_grad(network, argnums=(0, 1))
    assert matmul_flops(step, WEIGHTS, X) == train_flops(network, WEIGHTS, X)


def test_scan_counts_like_unrolled():
    expected = matmul_flops(network, WEIGHTS, X)
    assert matmul_flops(scanned_network, WEIGHTS, X) == expected
    assert matmul_flops(jax.checkpoint(scanned_network), WEIGHTS, X) == expected
    assert matmul_flops(jax.jit(scanned_network), WEIGHTS, X) == expected


def test_only_the_forward_pass_of_remat_is_work():
    remat = jax.checkpoint(network)
    assert train_flops(remat, WEIGHTS, X) == train_flops(network, WEIGHTS, X)
    assert matmul_flops(jax.grad(remat), WEIGHTS, X) > matmul_flops(jax.grad(network), WEIGHTS, X)


def test_nothing_is_allocated():
    size = 10**6
    assert matmul_flops(jnp.dot, shape(size, size), shape(size, size)) == 2 * size**3


def test_batched_dot():
    f = lambda a, b: jnp.einsum("bij,bkj->bik", a, b)
    assert matmul_flops(f, shape(5, 2, 3), shape(5, 4, 3)) == 2 * 5 * 2 * 3 * 4


def test_cond_counts_its_dearest_branch():
    def f(x):
        branches = [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x]
        return jax.lax.switch(x[0, 0].astype(int), branches, x)

    assert matmul_flops(f, shape(4, 4)) == 2 * 2 * 4**3


def test_while_is_refused_unless_it_holds_no_products():
    def f(x):
        return jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, x)

    with pytest.raises(ValueError, match=r"while loop with 128 FLOPs a turn.*use jax.lax.scan"):
        matmul_flops(f, shape(4, 4))
    halve = lambda x: jax.lax.while_loop(lambda x: x[0, 0] > 1, lambda x: x / 2, x @ x)
    assert matmul_flops(halve, shape(4, 4)) == 128
    assert (
        matmul_flops(lambda x: jax.lax.fori_loop(0, 3, lambda _, x: x @ x, x), shape(4, 4))
        == 3 * 128
    )


def test_functions_with_their_own_derivative():
    square = lambda x: x @ x
    with_vjp = jax.custom_vjp(square)
    with_vjp.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))
    with_jvp = jax.custom_jvp(square)
    with_jvp.defjvp(lambda x, t: (x[0] @ x[0], t[0] @ x[0] + x[0] @ t[0]))
    for f in (with_vjp, with_jvp):
        assert matmul_flops(f, shape(4, 4)) == 128
        step = jax.jit(lambda x, f=f: jax.vjp(f, x)[1](x))
        assert matmul_flops(step, shape(4, 4)) >= 256


def test_shard_map_counts_every_shard():
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = PartitionSpec("data", None)
    f = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec
    )
    # Each of the 2 data shards has 4 rows; the 2 tensor shards do the same work again.
    assert matmul_flops(f, shape(8, 3), shape(3, 5)) == 2 * (2 * 8 * 3 * 5)
    partial = jax.shard_map(
        lambda x, w: x @ w,
        mesh=mesh,
        in_specs=(spec, PartitionSpec()),
        out_specs=spec,
        axis_names={"data"},
    )
    assert matmul_flops(partial, shape(8, 3), shape(3, 5)) == 2 * 8 * 3 * 5


@pytest.mark.parametrize("groups", [1, 3])
def test_convolution(groups):
    def f(x, w):
        return jax.lax.conv_general_dilated(x, w, (2, 2), "VALID", feature_group_count=groups)

    x, w = shape(2, 3, 9, 9), shape(6, 3 // groups, 3, 3)
    expected = 2 * (2 * 6 * 4 * 4) * (9 * 3 // groups)
    assert matmul_flops(f, x, w) == expected == xla_flops(f, x, w)


def test_transposed_convolution_is_counted_from_its_input():
    def f(x, w):
        return jax.lax.conv_transpose(
            x, w, (2, 2), "VALID", dimension_numbers=("NCHW", "OIHW", "NCHW")
        )

    x, w = shape(2, 3, 5, 5), shape(6, 3, 2, 2)
    assert matmul_flops(f, x, w) == 2 * (2 * 3 * 5 * 5) * (2 * 2 * 6) == xla_flops(f, x, w)


def test_grouped_products_meet_one_expert_each():
    groups = jnp.array([3, 5])
    f = lambda x, w: jax.lax.ragged_dot(x, w, groups)
    x, w = shape(8, 4), shape(2, 4, 6)
    assert matmul_flops(f, x, w) == 2 * 8 * 4 * 6
    # Each gradient is a product with the same number of multiply-adds.
    step = jax.value_and_grad(lambda x, w: f(x, w).sum(), argnums=(0, 1))
    assert matmul_flops(step, x, w) == train_flops(f, x, w)


def test_pallas_kernel_counts_every_grid_point():
    def kernel(x_ref, y_ref, o_ref):
        o_ref[...] = jnp.dot(x_ref[...], y_ref[...])

    f = pl.pallas_call(
        kernel,
        grid=(4,),
        in_specs=[pl.BlockSpec((8, 16), lambda i: (i, 0)), pl.BlockSpec((16, 8), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((8, 8), lambda i: (i, 0)),
        out_shape=shape(32, 8),
        interpret=True,
    )
    assert matmul_flops(f, shape(32, 16), shape(16, 8)) == 2 * 32 * 16 * 8


def test_cudnn_attention_counts_like_the_reference(monkeypatch):
    cudnn = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    # Only the tracing: this machine has no cuDNN to ask for its version.
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_is_flash_attention", lambda *args, **kwargs: None)

    def fused(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    def causal_attention(q, k, v):
        return fused(q, k, v)

    q, kv = shape(2, 64, 4, 32, dtype="bfloat16"), shape(2, 128, 4, 32, dtype="bfloat16")
    whole = matmul_flops(fused, q, kv, kv)
    assert whole == 4 * 2 * 4 * 64 * 128 * 32 == matmul_flops(attention, q, kv, kv)
    assert matmul_flops(jax.jit(causal_attention), q, kv, kv) == whole // 2
    loss = lambda q, k, v: fused(q, k, v).astype("float32").sum()
    # Forward 2 products; backward the scores again (they are not kept) and 4 gradients.
    assert matmul_flops(jax.grad(loss, argnums=(0, 1, 2)), q, kv, kv) == whole * 7 // 2


def test_products_hidden_in_foreign_primitives_are_refused():
    hidden = jax.ffi.ffi_call("fused_matmul_gelu", shape(4, 4))
    with pytest.raises(
        ValueError, match=r"'fused_matmul_gelu' hides its matrix products.*plain XLA"
    ):
        matmul_flops(hidden, shape(4, 4))
    harmless = jax.ffi.ffi_call("rms_norm", shape(4, 4))
    assert matmul_flops(lambda x: harmless(x) @ x, shape(4, 4)) == 128


def test_concrete_arguments_work_too():
    assert matmul_flops(jnp.dot, np.ones((2, 3)), jnp.ones((3, 4))) == 48
