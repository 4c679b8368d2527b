"""The choice of attention kernels, and the check that catches a wrong one."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import pytest

from paxlike import parallel
from paxlike.evaluate import Evaluator
from paxlike.log.metric import Metric
from paxlike.ops import attention, kernel_check, platform
from paxlike.ops import attention_kernels as kernels
from paxlike.ops.kernel_check import KernelCheck, compare
from paxlike.ops.scores import Scores

CHUNKED = kernels.find("chunked")
H100, A100 = platform.Hardware("cuda", 9.0), platform.Hardware("cuda", 8.0)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Tiles of 16, worth it from 32 keys on; what is refused is forgotten."""
    monkeypatch.setattr("paxlike.ops.chunked_attention.BLOCK", 16)
    monkeypatch.setattr(kernels, "LONG", 32)
    monkeypatch.setattr(kernels, "REFUSED", {})


def request(**changes) -> kernels.Request:
    """Of a bfloat16 row of 2,048."""
    scores = Scores(0.125, changes.pop("window", None), changes.pop("logit_cap", None))
    given = {
        "rows": 4,
        "length": 2048,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 64,
        "dtype": "bfloat16",
    }
    given |= {"causal": True, **changes}
    return kernels.Request(**{"keys": given["length"], "scores": scores, **given})


@pytest.mark.parametrize(
    ("hardware", "changes", "expected"),
    [
        (H100, {}, "cuDNN"),
        (H100, {"segments": True, "window": 100}, "cuDNN"),
        (H100, {"head_dim": 256}, "cuDNN"),
        (
            A100,
            {"head_dim": 256},
            "chunked, because cuDNN needs heads of a multiple of 8 up to 128 and these have 256",
        ),
        (
            H100,
            {"logit_cap": 50.0},
            "chunked, because cuDNN has no cap of the scores and ATTEN_LOGIT_CAP is 50.0",
        ),
        (
            H100,
            {"logit_cap": 50.0, "length": 16},
            "reference, because cuDNN has no cap of the scores and ATTEN_LOGIT_CAP is 50.0",
        ),
        (
            H100,
            {"dtype": "float32"},
            "chunked, because cuDNN needs 16-bit inputs and these are float32",
        ),
        (
            H100,
            {"cache": True, "length": 1, "keys": 64},
            "reference, because cuDNN does not read a cache and chunked does not read a cache",
        ),
        (
            platform.Hardware("tpu"),
            {},
            "chunked, because cuDNN needs an NVIDIA GPU and this is a tpu",
        ),
    ],
)
def test_the_fastest_that_serves_is_chosen_and_the_reason_is_said(hardware, changes, expected):
    with platform.traced_for(hardware):
        assert kernels.choose(request(**changes)).line == expected


def test_what_is_named_and_cannot_serve_is_refused():
    with (
        platform.traced_for(H100),
        pytest.raises(
            ValueError,
            match="cuDNN attention has no cap of the scores .*: set .*ATTENTION_KERNEL=auto",
        ),
    ):
        kernels.choose(request(logit_cap=5.0), "cudnn")


def test_a_refused_kernel_is_chosen_around_for_all_batches_of_such_rows():
    kernels.refuse("cudnn", request(), "differs")
    with platform.traced_for(H100):
        assert kernels.choose(request(rows=9)).line == "chunked, because cuDNN differs"
        assert kernels.choose(request(length=64)).line == "cuDNN"
        with pytest.raises(ValueError, match="cuDNN attention differs: set"):
            kernels.choose(request(), "cudnn")


def test_a_request_is_of_one_device():
    q, k = jnp.zeros((8, 64, 8, 4)), jnp.zeros((8, 64, 4, 4))
    scores = Scores(0.5, None, None)
    how = {"causal": True, "segments": False, "cache": False}
    with parallel.activate(parallel.Mesh(ici=(2, 1, 2)).build(jax.devices()[:4])):
        found = kernels.Request.of(q, k, scores, **how)
        narrow = kernels.Request.of(q, k[:, :, :1], scores, **how)
    assert (found.rows, found.heads, found.kv_heads) == (4, 4, 2)
    assert (narrow.rows, narrow.heads, narrow.kv_heads) == (4, 8, 1)


def wrong_forward(q, k, v, segments, offset, *, scores, causal):
    """A window that is one key short, or of two."""
    window = (scores.window or 3) - 1
    return CHUNKED.attend(
        q, k, v, segments, offset, scores=scores._replace(window=window), causal=causal
    )


def wrong_backward(q, k, v, segments, offset, *, scores, causal):
    """Right values; the gradient of the keys of the second half of a row is lost."""
    half = k.shape[1] // 2
    k = jnp.concatenate([k[:, :half], jax.lax.stop_gradient(k[:, half:])], axis=1)
    return CHUNKED.attend(q, k, v, segments, offset, scores=scores, causal=causal)


def fails(q, k, v, segments, offset, *, scores, causal):
    """As a library without a plan for these shapes."""
    raise NotImplementedError("no engine")


SMALL = {"length": 48, "rows": 1, "segments": True, "window": 30, "dtype": "float32"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_right_kernel_passes(dtype):
    verdict = compare(CHUNKED, request(**{**SMALL, "dtype": dtype}))
    assert verdict.refusal is None
    assert max(verdict.errors) > 0 and len(verdict.errors) == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("attend", "message"),
    [
        (wrong_forward, "differs from the reference: its .* by .* of its length"),
        (wrong_backward, "differs from the reference: its gradient of keys by"),
        (fails, "failed in the check: no engine"),
    ],
)
def test_a_wrong_kernel_is_caught(attend, message, dtype):
    planted = dataclasses.replace(CHUNKED, attend=attend)
    refusal = compare(planted, request(**{**SMALL, "dtype": dtype})).refusal
    assert refusal is not None
    with pytest.raises(ValueError, match=message):
        raise ValueError(refusal)


