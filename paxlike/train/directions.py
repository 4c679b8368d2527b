"""What makes a direction of a gradient: Adam, Adafactor, Lion, Muon, momentum.

Each of these says how a clipped gradient becomes the direction that `Optimizer` multiplies with the learning rate. All
keep their state in the boxes of the parameters, so that it is sharded like them.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from paxlike import parallel
from paxlike.train.matrices import Split, Splits, map_named, unboxed, without

PyTree = Any
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Adam:
    """m / (sqrt(v + epsilon_root) + epsilon) with bias correction (Kingma and Ba 2015).

    Attributes:
      b1, b2: decay of the first and second moment.
      first_dtype, second_dtype: in which the moments are kept; they are computed in float32.
    """

    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8
    epsilon_root: float = 0.0
    first_dtype: str = "float32"
    second_dtype: str = "float32"

    def __post_init__(self):
        _check_share("ADAM_BETA1", self.b1, self.first_dtype, "FIRST_MOMENT_DTYPE")
        _check_share("ADAM_BETA2", self.b2, self.second_dtype, "SECOND_MOMENT_DTYPE")

    def transformation(self, splits: Splits, adam: Adam) -> optax.GradientTransformation:
        """As optax has it."""
        del splits, adam
        adam = optax.scale_by_adam(self.b1, self.b2, self.epsilon, self.epsilon_root)
        return _kept_in(adam, mu=self.first_dtype, nu=self.second_dtype)


@dataclasses.dataclass(frozen=True)
class Lion:
    """sign(b1 m + (1 - b1) g), then m = b2 m + (1 - b2) g (Chen et al. 2023): one moment."""

    b1: float = 0.9
    b2: float = 0.99
    first_dtype: str = "float32"

    def __post_init__(self):
        _check_share("LION_BETA1", self.b1)
        _check_share("LION_BETA2", self.b2, self.first_dtype, "FIRST_MOMENT_DTYPE")

    def transformation(self, splits: Splits, adam: Adam) -> optax.GradientTransformation:
        """As optax has it."""
        del splits, adam
        return _kept_in(optax.scale_by_lion(self.b1, self.b2), mu=self.first_dtype)


@dataclasses.dataclass(frozen=True)
class Sgd:
    """The gradient, or m = momentum m + g, or with `nesterov` g + momentum m (Sutskever et al. 2013)."""

    momentum: float = 0.9
    nesterov: bool = False
    first_dtype: str = "float32"

    def __post_init__(self):
        _check_share("SGD_MOMENTUM", self.momentum, self.first_dtype, "FIRST_MOMENT_DTYPE")

    def transformation(self, splits: Splits, adam: Adam) -> optax.GradientTransformation:
        """As optax has it; no state without momentum."""
        del splits, adam
        if not self.momentum:
            return optax.identity()
        return _kept_in(optax.trace(self.momentum, self.nesterov), trace=self.first_dtype)


class _AdafactorState(NamedTuple):
    step: Int[Array, ""]
    row: PyTree  # mean square over the outputs of each matrix
    column: PyTree  # over its inputs
    whole: PyTree  # of what is not factored


@dataclasses.dataclass(frozen=True)
class Adafactor:
    """g / sqrt(row x column / mean), the second moment of a matrix as the product of two vectors (Shazeer, Stern 2018).

    Every matrix of a stack has its own; what is no matrix, or a small one, has a whole second moment. Without momentum.

    Attributes:
      decay: exponent of the second moment's decay, 1 - step^-decay.
      min_size: matrices whose inputs or outputs are fewer are not factored.
      clip: bound of the root mean square of a matrix's direction, 0 for none.
      by_parameter_scale: times the root mean square of each matrix, at least 1e-3: LEARNING_RATE is relative.
    """

    decay: float = 0.8
    min_size: int = 128
    clip: float = 1.0
    by_parameter_scale: bool = True
    epsilon: float = 1e-30

    def __post_init__(self):
        if not 0.0 < self.decay <= 1.0:
            raise ValueError(f"ADAFACTOR_DECAY={self.decay} is not in (0, 1]")
        if self.clip < 0.0:
            raise ValueError(f"ADAFACTOR_CLIP_THRESHOLD={self.clip} is negative; 0 is none")

    def is_factored(self, split: Split, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape has two vectors for each matrix in place of a whole second moment."""
        return bool(split.inputs) and min(split.sizes(shape)) >= self.min_size

    def transformation(self, splits: Splits, adam: Adam) -> optax.GradientTransformation:
        """The same numbers as `optax.adafactor` on each matrix."""
        del adam

        def init(params):
            def start(name, leaf):
                split, x = splits[name], unboxed(leaf)
                if not self.is_factored(split, x.shape):
                    return None, None, jax.tree.map(jnp.zeros_like, leaf)
                row = jnp.zeros([n for i, n in enumerate(x.shape) if i not in split.outputs])
                column = jnp.zeros([n for i, n in enumerate(x.shape) if i not in split.inputs])
                return (
                    without(leaf, split.outputs, row),
                    without(leaf, split.inputs, column),
                    None,
                )

            row, column, whole = _unzip(map_named(start, params), 3)
            return _AdafactorState(jnp.zeros((), jnp.int32), row, column, whole)

        def update(gradients, state, params):
            keep = 1.0 - (state.step.astype(jnp.float32) + 1.0) ** -self.decay

            def one(name, g, row, column, whole, p):
                split = splits[name]
                part = tuple(i for i in range(g.ndim) if i not in split.stack)
                square = jnp.square(g) + self.epsilon
                mean = lambda x, dims: jnp.mean(x, axis=dims)
                if whole is None:
                    row = keep * row + (1.0 - keep) * mean(square, split.outputs)
                    column = keep * column + (1.0 - keep) * mean(square, split.inputs)
                    wide = jnp.expand_dims(row, split.outputs)
                    factor = wide / jnp.mean(wide, axis=split.inputs, keepdims=True)
                    y = (
                        g
                        * jax.lax.rsqrt(factor)
                        * jax.lax.rsqrt(jnp.expand_dims(column, split.inputs))
                    )
                else:
                    whole = keep * whole + (1.0 - keep) * square
                    y = g * jax.lax.rsqrt(whole)
                if self.clip:
                    y = y / jnp.maximum(1.0, _rms(y, part) / self.clip)
                if self.by_parameter_scale:
                    y = y * jnp.maximum(_rms(p, part), 1e-3)
                return y, row, column, whole

            treedef = jax.tree.structure(gradients)
            names = jax.tree.leaves(map_named(lambda name, _: name, gradients))
            trees = [gradients, state.row, state.column, state.whole, params]
            columns = [treedef.flatten_up_to(tree) for tree in trees]
            done = [one(*leaves) for leaves in zip(names, *columns, strict=True)]
            y, row, column, whole = (
                treedef.unflatten([parts[i] for parts in done]) for i in range(4)
            )
            return y, _AdafactorState(state.step + 1, row, column, whole)

        return optax.GradientTransformation(init, update)


