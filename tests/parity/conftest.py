"""One thread for torch: its workers spin, and starve jax's on a small machine."""

import contextlib

with contextlib.suppress(ImportError):  # the tests of this folder skip themselves, with a reason
    import torch

    torch.set_num_threads(1)
