"""Small models by Transformer Engine, and what they hold."""

import jax
import numpy as np
import tiny

from paxlike.layers.norm import RMSNorm
from paxlike.ops.fp8 import STATE


def net_of(*products, llama=False, **options):
    """Two blocks with a product each, repeated where there is one."""
    if llama:
        options |= {"combine_qkv": False, "num_kv_heads": 2}
    net = tiny.model(layers=2, width=32, **options)
    (block,) = net.stack.period
    if llama:
        ffn = block.ffn.clone(gated=True, activation="silu", use_bias=False)
        norms = {"mixer_norm": RMSNorm(), "ffn_norm": RMSNorm(zero_centered=True)}
        block = block.clone(ffn=ffn, mixer=block.mixer.clone(use_bias=False), **norms)
    period = tuple(
        block.clone(
            mixer=block.mixer.clone(dot_general_cls=product),
            ffn=block.ffn.clone(dot_general_cls=product),
        )
        for product in products
    )
    return net.clone(stack=net.stack.clone(period=period, repeats=2 // len(period)))


def assert_same_state(one, other, *, steps):
    """What two trainers hold of 8-bit products after some steps, some of whose values were rounded the other way."""
    pairs = zip(*(jax.tree.leaves(dict(t.state.collections)[STATE]) for t in (one, other)))
    for one, other in pairs:
        assert (one[..., :steps] > 0).all()
        np.testing.assert_allclose(one[..., 1:], other[..., 1:], rtol=1e-3)
        np.testing.assert_allclose(one[..., :2, 0], other[..., :2, 0], rtol=3e-2)
        # The largest gradient is itself an 8-bit sum.
        np.testing.assert_allclose(one[..., 2, 0], other[..., 2, 0], rtol=1 / 8)
