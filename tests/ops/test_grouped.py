"""Products of rows in groups: against one product a group, and what they take."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parallel import meshes

from paxlike.log.flops import matmul_flops
from paxlike.ops import fp8
from paxlike.ops.grouped import (
    fetch,
    grouped_matmul,
    grouped_matmul_fp8,
    grouped_matmul_reference,
)
from paxlike.ops.platform import Hardware, traced_for

SIZES = {
    "even": [5, 5, 5, 5],
    "uneven": [0, 13, 1, 6],
    "one takes all": [0, 0, 20, 0],
    "none": [0, 0, 0, 0],
    "rows beyond": [3, 0, 4, 2],
    "more than a block": [0, 60, 1, 39],
}


def operands(rows=20, p=6, q=4, e=4, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((rows, p), (e, p, q), (rows, q))
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes)]


@pytest.mark.parametrize(
    ("hardware", "share"),
    [(None, 1), (Hardware("cuda", 9.0), 1), (Hardware("cuda", 9.0), 4), (Hardware("tpu"), 4)],
    ids=["cpu", "gpu", "gpu, few rows", "tpu"],
)
@pytest.mark.parametrize("name", SIZES)
def test_values_and_gradients_equal_one_product_a_group(name, hardware, share):
    sizes = SIZES[name]
    x, w, dy = operands(rows=max(20, sum(sizes)))
    ends = np.cumsum(sizes)

    def naive(x, w):
        parts = [x[end - n : end] @ w[i] for i, (n, end) in enumerate(zip(sizes, ends))]
        left = jnp.zeros((x.shape[0] - ends[-1], w.shape[2]))
        return jnp.concatenate([*parts, left])

    def ours(x, w):
        if hardware is None:
            return grouped_matmul(x, w, jnp.asarray(sizes), share)
        with traced_for(hardware):
            return grouped_matmul(x, w, jnp.asarray(sizes), share)

    def results(function):
        def both(x, w):
            y, pull = jax.vjp(function, x, w)
            if hardware is None:
                return y, pull(dy)
            with traced_for(hardware):
                return y, pull(dy)

        return jax.jit(both)(x, w)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        results(ours),
        results(naive),
    )


GPU = Hardware("cuda", 9.0)


@pytest.mark.parametrize(
    ("name", "recipe", "hardware"),
    [("more than a block", "delayed", None), ("rows beyond", "current", GPU)],
)
def test_in_8_bits_they_equal_an_8_bit_product_a_group(name, recipe, hardware):
    sizes = SIZES[name]
    used, ends = sum(sizes), np.cumsum(sizes)
    x, w, dy = operands(max(20, used), 16, 32)
    dy *= 1e-6
    given = jnp.stack([jnp.max(jnp.abs(t)) for t in (x[:used], w, dy[:used])])
    # What belongs to no group is not looked at.
    x, dy = (t.at[used:].set(jnp.nan) for t in (x, dy))

    def naive(x, w, peaks):
        groups = [(i, slice(end - n, end)) for i, (n, end) in enumerate(zip(sizes, ends)) if n]
        parts = [fp8.product(x[rows], w[i], peaks) for i, rows in groups]
        return jnp.concatenate([*parts, jnp.zeros((x.shape[0] - used, w.shape[2]))])

    def ours(x, w, peaks):
        return grouped_matmul_fp8(x, w, jnp.asarray(sizes), None if recipe == "current" else peaks)

    def results(function):
        def both(x, w, peaks):
            y, pull = jax.vjp(function, x, w, peaks)
            return y, pull(dy)

        with traced_for(hardware) if hardware else contextlib.nullcontext():
            return jax.jit(both, compiler_options=meshes.IN_HASTE)(x, w, given)

    y, (dx, dw, seen) = results(ours)
    ry, (rdx, rdw, _) = results(naive)
    np.testing.assert_allclose(y, ry, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx[:used], rdx[:used], rtol=1e-5, atol=1e-11)
    np.testing.assert_allclose(dw, rdw, rtol=1e-5, atol=1e-11)
    assert not dx[used:].any()
    np.testing.assert_array_equal(seen, 0.0 * given if recipe == "current" else given)
    if name != "rows beyond":
        exact = grouped_matmul(x, w, jnp.asarray(sizes))
        assert 0.01 < np.linalg.norm(y - exact) / np.linalg.norm(exact) < 0.05


def taken(function, e):
    """Bytes and dense FLOPs of the backward pass for 512 rows and e matrices of 64 x 64."""
    x, w, dy = operands(512, 64, 64, e)
    sizes = jnp.full((e,), 512 // e)

    def both(x, w, sizes, dy):
        return jax.vjp(lambda x, w: function(x, w, sizes), x, w)[1](dy)

    return jax.jit(both).lower(x, w, sizes, dy).compile().memory_analysis().temp_size_in_bytes


def test_the_backward_pass_makes_no_product_with_every_matrix():
    rows, matrix = 512 * 64 * 4, 64 * 64 * 4
    few, many = taken(grouped_matmul, 4), taken(grouped_matmul, 64)
    # Some copies of rows and matrices; one array of rows for each matrix would be 64 x 131 KB.
    assert many < 10 * rows + 3 * 64 * matrix
    assert many - few < 3 * 60 * matrix + rows
    # What this is a test against: jax's own derivative on a CPU.
    assert taken(grouped_matmul_reference, 64) > 4 * many


@pytest.mark.parametrize(("platform", "blocks"), [("cuda", 3), ("tpu", 1)])
def test_elsewhere_products_are_loops_over_blocks(platform, blocks):
    """Of the three products in a step, all on a GPU; on a TPU the gradient of the matrices."""
    x, w, dy = operands(512, 64, 64, 16)
    sizes = jnp.full((16,), 32)
    with traced_for(Hardware(platform)):
        backward = lambda x, w, dy: jax.vjp(lambda w: grouped_matmul(x, w, sizes), w)[1](dy)
        flops = matmul_flops(backward, x, w, dy)
    once = (
        2 * 512 * 64 * 64
    )  # twice that in blocks that are not full, 16 times where every matrix is multiplied
    assert flops <= (3 + blocks) * once


def test_a_gpu_computes_few_blocks_where_few_rows_count():
    """Of eight devices that gather each other's rows, each has an eighth of them to multiply."""
    x, w, _ = operands(16384, 8, 8, 2)
    product = lambda share: lambda x, w: grouped_matmul(x, w, jnp.array([1000, 1048]), share)
    with traced_for(GPU):
        all_blocks, used = (matmul_flops(product(share), x, w) for share in (1, 8))
    once = 2 * 2048 * 8 * 8
    assert all_blocks >= 8 * once
    assert once <= used <= 2 * once


