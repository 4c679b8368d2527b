"""Every optimizer: against optax on plain matrices, matrix by matrix on a stacked model, and on every mesh."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from collectives import collectives

from paxlike import parallel
from paxlike.checkpoint import Checkpointer, CheckpointOptions
from paxlike.train.directions import orthogonalize
from paxlike.train.matrices import Split, named, split
from paxlike.train.optimizer import Adafactor, Lion, Muon, Optimizer, Schedule, Sgd
from paxlike.train.state import StateFactory

DIRECTIONS = {
    "adam": None,
    "adafactor": Adafactor(min_size=16),
    "lion": Lion(),
    "muon": Muon(),
    "sgd": Sgd(),
}
ALL = pytest.mark.parametrize("kind", DIRECTIONS)


def optimizer(kind, **changes):
    # The sign of a rounding error is a whole step of Lion.
    rate = {"lion": 1e-4, "sgd": 1e-2, "adafactor": 1e-2}.get(kind, 1e-3)
    schedule = Schedule("constant", rate)
    return tiny.optimizer(**{"direction": DIRECTIONS[kind], "schedule": schedule, **changes})


def random_like(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), tree)


PLAIN = {
    "wide": jnp.zeros((24, 40)),
    "tall": jnp.zeros((40, 24)),
    "small": jnp.zeros((3, 40)),
    "scale": jnp.zeros((24,)),
}
ADAFACTOR = optax.chain(
    optax.scale_by_factored_rms(min_dim_size_to_factor=16),
    optax.clip_by_block_rms(1.0),
    optax.scale_by_param_block_rms(),
)


@pytest.mark.parametrize(
    ("direction", "reference"),
    [
        (None, optax.scale_by_adam(0.9, 0.999)),
        (DIRECTIONS["adafactor"], ADAFACTOR),
        (
            Adafactor(min_size=16, clip=0.0, by_parameter_scale=False),
            optax.scale_by_factored_rms(min_dim_size_to_factor=16),
        ),
        (Lion(), optax.scale_by_lion()),
        (Sgd(momentum=0.9), optax.trace(0.9)),
        (Sgd(momentum=0.8, nesterov=True), optax.trace(0.8, nesterov=True)),
        (Sgd(momentum=0.0), optax.identity()),
    ],
    ids=["adam", "adafactor", "adafactor, bare", "lion", "momentum", "nesterov", "sgd"],
)
def test_the_direction_is_that_of_optax(direction, reference):
    params = random_like(PLAIN)
    ours = Optimizer(Schedule("constant", 1.0), direction=direction).bound(params)
    state, expected_state = ours.init(params), reference.init(params)
    for step in range(4):
        gradients = random_like(params, seed=step + 1)
        y, state = ours.update(gradients, state, params)
        expected, expected_state = reference.update(gradients, expected_state, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), y, expected)


@pytest.mark.parametrize(
    ("direction", "options"),
    [
        (Muon(), {"consistent_rms": 0.2}),
        (Muon(rms=None, nesterov=False, num_iterations=3), {"nesterov": False, "ns_steps": 3}),
    ],
    ids=["rms of Adam", "first version"],
)
def test_muon_is_that_of_optax_and_leaves_vectors_to_adam(direction, options):
    params = random_like(PLAIN)
    ours = Optimizer(Schedule("constant", 1.0), direction=direction).bound(params)
    reference, adam = optax.contrib.muon(-1.0, **options), optax.scale_by_adam()
    states = [tx.init(params) for tx in (ours, reference, adam)]
    reference_update = jax.jit(reference.update)
    for step in range(4):
        gradients = random_like(params, seed=step + 1)
        y, states[0] = ours.update(gradients, states[0], params)
        expected, states[1] = reference_update(gradients, states[1], params)
        by_adam, states[2] = adam.update(gradients, states[2], params)
        expected["scale"] = by_adam["scale"]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), y, expected)


def test_orthogonalize_brings_singular_values_near_one():
    x = jax.random.normal(jax.random.key(0), (3, 20, 50))
    before = np.linalg.svd(x, compute_uv=False)
    values = np.linalg.svd(orthogonalize(x, 5), compute_uv=False)
    assert before.max() / before.min() > 3
    assert values.min() > 0.6 and values.max() < 1.3


def test_kernels_say_which_matrices_they_are_made_of():
    trainer = tiny.Trainer(net=tiny.model(layers=2))
    splits = trainer.factory.bound_optimizer.splits
    prefix = "stack/period_0"
    assert splits[f"{prefix}/mixer/qkv/kernel"] == Split((0, 2), (1,), (3, 4))
    assert splits[f"{prefix}/mixer/out/kernel"] == Split((0,), (1, 2), (3,))
    assert splits[f"{prefix}/ffn/ffn1/kernel"] == Split((0,), (1,), (2,))
    assert splits[f"{prefix}/mixer/qkv/bias"] == Split(stack=(0,))
    assert splits[f"{prefix}/ffn_norm/scale"] == Split(stack=(0,))
    assert splits["embedding/table"] == Split((), (0,), (1,), is_table=True)
    assert splits["position/table"] == Split((), (0,), (1,), is_table=True)
    assert splits["norm/scale"] == Split()
    x = jnp.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    whole = Split((0, 2), (1,), (3,))
    assert whole.flat(x).shape == (8, 3, 5)
    np.testing.assert_array_equal(whole.unflat(whole.flat(x), x.shape), x)
    np.testing.assert_array_equal(whole.flat(x)[1], x[0, :, 1])


@pytest.mark.parametrize("kind", ["muon", "adafactor"])
def test_every_matrix_of_a_stack_is_worked_on_alone(kind):
    """The update of each layer, and of each of its queries, keys and values, is that of optax on it alone."""
    trainer = tiny.Trainer(net=tiny.model(layers=2))
    params = random_like(trainer.state.params)
    ours = Optimizer(Schedule("constant", 1.0), direction=DIRECTIONS[kind], epsilon=1e-8)
    boxed = trainer.factory._description.params
    ours = ours.bound(boxed)
    reference = optax.contrib.muon(-1.0, consistent_rms=0.2) if kind == "muon" else ADAFACTOR
    splits, state = ours.splits, ours.init(params)
    matrices = {
        f"{name}/{i}": (name, i)
        for name, x in named(params).items()
        if splits[name].inputs and not (kind == "muon" and splits[name].is_table)
        for i in range(splits[name].flat(x).shape[0])
    }
    assert len(matrices) == 2 * (3 + 1 + 1 + 1) + (2 if kind == "adafactor" else 0)

    def alone(tree):
        leaves = named(tree)
        return {key: splits[n].flat(leaves[n])[i] for key, (n, i) in matrices.items()}

    expected_state = reference.init(alone(params))
    for step in range(2):
        gradients = random_like(params, seed=step + 1)
        y, state = ours.update(gradients, state, params)
        expected, expected_state = reference.update(alone(gradients), expected_state, alone(params))
        for key, matrix in alone(y).items():
            np.testing.assert_allclose(matrix, expected[key], atol=3e-5, err_msg=key)


def test_a_combined_projection_moves_as_three_do():
    """Queries, keys and values are orthogonalised each alone, whether they are stored in one array or in three."""
    name, x = "kernel", jax.random.normal(jax.random.key(1), (2, 16, 3, 4, 4))
    names = ("layers", "embed", None, "heads", "head_dim")
    combined = {name: parallel.Kernel(x, names, num_inputs=1, num_outputs=3)}
    muon = Optimizer(Schedule("constant", 1.0), direction=Muon())
    one = muon.bound(combined)
    y, _ = one.update({name: x}, one.init({name: x}), {name: x})
    for i in range(3):
        part = {
            name: parallel.Kernel(x[:, :, i], names[:2] + names[3:], num_inputs=1, num_outputs=2)
        }
        three = muon.bound(part)
        part = {name: x[:, :, i]}
        expected, _ = three.update(part, three.init(part), part)
        np.testing.assert_allclose(y[name][:, :, i], expected[name], rtol=1e-6)


@pytest.fixture(scope="module")
def references():
    return {}


@pytest.fixture(scope="module")
def on_mesh():
    return functools.cache(lambda kind, shape: tiny.Trainer(shape, opt=optimizer(kind)))


def losses_on_one_device(kind, references):
    if kind not in references:
        references[kind] = tiny.Trainer(opt=optimizer(kind)).losses()
    return references[kind]


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("muon", (1, 4, 1)),
        ("muon", (1, 2, 2)),
        ("adafactor", (1, 2, 2)),
    ],
    ids=str,
)
def test_same_losses_on_meshes(kind, shape, references, on_mesh):
    many = on_mesh(kind, shape).losses()
    np.testing.assert_allclose(many, losses_on_one_device(kind, references), rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 4, 1), (1, 2, 2)], ids=str)
def test_muon_exchanges_matrices_and_gathers_none(shape, on_mesh):
    """Each device orthogonalises whole layers: every kernel travels there and back once, a quarter to each device."""
    trainer = on_mesh("muon", shape)
    found = collectives(trainer.compiled)
    kernels = sum(x.size for n, x in named(trainer.abstract.params).items() if n.endswith("kernel"))
    axes = sum(size > 1 for size in shape)  # one exchange for each axis that moves
    assert sum(sum(one.sizes) for one in found["all-to-all"]) == 2 * axes * kernels // 4
    assert not found["collective-permute"]
    # The largest thing that is gathered is the token table, or the weights of one layer of four.
    assert max(sum(one.sizes) for one in found["all-gather"]) <= tiny.VOCAB * 64


@pytest.mark.parametrize("kind", ["muon", "adafactor"])
def test_scanned_and_unrolled_layers_move_alike(kind, references):
    unrolled = tiny.Trainer(opt=optimizer(kind), net=tiny.model(scan=False)).losses()
    np.testing.assert_allclose(unrolled, losses_on_one_device(kind, references), rtol=1e-5)


def bytes_on_a_device(tree):
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def abstract_state(kind, shape, opt=None):
    mesh = parallel.Mesh(ici=shape).build(jax.devices()[: math.prod(shape)])
    spec = {"tokens": jax.ShapeDtypeStruct((8, 32), jnp.int32)}
    with parallel.activate(mesh):
        return StateFactory(tiny.model(), opt or optimizer(kind), spec, mesh).abstract()


@ALL
def test_state_is_a_quarter_on_four_devices(kind):
    abstract = abstract_state(kind, (1, 4, 1))
    whole = bytes_on_a_device(abstract_state(kind, (1, 1, 1)).opt_state)
    state = named(abstract.opt_state)
    # Norms and biases are whole everywhere, and so is that vector of a factored moment that does not go over the width.
    kept = {name for name, x in state.items() if x.sharding.is_fully_replicated and x.ndim}
    vectors = ("/column/", ("qkv", "ffn1")), ("/row/", ("out", "ffn2", "table"))
    for name in kept:
        assert name.endswith(("bias", "scale")) or any(
            part in name and any(f"/{layer}" in name for layer in layers)
            for part, layers in vectors
        )
    scalars = [name for name, x in state.items() if not x.ndim]
    size = bytes_on_a_device([state[name] for name in [*kept, *scalars]])
    assert bytes_on_a_device(state) == size + (whole - size) / 4
    if kind != "adafactor":
        assert size < 0.05 * whole


def test_the_compiled_step_takes_as_many_bytes_as_the_state_says():
    trainer = tiny.Trainer((1, 4, 1), opt=optimizer("adafactor"), net=tiny.model(layers=2))
    expected = bytes_on_a_device([trainer.abstract, trainer.factory.spec])
    memory = trainer.compiled.memory_analysis().argument_size_in_bytes
    assert memory == pytest.approx(expected, rel=0.01)


def test_bytes_per_parameter_of_the_state():
    """Two moments, one, none, and two vectors for a matrix."""
    found = {}
    for kind in DIRECTIONS:
        abstract = abstract_state(kind, (1, 1, 1))
        number = sum(x.size for x in jax.tree.leaves(abstract.params))
        found[kind] = bytes_on_a_device(abstract.opt_state) / number
    assert found["adam"] == pytest.approx(8, abs=1e-3)
    assert found["lion"] == pytest.approx(4, abs=1e-3)
    assert found["sgd"] == pytest.approx(4, abs=1e-3)
    assert 4 < found["muon"] < 4.6  # tables, norms and biases have two moments
    assert found["adafactor"] < 0.3


@pytest.mark.parametrize("kind", ["adafactor", "muon"])
def test_a_run_goes_on_bit_identically_from_a_checkpoint(kind, tmp_path):
    trainer = tiny.Trainer(opt=optimizer(kind), net=tiny.model(layers=2))
    for batch in trainer.data[:2]:
        trainer.step(batch)
    with Checkpointer(tmp_path, CheckpointOptions()) as checkpointer:
        checkpointer.save(2, trainer.state, data={}, config="{}", wait=True, force=True)
        restored = checkpointer.restore(trainer.abstract)
    expected = [trainer.step(batch)["loss"].value() for batch in trainer.data[2:]]
    after = jax.tree.map(np.array, trainer.state)
    trainer.state = restored.state
    assert [trainer.step(batch)["loss"].value() for batch in trainer.data[2:]] == expected
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, trainer.state), after)


def by_heart(opt):
    """Losses on one batch, over and over."""
    trainer = tiny.Trainer(opt=opt, data=tiny.batches(1, rows=2), net=tiny.model(layers=1))
    return [trainer.step(trainer.data[0])["loss"].value() for _ in range(40)]


def test_adafactor_learns_a_batch_by_heart():
    losses = by_heart(optimizer("adafactor", schedule=Schedule("constant", 0.1), weight_decay=0.0))
    assert losses[-1] < 0.5 * losses[0], losses[::10]


@pytest.mark.parametrize("kind", ["adam", "lion", "muon", "sgd"])
def test_moments_in_16_bits_take_half_and_still_learn(kind):
    rate = {"lion": 1e-3, "sgd": 0.3}.get(kind, 1e-2)
    changes = {"schedule": Schedule("constant", rate), "weight_decay": 0.0, "b2": 0.95}
    changes |= {"first_dtype": "bfloat16", "second_dtype": "bfloat16"}
    if kind != "adam":
        changes["direction"] = type(DIRECTIONS[kind])(first_dtype="bfloat16")
    opt = optimizer(kind, **changes)
    size, whole = (
        bytes_on_a_device(abstract_state(kind, (1, 1, 1), opt=o).opt_state) for o in (opt, None)
    )
    assert size == pytest.approx(whole / 2, rel=1e-3)
    losses = by_heart(opt)
    assert losses[-1] < 0.6 * losses[0], losses[::10]


def test_rates_of_named_parameters():
    opt = tiny.optimizer(
        rate_factors=((r"qkv/bias", 1.0), (r"mixer", 0.5), (r"ffn", 2.0)), weight_decay=0.1
    )
    plain, named_rates = (
        tiny.Trainer(net=tiny.model(layers=1)),
        tiny.Trainer(net=tiny.model(layers=1), opt=opt),
    )
    before = named(jax.tree.map(np.array, plain.state.params))
    plain.step(plain.data[0]), named_rates.step(plain.data[0])
    one, other = named(plain.state.params), named(named_rates.state.params)
    for name, start in before.items():
        factor = (
            1.0 if "qkv/bias" in name else 0.5 if "mixer" in name else 2.0 if "ffn" in name else 1.0
        )
        np.testing.assert_allclose(
            other[name] - start, factor * (one[name] - start), atol=2e-7, err_msg=name
        )


def test_a_factor_of_zero_freezes_without_moments():
    opt = tiny.optimizer(rate_factors=((r"embedding", 0.0),), ema_decay=0.9)
    trainer = tiny.Trainer(net=tiny.model(layers=1), opt=opt)
    before = np.array(trainer.state.params["embedding"]["table"])
    trainer.step(trainer.data[0])
    np.testing.assert_array_equal(before, trainer.state.params["embedding"]["table"])
    assert not [name for name in named(trainer.state.opt_state) if "embedding" in name]


def test_matrices_can_be_left_to_adam():
    opt = tiny.optimizer(direction=Muon(by_adam=r"ffn2"))
    state = tiny.Trainer(net=tiny.model(layers=1), opt=opt).state.opt_state
    muon = [n for n in named(state) if "/muon/" in n and "kernel" in n]
    assert {n.split("/")[-2] for n in muon} == {"qkv", "out", "ffn1"}
    assert any("/adam/" in n and "ffn2/kernel" in n for n in named(state))


RATE = Schedule("constant", 1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Optimizer(RATE, rate_factors=(("mixer", -1.0),)), "-1.0 for 'mixer' is negative"),
        (
            lambda: Optimizer(RATE, rate_factors=(("(", 1.0),)),
            "LEARNING_RATE_FACTORS='(' is no reg",
        ),
        (lambda: Optimizer(RATE, decay_exclude="("), "WEIGHT_DECAY_EXCLUDE='(' is no regular"),
        (lambda: Muon(by_adam="("), "MUON_EXCLUDE='(' is no regular"),
        (lambda: Muon(momentum=1.0), "MUON_MOMENTUM=1.0 is not in [0, 1)"),
        (lambda: Muon(num_iterations=0), "MUON_NUM_ITERATIONS=0 must be at least 1"),
        (lambda: Lion(b2=1.5), "LION_BETA2=1.5 is not in [0, 1)"),
        (lambda: Optimizer(RATE, clip_norm=-1.0), "clip_norm=-1.0 of the optimizer must be at"),
        (lambda: Optimizer(RATE, skip_norm=-1.0), "skip_norm=-1.0 of the optimizer must be at"),
        (lambda: Sgd(momentum=-0.1), "SGD_MOMENTUM=-0.1 is not in [0, 1)"),
        (lambda: Adafactor(decay=0.0), "ADAFACTOR_DECAY=0.0 is not in (0, 1]"),
        (lambda: Adafactor(clip=-1.0), "ADAFACTOR_CLIP_THRESHOLD=-1.0 is negative"),
        (
            lambda: Optimizer(RATE, b2=0.999, second_dtype="bfloat16"),
            "ADAM_BETA2=0.999 changes a moment by 0.001 of itself in a step, which SECOND_MOMENT_DTYPE=bfloat16",
        ),
        (lambda: Optimizer(RATE, first_dtype="float16"), "FIRST_MOMENT_DTYPE='float16' is none of"),
        (
            lambda: Optimizer(RATE, direction=Muon()).init(PLAIN),
            "Muon must know the matrices of the model",
        ),
        (
            lambda: Optimizer(RATE, direction=Muon()).bound({"scale": jnp.zeros(3)}),
            "OPTIMIZER='muon' has no matrix to work on: scale",
        ),
        (
            lambda: Optimizer(RATE, rate_factors=(("mixr", 0.5),)).bound(PLAIN),
            "LEARNING_RATE_FACTORS: 'mixr' matches no parameter; they are called scale and so on",
        ),
        (
            lambda: Optimizer(RATE, weight_decay=0.1, decay_exclude="gain$").bound(PLAIN),
            "WEIGHT_DECAY_EXCLUDE: 'gain$' matches no parameter",
        ),
        (
            lambda: Optimizer(RATE, direction=Muon(by_adam="router")).bound(PLAIN),
            "MUON_EXCLUDE: 'router' matches no parameter",
        ),
        (
            lambda: Optimizer(RATE, rate_factors=((".", 0.0),)).bound(PLAIN),
            "LEARNING_RATE_FACTORS freezes every parameter",
        ),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_split_of_a_bare_array_is_the_array():
    assert split(jnp.zeros((3, 4))) == Split((), (0,), (1,)) and split(jnp.zeros(3)) == Split()
