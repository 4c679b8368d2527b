"""How fast a run is, in numbers that can be compared: peak rates of chips, MFU and its convention.

Model FLOPs utilisation (PaLM, arXiv:2204.02311, appendix B) divides the FLOPs the model needs by
the FLOPs the chips could have done in the same time. It depends on two choices that papers make
differently, what is counted and what the peak is; `MFU_CONVENTION` goes with it wherever it is
written.
"""

from __future__ import annotations

import resource
import sys
from typing import Any

import jax
import numpy as np

MFU_CONVENTION = (
    "MFU = model FLOPs per second and device / peak FLOPs per second of the device. "
    "Model FLOPs: 2 per multiply-add of every matrix product and convolution of the forward pass, "
    "counted from shapes, times 3 for forward and backward; nothing is counted for recomputation "
    "(remat), element-wise operations, softmax, norms, embedding look-ups or the optimizer; "
    "causal attention counts half of its score and value products (the lower triangle). "
    "Peak: the dense tensor-core or matrix-unit rate in the compute dtype, without sparsity, "
    "from the maker's data sheet (float32: the rate that XLA's default precision uses)."
)

# Dense peak in TFLOP/s by compute dtype. Sources: NVIDIA data sheets of each product (the figures
# "with sparsity" halved; DGX B200 and GB200 NVL72 sheets divided by their number of GPUs) and the
# Cloud TPU documentation (per chip; each device of these TPUs is a chip). float32 is TF32 on Ampere
# and later and bfloat16 passes on TPUs, because that is what XLA runs at its default precision.
# The first entry whose words all occur in the device kind is taken: special forms come first.
_PEAK_TFLOPS: tuple[tuple[str, dict[str, float]], ...] = (
    ("gb200", {"bfloat16": 2500, "float16": 2500, "float8": 5000, "float32": 1250}),
    ("b200", {"bfloat16": 2250, "float16": 2250, "float8": 4500, "float32": 1125}),
    ("gh200", {"bfloat16": 989.4, "float16": 989.4, "float8": 1978.9, "float32": 494.7}),
    ("h200 nvl", {"bfloat16": 835.5, "float16": 835.5, "float8": 1670.5, "float32": 417.5}),
    ("h200", {"bfloat16": 989.4, "float16": 989.4, "float8": 1978.9, "float32": 494.7}),
    ("h100 pcie", {"bfloat16": 756, "float16": 756, "float8": 1513, "float32": 378}),
    ("h100 nvl", {"bfloat16": 835.5, "float16": 835.5, "float8": 1670.5, "float32": 417.5}),
    ("h100", {"bfloat16": 989.4, "float16": 989.4, "float8": 1978.9, "float32": 494.7}),
    ("a100", {"bfloat16": 312, "float16": 312, "float32": 156}),
    ("l40s", {"bfloat16": 362, "float16": 362, "float8": 733, "float32": 183}),
    ("l4", {"bfloat16": 121, "float16": 121, "float8": 242.5, "float32": 60}),
    ("v100 pcie", {"float16": 112, "float32": 14}),
    ("v100", {"float16": 125, "float32": 15.7}),
    ("tpu v6 lite", {"bfloat16": 918, "float32": 918}),
    ("tpu v6e", {"bfloat16": 918, "float32": 918}),
    ("tpu v5 lite", {"bfloat16": 197, "float32": 197}),
    ("tpu v5e", {"bfloat16": 197, "float32": 197}),
    ("tpu v5p", {"bfloat16": 459, "float32": 459}),
    ("tpu v5", {"bfloat16": 459, "float32": 459}),
    ("tpu v4 lite", {"bfloat16": 138, "float32": 138}),
    ("tpu v4", {"bfloat16": 275, "float32": 275}),
)


def peak_flops(device_kind: str, dtype: Any = "bfloat16") -> float | None:
    """The dense peak of one device in FLOP/s, or None for what the table lacks (a CPU, say).

    Args:
        device_kind: `jax.devices()[0].device_kind`, e.g. "NVIDIA H100 80GB HBM3" or "TPU v5 lite".
        dtype: the compute dtype, by name or as a dtype; all float8 types share one rate.

    Example:
        >>> peak_flops("NVIDIA A100-SXM4-80GB", "bfloat16")
        312000000000000.0
    """
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    name = "float8" if name.startswith("float8") else name
    words = set(device_kind.lower().replace("-", " ").split())
    for kind, rates in _PEAK_TFLOPS:
        if set(kind.split()) <= words:
            return rates[name] * 1e12 if name in rates else None
    return None


def memory_peak() -> dict[str, int]:
    """The peak memory so far, of the fullest local device if the backend tells, else the host."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stat["peak_bytes_in_use"] for stat in stats if "peak_bytes_in_use" in stat]
    if peaks:
        return {"device_memory_peak_bytes": max(peaks)}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"host_memory_peak_bytes": resident * (1 if sys.platform == "darwin" else 1024)}