def test_fetch_and_its_gradient():
    x = jnp.arange(12.0).reshape(4, 3)
    source, readers = jnp.array([2, 4, 0, 2]), jnp.array([[2, 4], [4, 4], [0, 3], [4, 4]])
    y, pull = jax.vjp(lambda x: fetch(x, source, readers), x)
    np.testing.assert_array_equal(y, np.stack([x[2], 0 * x[0], x[0], x[2]]))
    dy = jnp.arange(12.0).reshape(4, 3) + 1.0
    np.testing.assert_array_equal(
        pull(dy)[0], np.stack([dy[2], 0 * dy[0], dy[0] + dy[3], 0 * dy[0]])
    )


def test_only_matrices_that_have_rows_are_read():
    from paxlike.ops.grouped import _blocks

    sizes = jnp.zeros(64, jnp.int32).at[jnp.array([3, 40])].set(2)
    blocks = _blocks(4, sizes, share=1, smallest=8)
    assert int(blocks.used) == 2
    assert blocks.group[:2].tolist() == [3, 40]
    # What is multiplied with 0 would be seen where it is no number.
    x, w, _ = operands(4, 6, 4, 64)
    bad = jnp.where((sizes > 0)[:, None, None], w, jnp.nan)
    expected = jnp.concatenate([x[:2] @ w[3], x[2:] @ w[40]])
    found, pull = jax.vjp(lambda x: grouped_matmul(x, bad, sizes), x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    back = jnp.concatenate([found[:2] @ w[3].T, found[2:] @ w[40].T])
    np.testing.assert_allclose(pull(found)[0], back, rtol=1e-5, atol=1e-6)
