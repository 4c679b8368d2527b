"""Loss and gradients of a model on a mesh, and the compiled program that gives them."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from paxlike import parallel
from paxlike.tasks.language import CausalLanguage
from paxlike.train.state import abstract_variables

# The programs are tiny, and there are many: half of the time. Collectives and buffers are the same.
IN_HASTE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def loss_and_gradients(net, params, batch, sizes, rules=None, *, chunk=None):
    """(loss, gradients) on a mesh of axis -> size, everything on the host."""
    mesh = build(sizes)
    with parallel.activate(mesh, rules):
        names = ("batch", "length")
        here = {
            k: jax.device_put(v, parallel.named_sharding(mesh, names)) for k, v in batch.items()
        }
        shardings = jax.tree.map(
            lambda leaf: leaf.sharding, abstract_variables(net, mesh)["params"]
        )
        compute = jax.jit(
            _differentiate(net, chunk), out_shardings=(None, shardings), compiler_options=IN_HASTE
        )
        return jax.device_get(compute(jax.device_put(params, shardings), here))


def compiled(net, batch, sizes, rules=None, *, chunk=None):
    """The program that `loss_and_gradients` runs."""
    mesh = build(sizes)
    with parallel.activate(mesh, rules):
        place = parallel.named_sharding(mesh, ("batch", "length"))
        spec = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=place) for k, v in batch.items()}
        params = abstract_variables(net, mesh)["params"]
        shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
        compute = jax.jit(_differentiate(net, chunk), out_shardings=(None, shardings))
        return compute.lower(params, spec).compile(IN_HASTE)


def init(net, length=8):
    """Parameters on one device."""
    tokens = jnp.zeros((1, length), jnp.int32)
    return jax.device_get(
        jax.jit(lambda: nn.unbox(net.init(jax.random.key(0), tokens))["params"])()
    )


def assert_same(found, expected, tolerance):
    """Losses to `tolerance`; gradients to `tolerance` of the norm of their tensor."""
    np.testing.assert_allclose(found[0], expected[0], rtol=tolerance)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(found[1]), jax.tree.leaves(expected[1]), strict=True
    ):
        distance = np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-12)
        assert distance < tolerance, (jax.tree_util.keystr(path), distance)


def distance(found, expected):
    """Norm of the difference of two trees over the norm of the second."""
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    apart = sum(float(np.sum((a - b) ** 2)) for a, b in pairs)
    return (apart / sum(float(np.sum(b**2)) for _, b in pairs)) ** 0.5


def build(sizes):
    """The mesh of the first devices."""
    mesh = parallel.Mesh(ici=tuple(sizes.values()), axes=tuple(sizes))
    return mesh.build(jax.devices()[: mesh.num_devices])


def _differentiate(net, chunk):
    task = CausalLanguage(chunk=chunk)

    def objective(params, batch):
        key = {"dropout": jax.random.key(1)}
        return task.loss(net, {"params": params}, batch, key).objective

    return jax.value_and_grad(objective)
