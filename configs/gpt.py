"""GPT-3 as Pax trained it: 126M, 5B and 175B on the Pile, on synthetic tokens, and evaluated on LAMBADA.

Sources: Brown et al. 2020 (GPT-3); the numbers are those of Pax's GPU configs, weight decay on all parameters included.
"""

from typing import Annotated, Any

import fiddle as fdl

from configs.bounds import AtLeast
from configs.data import EvaluatesOnly, SyntheticData
from configs.transformer import QuickstartRun, TransformerKnobs
from paxlike.layers.attention import Attention
from paxlike.layers.block import Block
from paxlike.layers.embedding import LearnedPosition
from paxlike.layers.norm import LayerNorm
from paxlike.models.decoder import Decoder
from paxlike.weights import GPT2Weights


class GPT(TransformerKnobs, abstract=True):
    """The GPT model."""

    USE_GATED_ACTIVATION: Annotated[bool, "multiply the activation with a second projection"] = (
        False
    )
    USE_BIAS: Annotated[bool, "biases in attention and feed-forward layers"] = True
    TRAINABLE_POSITION_EMB: Annotated[bool, "learned positions; False: none"] = True
    LAYERNORM_EPSILON: Annotated[float, "added to the variance", AtLeast(0)] = 1e-5
    INIT_STD = 0.023

    def model(self) -> fdl.Config[Any]:
        """A pre-norm decoder."""
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
            stack=self.stack(self.block()),
            norm=self.norm(),
            embedding_dropout=self.EMBEDDING_DROPOUT_PROB,
            context=self.CONTEXT_PARALLEL,
        )

    def block(self) -> fdl.Config[Block]:
        """Attention, then feed-forward."""
        return fdl.Config(
            Block,
            mixer=fdl.Config(
                Attention,
                num_heads=self.NUM_HEADS,
                head_dim=self.head_dim(),
                combine_qkv=self.COMBINE_QKV,
                use_bias=self.USE_BIAS,
                implementation=self.attention_backend(),
                **self.projections(),
            ),
            ffn=self.feed_forward_layer(gated=self.USE_GATED_ACTIVATION, use_bias=self.USE_BIAS),
            mixer_norm=self.norm(),
            ffn_norm=self.norm(),
        )

    def weights(self) -> fdl.Config[Any]:
        """How Hugging Face's GPT-2 names these weights."""
        gelu = {"gelu": "gelu_new", "gelu_exact": "gelu"}
        config = {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": self.VOCAB_SIZE,
            "n_embd": self.MODEL_DIMS,
            "n_layer": self.NUM_LAYERS,
            "n_head": self.NUM_HEADS,
            "n_inner": self.HIDDEN_DIMS,
            "n_positions": self.MAX_SEQ_LEN,
            "layer_norm_epsilon": self.LAYERNORM_EPSILON,
            "activation_function": gelu.get(self.ACTIVATION, self.ACTIVATION),
            "tie_word_embeddings": not self.SEPARATE_EMBEDDING,
        }
        return fdl.Config(GPT2Weights, config=config)

    def norm(self) -> fdl.Config[LayerNorm]:
        """LayerNorm."""
        return fdl.Config(LayerNorm, epsilon=self.LAYERNORM_EPSILON, dtype=self.FPROP_DTYPE)


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


class Lambada126M(EvaluatesOnly, Pile126M):
    """GPT-3 126M evaluated on LAMBADA (--mode=eval)."""

    ICI_MESH_SHAPE = (8, 1, 1)
    EVAL_SETS = ("LambadaValidation",)


class Quickstart(QuickstartRun, GPT):
    """A small GPT on the text that comes with Python; minutes on a laptop."""

    NUM_LAYERS = 4
    NUM_HEADS = 4
    MODEL_DIMS = 128
    HIDDEN_DIMS = 512
    INIT_STD = 0.02


GPT5B = Pile5B
GPT175B = Pile175B