class _MuonState(NamedTuple):
    step: Int[Array, ""]
    mu: PyTree


@dataclasses.dataclass(frozen=True)
class Muon:
    """The momentum of each matrix with its singular values made about 1 (Jordan et al. 2024).

    For kernels of linear layers: each layer of a stack, and each of queries, keys and values, is a matrix of its own,
    (all inputs, all outputs). Tables, norms and biases go by Adam.

    Attributes:
      momentum, nesterov: of the gradients.
      num_iterations: of Newton and Schulz.
      rms: root mean square of a direction, about that of Adam, so that both go by one learning rate and decay (Liu et
        al. 2025, section 2.2); None for the factor sqrt(max(1, outputs / inputs)) of the first version.
      by_adam: kernels whose path matches this regular expression go by Adam all the same.
    """

    momentum: float = 0.95
    nesterov: bool = True
    num_iterations: int = 5
    rms: float | None = 0.2
    by_adam: str | None = None
    first_dtype: str = "float32"
    epsilon: float = 1e-8

    def __post_init__(self):
        _check_share("MUON_MOMENTUM", self.momentum, self.first_dtype, "FIRST_MOMENT_DTYPE")
        if self.by_adam is not None:
            regex("MUON_EXCLUDE", self.by_adam)
        if self.num_iterations < 1:
            raise ValueError(f"MUON_NUM_ITERATIONS={self.num_iterations} must be at least 1")

    def takes(self, name: str, split: Split) -> bool:
        """Whether this parameter is one of its own, rather than Adam's."""
        if not split.inputs or split.is_table:
            return False
        return self.by_adam is None or re.search(self.by_adam, name) is None

    def transformation(self, splits: Splits, adam: Adam) -> optax.GradientTransformation:
        """Of both this and `adam`; the state of each holds its own parameters only."""
        if not any(self.takes(name, split) for name, split in splits.items()):
            raise ValueError(
                f"OPTIMIZER='muon' has no matrix to work on: {next(iter(splits))} and the other trained parameters are "
                "none of its own; use OPTIMIZER='adam'"
            )
        labels = lambda params: map_named(
            lambda name, _: "muon" if self.takes(name, splits[name]) else "adam", params
        )
        matrices = _kept_in(self._matrices(splits), mu=self.first_dtype)
        both = {"muon": matrices, "adam": adam.transformation(splits, adam)}
        return optax.partition(both, labels)

    def _matrices(self, splits: Splits) -> optax.GradientTransformation:
        def init(params):
            return _MuonState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

        def update(gradients, state, params):
            del params
            b, step = self.momentum, state.step + 1
            mu = jax.tree.map(lambda m, g: b * m + (1.0 - b) * g, state.mu, gradients)
            # Newton and Schulz see the direction only: the scale of the corrections falls out, their proportion stays.
            if self.nesterov:
                old, new = b / (1.0 - b ** (step + 1)), (1.0 - b) / (1.0 - b**step)
                momentum = jax.tree.map(lambda m, g: old * m + new * g, mu, gradients)
            else:
                momentum = mu
            y = map_named(lambda name, m: self._orthogonal(m, splits[name]), momentum)
            return y, _MuonState(step, mu)

        return optax.GradientTransformation(init, update)

    def _orthogonal(self, m: Array, split: Split) -> Array:
        # Whole matrices, spread over the devices: exchanged there and back, rather than in each iteration.
        path: list[Any] = []
        if split.place is not None and split.stack:
            path = parallel.towards(split.place, m.shape, split.stack[0])
        x = functools.reduce(jax.lax.with_sharding_constraint, path, m)
        y = orthogonalize(split.flat(x), self.num_iterations, self.epsilon)
        inputs, outputs = split.sizes(m.shape)
        if self.rms is None:
            factor = max(1.0, outputs / inputs) ** 0.5
        else:
            factor = self.rms * max(inputs, outputs) ** 0.5
        y = split.unflat(factor * y, m.shape)
        return functools.reduce(jax.lax.with_sharding_constraint, reversed(path), y)


