"""The chunked loss against the textbook one: values, gradients, memory, meshes, and what it sends between devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import collectives
from jax.test_util import check_grads

from paxlike import parallel
from paxlike.ops import cross_entropy, platform
from paxlike.ops.cross_entropy import linear_cross_entropy, token_cross_entropy

B, S, D, V = 4, 12, 16, 40
IN_HASTE = {"xla_backend_optimization_level": 0}  # the programs are tiny, and there are many
MESHES = {
    "data": (4, 1, 1),
    "fsdp": (1, 4, 1),
    "tensor": (1, 1, 4),
    "fsdp-tensor": (1, 2, 2),
    "data-fsdp": (2, 2, 1),
}


@pytest.fixture(scope="module")
def example():
    return _example(B, S, D, V)


@pytest.mark.parametrize(
    ("chunk", "z_loss"),
    [(0, 0.0), (4, 0.0), (0, 0.1), (None, 0.1), (1, 0.1), (4, 0.1), (5, 0.1), (12, 0.1), (99, 0.1)],
)
def test_value_and_gradients_equal_the_textbook(example, chunk, z_loss):
    total, parts, gradients = _run(example, chunk=chunk, z_loss=z_loss)
    expected, expected_parts, expected_gradients = _textbook(example, z_loss)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(parts, expected_parts, rtol=1e-5)
    for got, want in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [0, 4])
def test_capped_logits(example, chunk):
    total, parts, gradients = _run(example, chunk=chunk, z_loss=0.1, logit_cap=2.0)
    expected, expected_parts, expected_gradients = _textbook(example, 0.1, logit_cap=2.0)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(parts, expected_parts, rtol=1e-5)
    for got, want in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    x, table, targets, weights = map(jnp.asarray, example)
    nll, _ = token_cross_entropy(x, table, targets, chunk=chunk, logit_cap=2.0)
    np.testing.assert_allclose(jnp.sum(nll * weights), expected_parts[0], rtol=1e-5)


@pytest.mark.parametrize("chunk", [0, 5])
def test_a_table_that_is_padded_for_a_gpu_gives_the_same(example, chunk):
    """40 rows become 64 there."""
    how = {"chunk": chunk, "z_loss": 0.1}
    plain = _run(example, **how)
    with platform.traced_for(platform.Hardware("cuda", 9.0)):
        assert cross_entropy._padded(jnp.zeros((V, D)), None).shape == (64, D)
        padded = _run(example, **how)
        value = linear_cross_entropy(*map(jnp.asarray, example), **how)[0]
    for one, other in zip(jax.tree.leaves(padded), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(value, plain[0], rtol=1e-6)


@pytest.mark.parametrize("chunk", [0, 4])
def test_value_without_differentiation_is_the_same(example, chunk):
    total, parts = linear_cross_entropy(*map(jnp.asarray, example), chunk=chunk, z_loss=0.1)
    expected, expected_parts, _ = _run(example, chunk=chunk, z_loss=0.1)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    np.testing.assert_allclose(parts, expected_parts, rtol=1e-6)


@pytest.mark.parametrize("chunk", [0, 3])
def test_gradients_equal_finite_differences(example, chunk):
    x, table, targets, weights = map(jnp.asarray, example)

    def loss(x, table):
        x, table = jnp.asarray(x), jnp.asarray(table)
        return linear_cross_entropy(x, table, targets, weights, chunk=chunk, z_loss=0.05)[0]

    check_grads(loss, (x, table), order=1, modes=("rev",), atol=2e-2, rtol=2e-2)


def test_gradient_scales_with_the_cotangent(example):
    x, table, targets, weights = map(jnp.asarray, example)
    loss = lambda x: linear_cross_entropy(x, table, targets, weights, chunk=4)[0]
    np.testing.assert_allclose(
        jax.grad(lambda x: -3.0 * loss(x))(x), -3.0 * jax.grad(loss)(x), rtol=1e-6
    )


@pytest.mark.parametrize("chunk", [0, 4])
def test_positions_of_weight_zero_count_nothing(example, chunk):
    x, table, targets, weights = example
    weights = weights.copy()
    weights[1], weights[2, 5:] = 0.0, 0.0
    other = np.where(weights == 0, (targets + 1) % V, targets)
    total, parts, (dx, dtable) = _run((x, table, targets, weights), chunk=chunk, z_loss=0.1)
    changed_total, changed_parts, (_, changed_dtable) = _run(
        (x, table, other, weights), chunk=chunk, z_loss=0.1
    )
    assert total == changed_total
    np.testing.assert_array_equal(parts, changed_parts)
    np.testing.assert_array_equal(dtable, changed_dtable)
    assert not np.asarray(dx)[weights == 0].any()


def test_targets_outside_the_vocabulary_with_weight_zero_are_harmless(example):
    x, table, targets, weights = example
    weights = weights.copy()
    weights[0] = 0.0
    outside = targets.copy()
    outside[0] = -1
    for got, want in zip(
        jax.tree.leaves(_run((x, table, outside, weights), chunk=4)),
        jax.tree.leaves(_run((x, table, targets, weights), chunk=4)),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("chunk", [0, 3, None])
def test_token_cross_entropy(example, chunk):
    x, table, targets, _ = example
    nll, correct = token_cross_entropy(*map(jnp.asarray, (x, table, targets)), chunk=chunk)
    logits = _logits(x, table)
    np.testing.assert_allclose(nll, _nll(logits, targets), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(correct, logits.argmax(-1) == targets)


def test_large_logits_do_not_overflow(example):
    x, table, targets, weights = example
    total, _, gradients = _run((x * 1e3, table, targets, weights), chunk=4, z_loss=0.0)
    np.testing.assert_allclose(
        total, _textbook((x * 1e3, table, targets, weights), 0.0)[0], rtol=1e-5
    )
    assert all(np.isfinite(g).all() for g in gradients)


def test_bfloat16_hidden_states_keep_a_float32_loss_and_table_gradient(example):
    x, table, targets, weights = example
    narrow = jnp.asarray(x, jnp.bfloat16)
    total, _, (dx, dtable) = _run((narrow, table, targets, weights), chunk=4)
    assert (total.dtype, dx.dtype, dtable.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    rounded = np.asarray(jnp.asarray(table, jnp.bfloat16), np.float32)
    expected, _, (_, wanted) = _textbook(
        (np.asarray(narrow, np.float32), rounded, targets, weights), 0.0
    )
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(dtable, wanted, atol=0.01 * np.abs(wanted).max())


def test_chunks_need_less_memory():
    """Logits of the whole batch: 2 x 128 x 8192 floats = 8 MiB; of a chunk of 8 positions: 0.5 MiB."""
    whole, small = (_temporary_bytes(_example(2, 128, 16, 8192), chunk=chunk) for chunk in (0, 8))
    logits = 4 * 2 * 128 * 8192
    assert whole > logits
    assert small < logits / 4


def test_the_chunk_is_chosen_by_the_size_of_the_logits(monkeypatch):
    example = _example(2, 128, 16, 8192)
    whole = _temporary_bytes(example, chunk=0)
    assert _temporary_bytes(example, chunk=None) == whole  # 8 MiB are below the limit
    monkeypatch.setattr(cross_entropy, "AUTO_CHUNK_BYTES", 1 << 20)
    assert _temporary_bytes(example, chunk=None) < whole / 4


@pytest.mark.parametrize(
    ("name", "chunk"), [*[(name, 4) for name in MESHES], ("data-fsdp", 0), ("tensor", 0)]
)
def test_same_values_and_gradients_on_every_mesh(example, name, chunk):
    expected = _run(example, chunk=chunk, z_loss=0.1)
    mesh = parallel.Mesh(ici=MESHES[name]).build(jax.devices()[:4])
    with parallel.activate(mesh):
        got = _run(_placed(example, mesh), chunk=chunk, z_loss=0.1)
        each, correct = jax.jit(lambda *a: token_cross_entropy(*a, chunk=chunk))(
            *_placed(example, mesh)[:3]
        )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    nll = _nll(_logits(*example[:2]), example[2])
    np.testing.assert_allclose(each, nll, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(correct, _logits(*example[:2]).argmax(-1) == example[2])


@pytest.mark.parametrize("name", MESHES)
def test_the_gradient_of_the_table_is_reduced_after_the_loop(name):
    """Inside the loop over chunks nothing of the table's size travels, neither the table nor its gradient."""
    b, s, d, v, chunk = 8, 32, 16, 512, 4
    mesh = parallel.Mesh(ici=MESHES[name]).build(jax.devices()[:4])
    with parallel.activate(mesh):
        example = _placed(_example(b, s, d, v), mesh)
        program = _step(chunk).lower(*example).compile()
    assert "body=" in program.as_text(), "the loop over chunks is gone"
    found = collectives(program)
    inside = [one.size for kind in found for one in found[kind] if one.in_loop]
    outside = [one for kind in found for one in found[kind] if not one.in_loop]
    largest_activation = b * chunk * d  # dx of a chunk, summed over the shards of the vocabulary
    assert max(inside, default=0) <= largest_activation < v * d // 4
    if name != "tensor":
        assert (
            sum(
                one.size >= v * d // 4
                for one in outside
                if one.kind in ("all-reduce", "reduce-scatter")
            )
            == 1
        )


