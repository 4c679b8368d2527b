"""8-bit products: rounding, scales, what is seen, and values that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxlike.ops import fp8, platform
from paxlike.ops.fp8 import BACKWARD, FORWARD, Fp8


def operands(rows=32, inputs=48, features=(2, 32), dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, rows, inputs), dtype)
    w = 0.02 * jax.random.normal(keys[1], (inputs, *features), dtype)
    dy = 1e-6 * jax.random.normal(keys[2], (2, rows, *features), dtype)
    return x, w, dy


def peaks_of(*tensors):
    return jnp.stack([jnp.max(jnp.abs(t)).astype(jnp.float32) for t in tensors])


def rounded(x, amax, dtype, margin=0):
    """A reference in numpy, of one tensor."""
    top = float(jnp.finfo(dtype).max)
    s = np.float32(amax) * np.float32(2.0**margin / top)
    return (
        np.asarray(np.clip(np.asarray(x, np.float32) / s, -top, top).astype(dtype), np.float32) * s
    )


def relative(a, b):
    a, b = (np.asarray(t, np.float32) for t in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("margin", [0, 1])
@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_products_are_those_of_rounded_tensors(recipe, margin):
    x, w, dy = operands()
    peaks = peaks_of(x, w, dy)
    given = None if recipe == "current" else peaks
    y, back = jax.vjp(lambda x, w: fp8.product(x, w, given, margin), x, w)
    dx, dw = back(dy)
    rx, rw = (rounded(t, p, FORWARD, margin) for t, p in zip((x, w), peaks))
    rdy = rounded(dy, peaks[2], BACKWARD, margin)
    np.testing.assert_allclose(y, np.einsum("bsp,pcq->bscq", rx, rw), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dx, np.einsum("bscq,pcq->bsp", rdy, rw), rtol=1e-4, atol=1e-11)
    np.testing.assert_allclose(dw, np.einsum("bsp,bscq->pcq", rx, rdy), rtol=1e-4, atol=1e-9)
    # And so near the exact products: three bits of mantissa forward, two backward.
    assert 0.01 < relative(y, np.einsum("bsp,pcq->bscq", x, w)) < 0.05
    assert 0.02 < relative(dw, np.einsum("bsp,bscq->pcq", x, dy)) < 0.09


def test_a_stack_of_matrices_multiplies_each_its_own_rows():
    """Experts: the products of each by itself, with scales that all share, and the largest of what they see."""
    x, w, dy = (jnp.stack([t, 3.0 * t[..., ::-1]]) for t in operands(features=(32,)))
    peaks = peaks_of(x, w, dy)

    @jax.jit
    def pulled(x, w, dy):
        y, back = jax.vjp(lambda *a: fp8.product(*a, 0, w.ndim - 2), x, w, peaks)
        return (y, *back(dy))

    *found, seen = pulled(x, w, dy)
    parts = [pulled(*t) for t in zip(x, w, dy)]
    for ours, *theirs in zip(found, *(part[:3] for part in parts), strict=True):
        np.testing.assert_allclose(ours, jnp.stack(theirs), rtol=1e-6, atol=1e-12)
    np.testing.assert_array_equal(seen, peaks)
    np.testing.assert_array_equal(seen, np.max([part[3] for part in parts], axis=0))


def test_bfloat16_in_bfloat16_out():
    x, w, dy = operands(dtype="bfloat16")
    y, back = jax.vjp(lambda x, w: fp8.product(x, w, None), x, w)
    assert y.dtype == back(dy)[0].dtype == back(dy)[1].dtype == jnp.bfloat16
    wide = np.einsum("bsp,pcq->bscq", *(np.asarray(t, np.float32) for t in (x, w)))
    assert relative(y, wide) < 0.05


def test_what_a_remat_policy_keeps_is_what_was_rounded():
    """XLA's reduce_precision, which is put behind what is kept, takes E4M3 above 240 for infinite."""
    x, w, dy = operands()
    plain = lambda x, w: fp8.product(jnp.sin(x), w, None)
    again = jax.checkpoint(plain, policy=jax.checkpoint_policies.everything_saveable)
    results = []
    for function in (plain, again):
        pull = lambda x, w, function=function: jax.vjp(function, x, w)[1](dy)
        results.append(jax.jit(pull)(x, w))
    for one, other in zip(*results):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_the_gradient_of_peaks_is_what_was_seen():
    x, w, dy = operands()
    _, back = jax.vjp(lambda peaks: fp8.product(x, w, peaks), jnp.zeros(3))
    np.testing.assert_array_equal(back(dy)[0], peaks_of(x, w, dy))


