"""Training a part of the parameters: the rest has no gradient, no moments, no average, and does not move."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax.linen import fp8_ops

from paxlike import parallel
from paxlike.checkpoint import Checkpointer, restore_variables
from paxlike.layers.lora import TRAINABLE, Lora, adopt, base_of
from paxlike.train.optimizer import Optimizer, Schedule, merge
from paxlike.train.state import num_parameters


def adapted(lora=None, *, layers=2, **options):
    """The tiny GPT with adapters on all projections."""
    net = tiny.model(layers=layers, **options)
    lora = lora or Lora(rank=4, alpha=8.0)
    (block,) = net.stack.period
    block = block.clone(
        mixer=block.mixer.clone(adapters={"qkv": lora, "out": lora}),
        ffn=block.ffn.clone(adapters={"ffn1": lora, "ffn2": lora}),
    )
    return net.clone(stack=net.stack.clone(period=(block,)))


def optimizer(**changes):
    return tiny.optimizer(
        **{"trainable": TRAINABLE, "schedule": Schedule("constant", 1e-2), **changes}
    )


def named(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@pytest.fixture(scope="module")
def reference():
    return tiny.Trainer(net=adapted(), opt=optimizer()).losses()


def test_only_adapters_move():
    trainer = tiny.Trainer(net=adapted(), opt=optimizer(weight_decay=0.1))
    before = named(jax.tree.map(np.array, trainer.state.params))
    for batch in trainer.data:
        trainer.step(batch)
    after = named(trainer.state.params)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {name for name in before if "/lora/" in name} and len(moved) == 8


def test_a_batch_is_learned_through_adapters_alone():
    trainer = tiny.Trainer(net=adapted(), opt=optimizer(weight_decay=0.0), data=tiny.batches(1))
    losses = [trainer.step(trainer.data[0])["loss"].value() for _ in range(40)]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize(
    "kwargs",
    [
        {"shape": (2, 2, 1)},
        {"shape": (1, 2, 2), "microbatches": 2},
        {"microbatches": 4},
        {"net": adapted(scan=False)},
        {"net": adapted(remat="SAVE_EVERYTHING")},
    ],
    ids=["fsdp", "tensor, microbatches", "microbatches", "unrolled", "no remat"],
)
def test_same_losses_however_it_is_computed(kwargs, reference):
    losses = tiny.Trainer(**{"net": adapted(), "opt": optimizer(), **kwargs}).losses()
    np.testing.assert_allclose(losses, reference, rtol=1e-5)


def test_the_gradient_is_that_of_full_training_without_the_frozen_part():
    full = tiny.Trainer(net=adapted(), opt=tiny.optimizer(clip_norm=0.0))
    part = tiny.Trainer(net=adapted(), opt=optimizer(clip_norm=1e-3))
    # B is zero at the start, and with it the gradient of A: let both count.
    params = jax.tree.map(lambda p: p + 0.01, part.state.params)
    full.state, part.state = full.state.replace(params=params), part.state.replace(params=params)

    batch = jax.tree.map(jnp.asarray, full.data[0])

    def loss(params):
        output = full.task.loss(full.model, {"params": params}, batch, {})
        return output.objective / full.task.weight(batch)

    gradients = named(jax.jit(jax.grad(loss))(params))
    expected = optax.tree.norm({k: v for k, v in gradients.items() if "/lora/" in k})
    everything = optax.tree.norm(gradients)
    part.state = jax.tree.map(jnp.copy, part.state)
    metrics = part.step(part.data[0])
    np.testing.assert_allclose(metrics["grad_norm"], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["clipped_grad_norm"], 1e-3, rtol=1e-4)
    assert everything > 1.5 * expected
    sizes = {k: v for k, v in named(params).items() if "/lora/" in k}
    np.testing.assert_allclose(metrics["param_norm"], optax.tree.norm(sizes), rtol=1e-5)


def test_frozen_parameters_take_no_memory_but_their_own():
    part = tiny.Trainer(net=adapted(layers=4), opt=optimizer(ema_decay=0.9))
    full = tiny.Trainer(net=adapted(layers=4), opt=tiny.optimizer(ema_decay=0.9))
    params = part.state.params
    trained = part.optimizer.select(params)
    assert num_parameters(trained) == sum(
        leaf.size for name, leaf in named(params).items() if "/lora/" in name
    )
    for tree in (part.state.opt_state[0].mu, part.state.opt_state[0].nu, part.state.ema):
        assert set(named(tree)) == set(named(trained))
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    batch = sum(leaf.nbytes for leaf in part.data[0].values())
    memory, whole = part.compiled.memory_analysis(), full.compiled.memory_analysis()
    expected = size(params) + 3 * size(trained) + batch
    assert memory.argument_size_in_bytes == pytest.approx(expected, rel=0.01)
    # The step holds no gradient of the frozen part. (Full training shares some of that memory with activations.)
    frozen = size(params) - size(trained)
    assert memory.temp_size_in_bytes < whole.temp_size_in_bytes - 0.5 * frozen
    assert memory.alias_size_in_bytes >= size(params) + 3 * size(trained)  # nothing is copied


def test_a_step_that_is_not_finite_changes_nothing():
    trainer = tiny.Trainer(net=adapted(), opt=optimizer(ema_decay=0.9))
    trainer.step(trainer.data[0])
    before = jax.tree.map(np.array, trainer.state)
    bad = dict(trainer.data[1])
    bad["weights"] = np.full_like(bad["weights"], np.inf)
    assert trainer.step(bad)["skipped_steps"] == 1
    same = {"step": 0, "skipped_steps": 0}
    jax.tree.map(
        np.testing.assert_array_equal, trainer.state.replace(**same), before.replace(**same)
    )


def test_averaged_parameters_are_those_of_the_adapters():
    trainer = tiny.Trainer(net=adapted(), opt=optimizer(ema_decay=0.5))
    name = "stack/period_0/ffn/ffn1/lora/b"
    expected = np.array(named(trainer.state.params)[name])
    for batch in trainer.data:
        trainer.step(batch)
        expected = 0.5 * expected + 0.5 * np.array(named(trainer.state.params)[name])
    averaged = named(trainer.state.variables(use_ema=True)["params"])
    np.testing.assert_allclose(averaged[name], expected, rtol=1e-5, atol=1e-7)
    plain = named(trainer.state.params)
    assert set(averaged) == set(plain)
    assert averaged["embedding/table"] is plain["embedding/table"]


def test_any_part_can_be_trained():
    trainer = tiny.Trainer(net=tiny.model(layers=2), opt=optimizer(trainable=r"(scale|bias)$"))
    before = named(jax.tree.map(np.array, trainer.state.params))
    trainer.step(trainer.data[0])
    after = named(trainer.state.params)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {name for name in before if name.endswith(("scale", "bias"))}


@pytest.mark.parametrize(
    ("base", "shape"),
    [("int8", (1, 2, 2)), ("nf4", (1, 2, 1)), ("bfloat16", (1, 1, 1))],
)
def test_adapters_are_trained_on_a_base_in_few_bits(base, shape, reference):
    lora = Lora(rank=4, alpha=8.0, base=base)
    trainer = tiny.Trainer(shape, net=adapted(lora), opt=optimizer())
    plain = tiny.Trainer(shape, net=tiny.model(layers=2))
    with parallel.activate(trainer.mesh):
        assert jax.tree.map(lambda x: x.shape, base_of(trainer.state.params)) == jax.tree.map(
            lambda x: x.shape, plain.state.params
        )
        params = adopt(plain.state.params, trainer.state.params)
        place = lambda tree: jax.tree.map(lambda leaf: leaf.sharding, tree)
        same = jax.tree.map(
            lambda a, b, leaf: a.is_equivalent_to(b, leaf.ndim),
            place(params),
            place(trainer.state.params),
            params,
        )
        assert all(jax.tree.leaves(same))
    trainer.state = trainer.state.replace(params=params)
    codes = {k: np.array(v) for k, v in named(params).items() if "kernel" in k}
    losses = trainer.losses()
    np.testing.assert_allclose(losses, reference, rtol={"nf4": 5e-3}.get(base, 1e-3))
    assert all(np.array_equal(codes[k], named(trainer.state.params)[k]) for k in codes)


def test_dora_is_trained_on_meshes():
    net = adapted(Lora(rank=4, alpha=8.0, kind="dora"))
    one, many = (tiny.Trainer(s, net=net, opt=optimizer()).losses() for s in ((1,) * 3, (1, 2, 2)))
    np.testing.assert_allclose(many, one, rtol=1e-5)


def test_dropout_masks_of_adapters_do_not_depend_on_the_mesh():
    net = adapted(Lora(rank=4, alpha=8.0, dropout=0.3))
    one, many = (tiny.Trainer(s, net=net, opt=optimizer()).losses() for s in ((1,) * 3, (2, 2, 1)))
    np.testing.assert_allclose(many, one, rtol=1e-5)


def test_fp8_scales_are_still_updated():
    net = adapted(dot_general_cls=fp8_ops.Fp8DotGeneralOp)
    trainer = tiny.Trainer(net=net, opt=optimizer())
    before = jax.tree.map(np.array, dict(trainer.state.collections))
    trainer.step(trainer.data[0])
    after = trainer.state.collections
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, dict(after))
    assert "_overwrite_with_gradient" in after and any(jax.tree.leaves(changed))


def test_a_checkpoint_of_the_adapters_is_small_and_completes_the_base(tmp_path):
    trainer = tiny.Trainer(net=adapted(), opt=optimizer(ema_decay=0.9))
    base = jax.tree.map(jnp.copy, trainer.state.params)
    for batch in trainer.data:
        trainer.step(batch)
    select = trainer.optimizer.select
    state = trainer.state
    with Checkpointer(tmp_path) as checkpointer:
        small = state.replace(params=select(state.params))
        checkpointer.save(4, small, data={}, config="{}", wait=True, force=True)
    abstract = trainer.abstract.replace(params=select(trainer.abstract.params))
    with Checkpointer(tmp_path) as checkpointer:
        restored = checkpointer.restore(abstract)
    assert all("lora" in n for n in restored.metadata["arrays"] if n.startswith("params/"))
    arrays = restored.metadata["arrays"].items()
    written = sum(math.prod(e["shape"]) for name, e in arrays if name.startswith("params/"))
    assert written < 0.1 * num_parameters(state.params)
    whole = restored.state.replace(params=merge(restored.state.params, base))
    jax.tree.map(np.testing.assert_array_equal, whole, state)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Optimizer(Schedule("constant", 1e-3), trainable="lora("),
            r"trainable='lora\(' is no regular expression: .*unterminated",
        ),
        (
            lambda: tiny.Trainer(net=tiny.model(layers=2), opt=optimizer()),
            r"trainable='\(\^\|/\)lora/' matches no parameter; they are called embedding/table and",
        ),
        (
            lambda: tiny.Trainer(net=adapted(Lora(base="int8")), opt=tiny.optimizer()),
            r"parameter 'stack/.*/kernel/int8' of type int8 cannot be trained; leave it out",
        ),
    ],
)
def test_what_cannot_be_trained_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_checkpoint_of_the_adapters_is_evaluated_with_the_base(tmp_path):
    trainer = tiny.Trainer(net=adapted(), opt=optimizer(ema_decay=0.5))
    base = named(jax.tree.map(jnp.copy, trainer.state.params))
    trainer.step(trainer.data[0])
    state, asked = trainer.state, []
    with Checkpointer(tmp_path) as checkpointer:
        small = state.replace(params=trainer.optimizer.select(state.params))
        checkpointer.save(1, small, data={}, config="{}", wait=True, force=True)

    def complete(abstract):
        asked.extend(abstract)
        return {name: base[name] for name in abstract}

    abstract = {"params": trainer.abstract.params}
    for use, wanted in (("params", state.variables()), ("auto", state.variables(use_ema=True))):
        weights = restore_variables(tmp_path, abstract, use=use, complete=complete)
        jax.tree.map(np.testing.assert_array_equal, weights.variables, wanted)
    assert set(asked) == {name for name in base if "/lora/" not in name}
    with pytest.raises(ValueError, match=r"embedding/table has shape .* is not in the checkpoint"):
        restore_variables(tmp_path, abstract)


def test_averages_of_the_adapters_are_evaluated_beside_the_frozen_weights(tmp_path):
    trainer = tiny.Trainer(net=adapted(), opt=optimizer(ema_decay=0.5))
    trainer.step(trainer.data[0])
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, trainer.state, data={}, config="{}", wait=True, force=True)
    weights = restore_variables(tmp_path, {"params": trainer.abstract.params})
    assert weights.use == "ema"
    jax.tree.map(
        np.testing.assert_array_equal, weights.variables, trainer.state.variables(use_ema=True)
    )