def _run(example, *, chunk, **options):
    """Total, parts, and the gradients of x and table."""
    step = _step(chunk, **options).lower(*example).compile(IN_HASTE)
    (total, parts), gradients = step(*example)
    return total, parts, gradients


def _step(chunk, **options):
    def loss(x, table, targets, weights):
        return linear_cross_entropy(x, table, targets, weights, chunk=chunk, **options)

    def step(x, table, targets, weights):
        result, (dx, dtable) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
            x, table, targets, weights
        )
        return result, (dx, parallel.shard(dtable, "vocab", "embed"))

    return jax.jit(step)


def _temporary_bytes(example, *, chunk):
    return _step(chunk).lower(*example).compile().memory_analysis().temp_size_in_bytes


def _example(b, s, d, v):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((b, s, d)).astype(np.float32)
    table = (0.5 * rng.standard_normal((v, d))).astype(np.float32)
    weights = (rng.random((b, s)) + 0.1).astype(np.float32)
    targets = rng.integers(0, v, (b, s), dtype=np.int32)
    targets[:, ::3] = np.einsum("bsd,vd->bsv", x, table).argmax(-1)[
        :, ::3
    ]  # some are predicted right
    return x, table, targets, weights


def _placed(example, mesh):
    x, table, targets, weights = example
    rows = parallel.named_sharding(mesh, ("batch", "length"))
    return (
        jax.device_put(x, parallel.named_sharding(mesh, ("batch", "length", "act_embed"))),
        jax.device_put(table, parallel.named_sharding(mesh, ("vocab", "embed"))),
        jax.device_put(targets, rows),
        jax.device_put(weights, rows),
    )


