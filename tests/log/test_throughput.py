"""The chip table and the kinds that JAX reports."""

import jax
import jax.numpy as jnp
import pytest

from paxlike.log.throughput import memory_peak, peak_flops


@pytest.mark.parametrize(
    ("kind", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 80GB HBM3", "float8_e4m3fn", 1978.9),
        ("NVIDIA H100 80GB HBM3", jnp.float32, 494.7),
        ("NVIDIA H100 PCIe", jnp.bfloat16, 756),
        ("NVIDIA H200", "bfloat16", 989.4),
        ("NVIDIA GH200 480GB", "bfloat16", 989.4),
        ("NVIDIA B200", "bfloat16", 2250),
        ("NVIDIA GB200", "bfloat16", 2500),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100-PCIE-40GB", "float32", 156),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA L40S", "bfloat16", 362),
        ("Tesla V100-SXM2-16GB", "float16", 125),
        ("TPU v4", "bfloat16", 275),
        ("TPU v5 lite", "bfloat16", 197),
        ("TPU v5", "bfloat16", 459),
        ("TPU v5p", "bfloat16", 459),
        ("TPU v6 lite", "bfloat16", 918),
    ],
)
def test_known_chips(kind, dtype, tflops):
    assert peak_flops(kind, dtype) == pytest.approx(tflops * 1e12, rel=1e-9)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("cpu", "bfloat16"),
        ("NVIDIA L40", "bfloat16"),  # not the L4, not the L40S
        ("Tesla V100-SXM2-16GB", "bfloat16"),  # the chip has none
        ("NVIDIA A100-SXM4-80GB", "float8_e4m3fn"),
        ("TPU v9", "bfloat16"),
    ],
)
def test_unknown_chips_have_no_peak(kind, dtype):
    assert peak_flops(kind, dtype) is None


def test_memory_peak_is_that_of_the_host_on_cpu():
    ballast = jax.block_until_ready(jnp.ones((4 << 20,), jnp.float32))
    (name, peak), *others = memory_peak().items()
    assert not others
    assert name == "host_memory_peak_bytes"
    assert ballast.nbytes < peak < 1 << 40
