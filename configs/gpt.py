"""GPT-3 as Pax trained it: 126M, 5B and 175B on the Pile, on synthetic tokens, and evaluated on LAMBADA.

Sources: Brown et al. 2020 (GPT-3); the numbers are those of Pax's GPU configs, weight decay on all parameters included.
"""

from typing import Annotated, Any, Literal

import fiddle as fdl
from flax import linen as nn
from flax.linen import fp8_ops

from configs.language import NORMS_AND_BIASES, LanguageModelKnobs, SyntheticData
from paxlike.layers.attention import Attention
from paxlike.layers.block import Block
from paxlike.layers.embedding import Embedding, LearnedPosition
from paxlike.layers.feedforward import FeedForward
from paxlike.layers.norm import LayerNorm
from paxlike.layers.stack import REMAT_POLICIES, Stack
from paxlike.models.decoder import Decoder


class GPT(LanguageModelKnobs, abstract=True):
    """The GPT model."""

    NUM_LAYERS: Annotated[int, "transformer blocks"] = 12
    NUM_HEADS: Annotated[int, "attention heads"] = 12
    DIMS_PER_HEAD: Annotated[int | None, "size of a head; None: MODEL_DIMS / NUM_HEADS"] = None
    MODEL_DIMS: Annotated[int, "width of the residual stream"] = 768
    HIDDEN_DIMS: Annotated[int, "width inside the feed-forward layer"] = 3072
    ACTIVATION: Annotated[
        Literal["gelu", "gelu_exact", "relu", "silu"], "of the feed-forward layer; gelu is tanh"
    ] = "gelu"
    USE_GATED_ACTIVATION: Annotated[bool, "multiply the activation with a second projection"] = (
        False
    )
    USE_BIAS: Annotated[bool, "biases in attention and feed-forward layers"] = True
    COMBINE_QKV: Annotated[bool, "one weight for queries, keys and values"] = True
    SEPARATE_EMBEDDING: Annotated[bool, "an output table of its own (untied)"] = False
    TRAINABLE_POSITION_EMB: Annotated[bool, "learned positions; False: none"] = True
    EMBEDDING_LOOKUP_STYLE: Annotated[
        Literal["index", "matmul"], "gather rows, or multiply with one-hot"
    ] = "index"
    LAYERNORM_EPSILON: Annotated[float, "added to the variance"] = 1e-5
    INIT_STD: Annotated[float, "standard deviation of initial weights"] = 0.023
    SOFTMAX_INIT_STD: Annotated[float | None, "of the token table; None: INIT_STD"] = None
    DROPOUT_PROB: Annotated[float, "dropout behind attention and feed-forward layers"] = 0.0
    EMBEDDING_DROPOUT_PROB: Annotated[float, "dropout on the input embedding"] = 0.0
    USE_REPEATED_LAYER: Annotated[
        bool, "scan over layers: compile time does not grow with depth"
    ] = False
    CHECKPOINT_POLICY: Annotated[
        str, "what is kept for the backward pass; SAVE_NOTHING recomputes all"
    ] = "SAVE_EVERYTHING"
    USE_CUDNN_FLASH_ATTENTION: Annotated[
        bool | None, "cuDNN attention; None: where it can serve"
    ] = None
    USE_FP8: Annotated[bool, "FP8 in attention projections and feed-forward layers"] = False

    def model(self) -> fdl.Config[Any]:
        """A pre-norm decoder."""
        self._check()
        return fdl.Config(
            Decoder,
            embedding=self.table(),
            head=self.table() if self.SEPARATE_EMBEDDING else None,
            position=fdl.Config(
                LearnedPosition,
                max_length=self.MAX_SEQ_LEN,
                table_init=self.init(),
                dtype=self.FPROP_DTYPE,
            )
            if self.TRAINABLE_POSITION_EMB
            else None,
            stack=fdl.Config(
                Stack,
                period=(self.block(),),
                repeats=self.NUM_LAYERS,
                remat=self.CHECKPOINT_POLICY,
                scan=self.USE_REPEATED_LAYER,
            ),
            norm=self.norm(),
            embedding_dropout=self.EMBEDDING_DROPOUT_PROB,
        )

    def block(self) -> fdl.Config[Block]:
        """Attention, then feed-forward."""
        linear = {
            "use_bias": self.USE_BIAS,
            "dropout": self.DROPOUT_PROB,
            "dtype": self.FPROP_DTYPE,
            "dot_general_cls": fp8_ops.Fp8DotGeneralOp if self.USE_FP8 else None,
        }
        return fdl.Config(
            Block,
            mixer=fdl.Config(
                Attention,
                num_heads=self.NUM_HEADS,
                head_dim=self.head_dim(),
                combine_qkv=self.COMBINE_QKV,
                kernel_init=self.init(),
                implementation={None: "auto", True: "cudnn", False: "xla"}[
                    self.USE_CUDNN_FLASH_ATTENTION
                ],
                **linear,
            ),
            ffn=fdl.Config(
                FeedForward,
                hidden=self.HIDDEN_DIMS,
                activation=self.ACTIVATION,
                gated=self.USE_GATED_ACTIVATION,
                kernel_init=self.init(),
                **linear,
            ),
            mixer_norm=self.norm(),
            ffn_norm=self.norm(),
        )

    def _check(self) -> None:
        """Refuses names and sizes that no layer could work with, in terms of the knobs."""
        if self.CHECKPOINT_POLICY not in REMAT_POLICIES:
            raise ValueError(
                f"CHECKPOINT_POLICY='{self.CHECKPOINT_POLICY}' is none of {', '.join(REMAT_POLICIES)}"
            )
        for name in ("NUM_LAYERS", "NUM_HEADS", "MODEL_DIMS", "HIDDEN_DIMS", "VOCAB_SIZE"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def head_dim(self) -> int:
        """Size of a head."""
        if self.DIMS_PER_HEAD is None and self.MODEL_DIMS % self.NUM_HEADS:
            raise ValueError(
                f"MODEL_DIMS={self.MODEL_DIMS} does not divide by NUM_HEADS={self.NUM_HEADS}; set "
                "DIMS_PER_HEAD or another number of heads"
            )
        return self.DIMS_PER_HEAD or self.MODEL_DIMS // self.NUM_HEADS

    def norm(self) -> fdl.Config[LayerNorm]:
        """LayerNorm."""
        return fdl.Config(LayerNorm, epsilon=self.LAYERNORM_EPSILON, dtype=self.FPROP_DTYPE)

    def table(self) -> fdl.Config[Embedding]:
        """Token table."""
        std = self.INIT_STD if self.SOFTMAX_INIT_STD is None else self.SOFTMAX_INIT_STD
        return fdl.Config(
            Embedding,
            vocab_size=self.VOCAB_SIZE,
            features=self.MODEL_DIMS,
            table_init=self.init(std),
            lookup=self.EMBEDDING_LOOKUP_STYLE,
            dtype=self.FPROP_DTYPE,
        )

    def init(self, std: float | None = None) -> fdl.Config[Any]:
        """Gaussian initialiser; a node of its own at each place."""
        return fdl.Config(nn.initializers.normal, stddev=self.INIT_STD if std is None else std)


class Pile126M(GPT):
    """GPT-3 126M on the Pile, 64 GPUs."""

    ICI_MESH_SHAPE = (8, 1, 1)
    DCN_MESH_SHAPE = (8, 1, 1)
    DIMS_PER_HEAD = 64
    EVAL_SETS = ("PileValidation",)


class Pile5B(Pile126M):
    """GPT-3 5B on the Pile, 256 GPUs, fsdp."""

    NUM_LAYERS = 24
    NUM_HEADS = 32
    DIMS_PER_HEAD = 128
    MODEL_DIMS = 4096
    HIDDEN_DIMS = 16384
    ICI_MESH_SHAPE = (1, 8, 1)
    DCN_MESH_SHAPE = (1, 32, 1)
    PERCORE_BATCH_SIZE = 8
    INIT_STD = 0.01
    EMBEDDING_DROPOUT_PROB = 0.1
    USE_REPEATED_LAYER = True
    CHECKPOINT_POLICY = "SAVE_DOT_WITH_NO_BATCH_DIM"
    MAX_STEPS = 75000
    LEARNING_RATE = 1.6e-4
    LR_COS_WARMUP = 115
    LR_COS_DECAY_START = 116
    LR_COS_DECAY_END = 62500
    CHECKPOINT_EVERY_N_STEPS = 250
    SUMMARY_INTERVAL_STEPS = 10


class Pile175B(Pile126M):
    """GPT-3 175B on the Pile, 256 GPUs, fsdp."""

    NUM_LAYERS = 96
    NUM_HEADS = 96
    DIMS_PER_HEAD = 128
    MODEL_DIMS = 12288
    HIDDEN_DIMS = 49152
    VOCAB_SIZE = 50257
    ICI_MESH_SHAPE = (1, 8, 1)
    DCN_MESH_SHAPE = (1, 32, 1)
    PERCORE_BATCH_SIZE = 6
    USE_REPEATED_LAYER = True
    CHECKPOINT_POLICY = "SAVE_NOTHING"
    MAX_STEPS = 75000
    LEARNING_RATE = 2e-5
    LR_COS_WARMUP = 265
    LR_COS_DECAY_START = 266
    LR_COS_DECAY_END = 108600
    CHECKPOINT_EVERY_N_STEPS = 100
    SUMMARY_INTERVAL_STEPS = 10


class Synthetic126M(SyntheticData, Pile126M):
    """GPT-3 126M on synthetic tokens, for speed."""

    MAX_STEPS = 100
    EVAL_SETS = ()


class Synthetic5B(SyntheticData, Pile5B):
    """GPT-3 5B on synthetic tokens, for speed."""

    MAX_STEPS = 100
    EVAL_SETS = ()


class Synthetic175B(SyntheticData, Pile175B):
    """GPT-3 175B on synthetic tokens, for speed."""

    MAX_STEPS = 100
    EVAL_SETS = ()


class Lambada126M(Pile126M):
    """GPT-3 126M evaluated on LAMBADA (--mode=eval)."""

    ICI_MESH_SHAPE = (8, 1, 1)
    EVAL_SETS = ("LambadaValidation",)

    def train_data(self) -> None:
        """Nothing: this config only evaluates."""
        return None


class Quickstart(GPT):
    """A small GPT on the text that comes with Python; minutes on a laptop."""

    NUM_LAYERS = 4
    NUM_HEADS = 4
    MODEL_DIMS = 128
    HIDDEN_DIMS = 512
    VOCAB_SIZE = 4096
    MAX_SEQ_LEN = 256
    INIT_STD = 0.02
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


GPT5B = Pile5B
GPT175B = Pile175B
