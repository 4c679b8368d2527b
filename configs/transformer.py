"""Knobs that every stack of attention and feed-forward blocks has, and the parts that they make."""

import copy
from typing import Annotated, Any, Literal

import fiddle as fdl
from flax import linen as nn

from configs.bounds import AtLeast, Below
from configs.fp8 import Fp8Knobs
from configs.language import LanguageModelKnobs
from configs.optimization import NORMS_AND_BIASES
from paxlike import parallel
from paxlike.layers import remat
from paxlike.layers.embedding import Embedding
from paxlike.layers.feedforward import FeedForward
from paxlike.layers.stack import Pipeline, Stack


class TransformerKnobs(Fp8Knobs, LanguageModelKnobs, abstract=True):
    """The blocks."""

    NUM_LAYERS: Annotated[int, "transformer blocks", AtLeast(1)] = 12
    NUM_HEADS: Annotated[int, "attention heads", AtLeast(1)] = 12
    DIMS_PER_HEAD: Annotated[
        int | None, "size of a head; None: MODEL_DIMS / NUM_HEADS", AtLeast(1)
    ] = None
    MODEL_DIMS: Annotated[int, "width of the residual stream", AtLeast(1)] = 768
    HIDDEN_DIMS: Annotated[int, "width inside the feed-forward layer", AtLeast(1)] = 3072
    ACTIVATION: Annotated[
        Literal["gelu", "gelu_exact", "relu", "silu"], "of the feed-forward layer; gelu is tanh"
    ] = "gelu"
    COMBINE_QKV: Annotated[bool, "one weight for queries, keys and values"] = True
    SEPARATE_EMBEDDING: Annotated[bool, "an output table of its own (untied)"] = False
    EMBEDDING_LOOKUP_STYLE: Annotated[
        Literal["index", "matmul"], "gather rows, or multiply with one-hot"
    ] = "index"
    INIT_STD: Annotated[float, "standard deviation of initial weights", AtLeast(0)] = 0.02
    SOFTMAX_INIT_STD: Annotated[float | None, "of the token table; None: INIT_STD", AtLeast(0)] = (
        None
    )
    DROPOUT_PROB: Annotated[
        float, "dropout behind attention and feed-forward layers", AtLeast(0), Below(1)
    ] = 0.0
    EMBEDDING_DROPOUT_PROB: Annotated[
        float, "dropout on the input embedding", AtLeast(0), Below(1)
    ] = 0.0
    USE_REPEATED_LAYER: Annotated[
        bool, "scan over layers: compile time does not grow with depth"
    ] = False
    CHECKPOINT_POLICY: Annotated[
        str, "what is kept for the backward pass: a policy, or tensors between commas, host:TENSOR"
    ] = "SAVE_EVERYTHING"
    CHECKPOINT_LAYERS: Annotated[
        str, "repeats of the blocks that CHECKPOINT_POLICY holds for: all, first:K or every:K"
    ] = "all"
    USE_CUDNN_FLASH_ATTENTION: Annotated[
        bool | None, "cuDNN attention, with USE_TE by Transformer Engine; None: where it can serve"
    ] = None
    ATTENTION_KERNEL: Annotated[
        Literal["auto", "te", "cudnn", "chunked", "reference"], "auto: the fastest that can serve"
    ] = "auto"

    def stacks(
        self, *period: fdl.Config[Any]
    ) -> tuple[fdl.Config[Stack], fdl.Config[Stack] | None]:
        """NUM_LAYERS blocks, those of `period` in turn: whole periods, and the blocks of a last one that is not."""
        rest, stages = self.NUM_LAYERS % len(period), self.mesh().shape.get("pipeline", 1)
        if not rest:
            return self.stack(*period), None
        if stages > 1:
            raise ValueError(
                f"NUM_LAYERS={self.NUM_LAYERS} leaves {rest} over of periods of {len(period)} blocks, which cannot be "
                f"used with {stages} pipeline stages: leave out the pipeline"
            )
        if len(period) > self.NUM_LAYERS:
            return self.stack(*period[:rest]), None
        stack = self.stack(*period, layers=self.NUM_LAYERS - rest)
        tail = copy.deepcopy(stack)
        tail.period, tail.repeats, tail.remat_layers = tail.period[:rest], 1, "all"
        return stack, tail

    def stack(self, *period: fdl.Config[Any], layers: int | None = None) -> fdl.Config[Stack]:
        """NUM_LAYERS blocks, or `layers`, those of `period` in turn."""
        layers = self.NUM_LAYERS if layers is None else layers
        if layers % len(period):
            raise ValueError(
                f"NUM_LAYERS={layers} is not a multiple of the {len(period)} blocks of a period"
            )
        repeats, microbatches = layers // len(period), self.microbatches()
        stages = self.mesh().shape.get("pipeline", 1)
        remat.policy_of(self.CHECKPOINT_POLICY)
        remat.choice_of(self.CHECKPOINT_LAYERS, repeats)
        if self.CHECKPOINT_LAYERS != "all" and stages > 1:
            raise ValueError(
                f"CHECKPOINT_LAYERS='{self.CHECKPOINT_LAYERS}' cannot be used with {stages} pipeline stages: set it "
                "to all"
            )
        parallel.check_pipeline(
            stages, layers=repeats, microbatches=microbatches, repeats=self.CIRCULAR_REPEAT
        )
        pipeline = {
            "num_microbatches": microbatches if stages > 1 else 1,
            "repeats": self.CIRCULAR_REPEAT,
            "gather_once": self.PIPELINE_GATHER_ONCE,
        }
        return fdl.Config(
            Stack,
            period=period,
            repeats=repeats,
            remat=self.CHECKPOINT_POLICY,
            remat_layers=self.CHECKPOINT_LAYERS,
            scan=self.USE_REPEATED_LAYER,
            pipeline=fdl.Config(Pipeline, **pipeline),
        )

    def table(self, **options: Any) -> fdl.Config[Embedding]:
        """Token table."""
        std = self.INIT_STD if self.SOFTMAX_INIT_STD is None else self.SOFTMAX_INIT_STD
        return fdl.Config(
            Embedding,
            vocab_size=self.VOCAB_SIZE,
            features=self.MODEL_DIMS,
            table_init=self.init(std),
            lookup=self.EMBEDDING_LOOKUP_STYLE,
            dtype=self.FPROP_DTYPE,
            **options,
        )

    def projections(self) -> dict[str, Any]:
        """Options of the layers that are made of `Linear`s."""
        return {
            "kernel_init": self.init(),
            "dropout": self.DROPOUT_PROB,
            "dtype": self.FPROP_DTYPE,
        }

    def feed_forward_layer(self, **changes: Any) -> fdl.Config[FeedForward]:
        """HIDDEN_DIMS wide, with ACTIVATION."""
        sizes = {"hidden": self.HIDDEN_DIMS, "activation": self.ACTIVATION}
        return fdl.Config(FeedForward, **{**sizes, **self.projections(), **changes})

    def attention_backend(self) -> str:
        """The kernel of attention, by its name in `paxlike.ops.attention_kernels`."""
        asked, given = self.USE_CUDNN_FLASH_ATTENTION, self.ATTENTION_KERNEL
        if asked is None:
            return given
        if given not in ("auto", "te", "cudnn") if asked else given in ("te", "cudnn"):
            raise ValueError(
                f"USE_CUDNN_FLASH_ATTENTION={asked} and ATTENTION_KERNEL={given} contradict each other: set one of them"
            )
        if not asked:
            return "reference" if given == "auto" else given
        if given == "auto":
            return "fused" if self.USE_TE else "cudnn"
        return given

    def init(self, std: float | None = None) -> fdl.Config[Any]:
        """Gaussian initialiser; a node of its own at each place."""
        return fdl.Config(nn.initializers.normal, stddev=self.INIT_STD if std is None else std)

    def head_dim(self) -> int:
        """Size of a head."""
        if self.DIMS_PER_HEAD is None and self.MODEL_DIMS % self.NUM_HEADS:
            raise ValueError(
                f"MODEL_DIMS={self.MODEL_DIMS} does not divide by NUM_HEADS={self.NUM_HEADS}; set "
                "DIMS_PER_HEAD or another number of heads"
            )
        if self.DIMS_PER_HEAD is not None:
            return self.DIMS_PER_HEAD
        return self.MODEL_DIMS // self.NUM_HEADS


class QuickstartRun(TransformerKnobs, abstract=True):
    """The run of the quickstart: the text that comes with Python, minutes on a laptop."""

    VOCAB_SIZE = 4096
    MAX_SEQ_LEN = 256
    ICI_MESH_SHAPE = (-1, 1, 1)
    PERCORE_BATCH_SIZE = 8
    FPROP_DTYPE = "float32"
    PACKED_INPUT = True
    MAX_STEPS = 1200
    LEARNING_RATE = 3e-3
    LR_COS_WARMUP = 60
    LR_COS_DECAY_START = 61
    LR_COS_DECAY_END = 1200
    WEIGHT_DECAY_EXCLUDE = NORMS_AND_BIASES
    EVAL_SETS = ("HeldOut",)
    EVAL_ON_TEST = True
    EVAL_INTERVAL_STEPS = 200
    SUMMARY_INTERVAL_STEPS = 10
    CHECKPOINT_EVERY_N_STEPS = 200
    CHECKPOINT_MAX_TO_KEEP = 2