def test_a_history_goes_on_by_one_step():
    history = jnp.arange(12.0).reshape(3, 4)
    x, w, dy = operands()
    _, back = jax.vjp(lambda h: fp8.product(x, w, fp8.peaks(h)), history)
    after = fp8.advance(history, back(dy)[0])
    np.testing.assert_array_equal(after[:, 0], peaks_of(x, w, dy))
    np.testing.assert_array_equal(after[:, 1:], history[:, :-1])


def test_copies_bring_back_the_maximum():
    history = jnp.arange(24.0).reshape(2, 3, 4)
    copies, back = jax.vjp(lambda h: fp8.copies({"a": h}, 5)["a"], history)
    assert copies.shape == (2, 5, 3, 1)
    np.testing.assert_array_equal(copies[:, 2, :, 0], history.max(-1))
    seen = jax.random.uniform(jax.random.key(0), copies.shape)
    (found,) = back(seen)
    np.testing.assert_array_equal(found[..., 0], seen.max(1)[..., 0])
    assert not found[..., 1:].any()


@pytest.mark.parametrize("dtype", [FORWARD, BACKWARD])
def test_zeros_outliers_and_what_is_not_finite(dtype):
    top = float(jnp.finfo(dtype).max)
    one = lambda value: fp8.scale(fp8.amax(jnp.asarray(value, jnp.float32)), dtype)
    assert one([0.0, 0.0]) == 1.0  # nothing to go by
    assert one([0.0, jnp.inf]) == one([jnp.nan, 2.0]) == 1.0  # counts as not seen
    assert np.isfinite(fp8.quantize(jnp.ones(2), one([1e-44, 0.0]), dtype).astype("float32")).all()
    # An outlier that the scale does not know yet is bounded; one that it knows costs the small values.
    rounded_ = lambda x, s: np.asarray(fp8.quantize(jnp.asarray(x), s, dtype), np.float32)
    np.testing.assert_array_equal(rounded_([1.0, -1e6], jnp.float32(1.0)), [1.0, -top])
    big = rounded_([1e-12, 1e6], one([1e-12, 1e6]))
    assert big[0] == 0.0
    assert big[1] == top
    # What is not finite stays visible.
    assert np.isnan(rounded_([jnp.inf, -jnp.inf, jnp.nan], jnp.float32(1.0))).all()


def test_zeros_give_zeros_and_nan_reaches_the_gradient():
    x, w, dy = operands()
    y, back = jax.vjp(lambda x, w: fp8.product(x, w, None), jnp.zeros_like(x), w)
    assert not y.any()
    assert not back(jnp.zeros_like(dy))[0].any()
    _, back = jax.vjp(lambda x, w: fp8.product(x, w, None), x, w)
    assert np.isnan(back(dy.at[0, 0, 0, 0].set(jnp.inf))[1]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "mxfp8"}, "FP8_RECIPE='mxfp8' is none of delayed, current"),
        ({"amax_history": 0}, "FP8_AMAX_HISTORY=0 must be at least 1 step"),
        ({"margin": 9}, "FP8_MARGIN=9 is not within -8 and 8"),
    ],
)
def test_bad_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        Fp8(**options)


@pytest.mark.parametrize(
    ("hardware", "message"),
    [
        (platform.Hardware("cuda", 8.0), "compute capability 8.9 or above .* this one has 8.0"),
        (platform.Hardware("tpu"), "made for NVIDIA GPUs, and this is a tpu"),
    ],
)
def test_hardware_without_it(hardware, message):
    with platform.traced_for(hardware), pytest.raises(ValueError, match=message):
        fp8.check_hardware()
    with platform.traced_for(platform.Hardware("cuda", 9.0)):
        fp8.check_hardware()