def orthogonalize(
    x: Float[Array, "n i o"], num_iterations: int, epsilon: float = 1e-8
) -> Float[Array, "n i o"]:
    """Each matrix with its singular values between about 0.7 and 1.2: the quintic iteration of Jordan et al. 2024.

    a x + b (x x') x + c (x x')^2 x, after division by the Frobenius norm; with a, b, c chosen for the slope at 0.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    turned = x.shape[1] > x.shape[2]
    if turned:
        x = x.swapaxes(1, 2)
    x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + epsilon)
    for _ in range(num_iterations):
        square = x @ x.swapaxes(1, 2)
        x = a * x + (b * square + c * (square @ square)) @ x
    return x.swapaxes(1, 2) if turned else x


def regex(name: str, pattern: str) -> re.Pattern[str]:
    """The pattern compiled; ValueError that calls it `name` where it is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}={pattern!r} is no regular expression: {error}") from error


def _kept_in(inner: optax.GradientTransformation, **dtypes: str) -> optax.GradientTransformation:
    """`inner` whose state's trees of these names are kept in other dtypes between the steps."""
    dtypes = {name: dtype for name, dtype in dtypes.items() if dtype != "float32"}
    if not dtypes:
        return inner

    def cast(state, dtypes):
        trees = {name: optax.tree.cast(getattr(state, name), dtypes[name]) for name in dtypes}
        return state._replace(**trees)

    def update(gradients, state, params=None):
        y, state = inner.update(gradients, cast(state, dict.fromkeys(dtypes, "float32")), params)
        return y, cast(state, dtypes)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), dtypes), update)


def _check_share(name: str, value: float, dtype: str = "float32", dtype_name: str = "") -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}={value} is not in [0, 1)")
    if dtype not in DTYPES:
        raise ValueError(f"{dtype_name}='{dtype}' is none of {', '.join(DTYPES)}")
    if dtype == "bfloat16" and 1.0 - value < 2.0**-8:
        raise ValueError(
            f"{name}={value} changes a moment by {1.0 - value:.2g} of itself in a step, which {dtype_name}=bfloat16 "
            f"(8 bits) rounds away; use {name} <= 0.996, or float32"
        )


def _rms(x: Array, dims: tuple[int, ...]) -> Array:
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=dims, keepdims=True))


def _unzip(tree: PyTree, number: int) -> list[PyTree]:
    """A tree of tuples as a tuple of trees."""
    is_leaf = lambda x: type(x) is tuple
    return [jax.tree.map(lambda x, i=i: x[i], tree, is_leaf=is_leaf) for i in range(number)]


Direction = Adam | Adafactor | Lion | Muon | Sgd
