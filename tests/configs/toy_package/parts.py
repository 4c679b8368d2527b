"""What the toy configs build: plain dataclasses and functions in place of models and optimizers."""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any


class Remat(enum.Enum):
    NOTHING = 0
    EVERYTHING = 1


def relu(x: float) -> float:
    return max(x, 0.0)


@dataclasses.dataclass
class Norm:
    epsilon: float = 1e-6
    scale: bool = True


@dataclasses.dataclass
class Block:
    hidden: int
    dropout: float = 0
    activation: Callable[[float], float] = relu
    dtype: Any = "bfloat16"
    remat: Any = Remat.NOTHING
    norm: Norm | None = None
    axes: tuple[str, ...] = ("data", "tensor")
    shape: Any = (1, 2)
    names: list[str] = dataclasses.field(default_factory=lambda: ["a"])
    extra: "dict[str, float] | None" = None
    table: Any = dataclasses.field(default_factory=lambda: {"a": 1})
    head: "Norm | None" = None
    made: Norm = dataclasses.field(default_factory=Norm)


@dataclasses.dataclass
class Model:
    blocks: list[Block]
    vocab_size: int
    tied: "bool" = True


def adam(learning_rate: float, b1=0.9, steps=10, *, clip: float | None = None) -> tuple:
    return (learning_rate, b1, steps, clip)


def chain(*parts: Any) -> tuple:
    return parts


@dataclasses.dataclass
class Experiment:
    name: str
    model: Model
    optimizer: tuple
    eval_data: dict[str, Any]
    seed: int = 1
    mesh: tuple[int, ...] = (1, 1, 1)