def test_long_rows_are_checked_on_a_part(monkeypatch):
    monkeypatch.setattr(kernel_check, "SCORES_BYTES", 4 * 2 * 24 * 24)
    verdict = compare(CHUNKED, request(**SMALL))
    assert verdict.length == 24 and verdict.refusal is None


def plant(monkeypatch, attend):
    """Puts `attend` into the place of the tiles."""
    planted = dataclasses.replace(CHUNKED, attend=attend)
    monkeypatch.setattr(
        kernels, "KERNELS", tuple(planted if k is CHUNKED else k for k in kernels.KERNELS)
    )


def traced(name="auto"):
    """A function to settle: one attention, in a jit of its own."""
    q = jax.ShapeDtypeStruct((2, 32, 2, 8), "float32")

    def run(q):
        return attention.attention(q, q, q, causal=True, implementation=name)

    return lambda: jax.jit(lambda q: run(q)).trace(q)


def test_a_wrong_kernel_is_replaced_before_anything_runs(tmp_path, monkeypatch):
    plant(monkeypatch, wrong_backward)
    settled = KernelCheck(folder=str(tmp_path)).settle(traced())
    assert [choice.kernel.name for choice in settled.choices] == ["reference"]
    (line,) = settled.refusals
    assert line.startswith("chunked attention is not used: it differs from the reference")
    assert "causal_attention" in str(settled.traced.jaxpr)
    assert "chunked differs from the reference" in settled.line


def test_a_wrong_kernel_that_was_named_ends_the_run(tmp_path, monkeypatch):
    plant(monkeypatch, wrong_backward)
    with pytest.raises(ValueError, match="chunked attention differs from the reference.*: set"):
        KernelCheck(folder=str(tmp_path)).settle(traced("chunked"))


def test_a_verdict_is_remembered(tmp_path, monkeypatch):
    check = KernelCheck(folder=str(tmp_path))
    first = check.settle(traced())
    assert len(first.checks) == 1 and "largest error" in first.checks[0]
    assert first.line == "chunked, because cuDNN needs an NVIDIA GPU and this is a cpu"
    assert first.is_news
    (kept,) = (tmp_path / "kernels").iterdir()
    assert json.loads(kept.read_text())["about"]["versions"]["jax"] == jax.__version__

    monkeypatch.setattr(kernel_check, "compare", lambda *_, **__: pytest.fail("checked again"))
    assert check.settle(traced()).checks == ()
    kept.write_text("{")
    with pytest.raises(pytest.fail.Exception, match="checked again"):
        check.settle(traced())


def test_the_reference_and_a_trusted_kernel_are_not_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_check, "compare", lambda *_, **__: pytest.fail("checked"))
    check = KernelCheck(folder=str(tmp_path))
    assert not check.settle(traced("reference")).is_news
    assert KernelCheck(enabled=False).settle(traced()).choices[0].kernel.name == "chunked"
    assert not list(tmp_path.iterdir())


def test_the_check_runs_inside_a_mesh(tmp_path):
    """Of four devices: it is made on one, whatever mesh is in force."""
    with parallel.activate(parallel.Mesh(ici=(4, 1, 1)).build(jax.devices()[:4])):
        assert KernelCheck(folder=str(tmp_path)).settle(traced()).refusals == ()


def test_an_evaluation_uses_what_was_compared(tmp_path, monkeypatch):
    plant(monkeypatch, wrong_forward)
    q = jax.random.normal(jax.random.key(0), (2, 32, 2, 8))
    attend = lambda name: attention.attention(q, q, q, causal=True, implementation=name)[:, 5].sum()
    task = types.SimpleNamespace(
        evaluate=lambda model, variables, batch: {"sum": Metric(attend("auto"), 1.0)}
    )
    tokens = jnp.zeros((2, 32), jnp.int32)
    data = types.SimpleNamespace(
        spec=lambda rows, evaluation: {"tokens": tokens}, epoch=lambda **_: [{"tokens": tokens}]
    )
    mesh = parallel.Mesh().build(jax.devices()[:1])
    with parallel.activate(mesh):
        evaluator = Evaluator("heldout", data, task, None, global_batch=2, mesh=mesh)
        settled = evaluator.settle(KernelCheck(folder=str(tmp_path)), {})
        found = evaluator.run({})["sum"].sum
    assert "chunked attention is not used" in settled.refusals[0]
    assert found == pytest.approx(float(attend("reference")), rel=1e-5)


def test_a_fused_kernel_sees_no_axis_that_is_not_mapped_by_hand():
    """As in a pipeline: not even one of size 1, for which XLA asked its partitioner and failed."""
    seen = []

    def run(q, k, v, segments):
        seen.append(set(jax.sharding.get_abstract_mesh().manual_axes))
        return q

    def stage(q):
        return kernels._on_each_device(run, q, q, q, None)

    with parallel.activate(parallel.Mesh(ici=(1, 2, 1)).build(jax.devices()[:2])):
        spec = jax.sharding.PartitionSpec("fsdp")
        mapped = jax.shard_map(
            stage, in_specs=spec, out_specs=spec, axis_names={"fsdp"}, check_vma=False
        )
        jax.eval_shape(mapped, jnp.zeros((2, 4, 2, 4)))
    assert seen == [{"data", "fsdp", "tensor"}]