def _textbook(example, z_loss, logit_cap=None):
    """Float64 numpy: total, (loss, z, correct), gradients by the formula of softmax cross-entropy."""
    x, table, targets, weights = (
        np.asarray(a, np.float64) if a.dtype.kind == "f" else a for a in example
    )
    logits = _logits(x, table)
    slope = 1.0
    if logit_cap is not None:
        slope = 1.0 / np.cosh(logits / logit_cap) ** 2
        logits = logit_cap * np.tanh(logits / logit_cap)
    lse = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    nll = _nll(logits, targets)
    parts = np.array(
        [
            np.sum(nll * weights),
            np.sum(lse**2 * weights),
            np.sum((logits.argmax(-1) == targets) * weights),
        ]
    )
    softmax = np.exp(logits - lse[..., None])
    onehot = np.eye(table.shape[0])[targets]
    dlogits = weights[..., None] * ((softmax - onehot) + z_loss * 2 * lse[..., None] * softmax)
    dlogits = slope * dlogits
    gradients = np.einsum("bsv,vd->bsd", dlogits, table), np.einsum("bsv,bsd->vd", dlogits, x)
    return parts[0] + z_loss * parts[1], parts, gradients


def _logits(x, table):
    return np.einsum("bsd,vd->bsv", np.asarray(x, np.float64), np.asarray(table, np.float64))


def _nll(logits, targets):
    top = logits.max(-1)
    lse = np.log(np.exp(logits - top[..., None]).sum(-1)) + top
    return lse - np.take_along_axis(logits, targets[..., None], -1)[..., 0]


@pytest.mark.parametrize("s", [13, 31])
def test_lengths_without_divisors_are_padded(s):
    """A prime length in three chunks, not in one chunk a position."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, table = jax.random.normal(keys[0], (2, s, 8)), jax.random.normal(keys[1], (16, 8))
    targets = jax.random.randint(keys[2], (2, s), 0, 16)
    weights = jnp.ones((2, s))

    def loss(chunk):
        return lambda x, t: cross_entropy.linear_cross_entropy(x, t, targets, weights, chunk=chunk)[
            0
        ]

    chunk = -(-s // 3)
    (value, gradients), (expected, wanted) = (
        jax.value_and_grad(loss(c), argnums=(0, 1))(x, table) for c in (chunk, 0)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradients, wanted)
    jaxpr = str(jax.make_jaxpr(loss(chunk))(x, table))
    assert "length=3" in jaxpr
    ours = cross_entropy.token_cross_entropy(x, table, targets, chunk=chunk)
    theirs = cross_entropy.token_cross_entropy(x, table, targets, chunk=0)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    np.testing.assert_array_equal(ours[1], theirs[1])


def test_body_and_table_are_scaled_alike_in_bfloat16():
    """1 / tokens is no power of two: rounded to 16 bits it would scale the two gradients differently."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (4, 64, 32), jnp.bfloat16)
    table = jax.random.normal(keys[1], (16, 32))
    targets = jax.random.randint(keys[2], (4, 64), 0, 16)
    weights = jnp.ones((4, 64))

    def gradients(scale):
        def loss(x, t):
            return cross_entropy.linear_cross_entropy(x, t, targets, weights)[0] * scale

        return jax.grad(loss, argnums=(0, 1))(x, table)

    one, small = gradients(1.0), gradients(1 / 135072)
    for a, b in zip(one, small, strict=True):
        a, b = (np.asarray(g, np.float64).ravel() for g in (a, b))
        assert (a @ b) / (a @ a) * 135072 == pytest.approx(1.0, abs=5e-4)
