"""Toy language models."""

from typing import Annotated, Literal

import fiddle as fdl

from configs.knobs import Knobs
from toy_package import parts


class ModelKnobs(Knobs):
    """Size of the model."""

    NUM_LAYERS: Annotated[int, "transformer blocks"] = 2
    HIDDEN_DIMS: Annotated[int, "width of the feed-forward layers"] = 8
    DROPOUT_PROB: Annotated[float, "share of activations set to zero, 0 to 1"] = 0.0
    FPROP_DTYPE: Annotated[str, "dtype of activations in the forward pass"] = "float32"
    USE_REPEATED_LAYER: Annotated[bool, "scan over the layers instead of unrolling them"] = True
    ENABLE_TE: Annotated[bool, "layers of Transformer Engine in place of our own"] = False


class OptimizerKnobs(Knobs):
    """Optimizer and schedule."""

    LEARNING_RATE: Annotated[float, "peak learning rate"] = 1e-3
    LR_SCHEDULE: Annotated[
        Literal["linear_rampup_cosine_decay", "linear_rampup_exponential_decay", "constant"],
        "how the learning rate changes over the steps of a run",
    ] = "constant"
    MAX_STEPS: Annotated[int, "steps of the whole run"] = 10
    CLIP_GRADIENT_NORM_TO_VALUE: Annotated[
        float | None, "gradients with a larger global norm are scaled down to it; None: never"
    ] = None


class RunKnobs(Knobs):
    """Mesh, batch and files."""

    ICI_MESH_SHAPE: Annotated[tuple[int, ...], "mesh inside a node: [data, fsdp, tensor]"] = (
        1,
        1,
        1,
    )
    MESH_AXES: Annotated[list[str], "names of the mesh axes"] = ["data", "fsdp", "tensor"]
    PERCORE_BATCH_SIZE: Annotated[float, "rows per device; may be a fraction"] = 4
    VOCAB_PATH: Annotated[str | None, "SentencePiece model file"] = None
    MIXTURE: Annotated[dict[str, float], "weight of each data set"] = {"pile": 1}


class GPT(ModelKnobs, OptimizerKnobs, RunKnobs, abstract=True):
    """A decoder."""

    def __post_init__(self):
        if self.HIDDEN_DIMS % 2:
            raise ValueError(f"HIDDEN_DIMS={self.HIDDEN_DIMS} is odd; make it even")

    def experiment(self) -> fdl.Config:
        blocks = [
            fdl.Config(
                parts.Block,
                hidden=self.HIDDEN_DIMS,
                dropout=self.DROPOUT_PROB,
                dtype=self.FPROP_DTYPE,
                norm=fdl.Config(parts.Norm),
            )
            for _ in range(self.NUM_LAYERS)
        ]
        if not self.MAX_STEPS:
            raise ValueError("MAX_STEPS=0: nothing to do; give at least 1")
        return fdl.Config(
            parts.Experiment,
            name=type(self).__name__,
            model=fdl.Config(parts.Model, blocks, vocab_size=100),
            optimizer=fdl.Config(
                parts.chain,
                fdl.Config(parts.adam, self.LEARNING_RATE, clip=self.CLIP_GRADIENT_NORM_TO_VALUE),
                "decay",
            ),
            eval_data={"pile": fdl.Partial(parts.relu), "lambada": None},
            mesh=self.ICI_MESH_SHAPE,
        )


class Pile126M(GPT):
    """GPT-3 126M on the Pile.

    Loss 2.7 after 10 steps of a toy; the second paragraph of this docstring is long enough to need
    wrapping in a narrow terminal.
    """

    HIDDEN_DIMS = 16
    LR_SCHEDULE = "linear_rampup_cosine_decay"


class Pile5B(Pile126M):
    """GPT-3 5B on the Pile."""

    NUM_LAYERS = 3
    ICI_MESH_SHAPE = [1, 8, 1]


GPT5B = Pile5B
