"""GLaM as Pax trained it: every other layer has 64 experts, of which a token goes to two.

Sources: Du et al. 2022 (GLaM), Lepikhin et al. 2020 (GShard: router, capacity, auxiliary loss); the numbers are those
of Pax's GPU configs. Where they differ from its README the README is followed: rows of 2,048 tokens for 64B, and 8 rows
per GPU for 126M.
"""

from typing import Annotated, Any

import fiddle as fdl
from flax import linen as nn

from configs.bounds import AtLeast
from configs.data import EvaluatesOnly, SyntheticData
from configs.moe import MoEKnobs
from paxlike.layers.attention import Attention
from paxlike.layers.block import Block
from paxlike.layers.feedforward import FeedForward
from paxlike.layers.norm import RMSNorm
from paxlike.models.decoder import Decoder


class GLaMKnobs(MoEKnobs, abstract=True):
    """The GLaM model."""

    RMS_NORM_EPSILON: Annotated[float, "added to the mean square", AtLeast(0)] = 1e-6
    RELATIVE_BUCKETS: Annotated[
        int, "ranges of distance with a bias of their own in attention", AtLeast(1)
    ] = 32
    COMBINE_QKV = False
    EXPERT_CAPACITY_FACTOR = 2.0
    BALANCE_FIRST_CHOICES = True
    EXPERT_AXES = ("fsdp", "expert")


class GLaM(GLaMKnobs, abstract=True):
    """Blocks with experts and dense ones in turn."""

    def model(self) -> fdl.Config[Any]:
        """A decoder of blocks with experts and dense ones in turn."""
        if self.NUM_LAYERS % 2:
            raise ValueError(
                f"NUM_LAYERS={self.NUM_LAYERS} is odd: every other layer has experts, use an even number"
            )
        width = float(self.MODEL_DIMS)
        return fdl.Config(
            Decoder,
            embedding=self.table(scale=width**0.5),
            head=self.table() if self.SEPARATE_EMBEDDING else None,
            stack=self.stack(self.block(self.experts()), self.block(self.dense())),
            norm=self.norm(),
            embedding_dropout=self.EMBEDDING_DROPOUT_PROB,
            context=self.CONTEXT_PARALLEL,
            logit_scale=width**-0.5,
        )

    def block(self, ffn: fdl.Config[Any]) -> fdl.Config[Block]:
        """Attention, then `ffn`."""
        return fdl.Config(
            Block, mixer=self.mixer(), ffn=ffn, mixer_norm=self.norm(), ffn_norm=self.norm()
        )

    def mixer(self) -> fdl.Config[Attention]:
        """Attention with T5's relative bias; 1 / sqrt(head size) is in the initial queries, not in the scores."""
        width, heads, size = self.MODEL_DIMS, self.NUM_HEADS, self.head_dim()
        inits = {
            "query": (width * size) ** -0.5,
            "key": width**-0.5,
            "value": width**-0.5,
            "out": (heads * size) ** -0.5,
        }
        return fdl.Config(
            Attention,
            num_heads=heads,
            head_dim=size,
            combine_qkv=self.COMBINE_QKV,
            use_bias=False,
            query_scale=1.0,
            relative_buckets=self.RELATIVE_BUCKETS,
            relative_init=self.init((heads * self.RELATIVE_BUCKETS) ** -0.5),
            extra_logit=True,
            implementation=self.attention_backend(),
            kernel_inits={name: self.init(std) for name, std in inits.items()},
            **self.projections(),
        )

    def experts(self) -> fdl.Config[Any]:
        """Experts without gate and with ReLU, as Pax built them."""
        return self.moe(
            num_layers=self.NUM_LAYERS // 2,
            gated=False,
            activation="relu",
            kernel_init=_uniform(batch_axis=(0,)),
            kernel_inits={"router": _uniform()},
        )

    def dense(self) -> fdl.Config[FeedForward]:
        """The gated layer between them."""
        return self.feed_forward_layer(gated=True, use_bias=False, kernel_init=_uniform())

    def table(self, **options: Any) -> fdl.Config[Any]:
        """Token table, of standard deviation 1 unless SOFTMAX_INIT_STD says otherwise."""
        table = super().table(**options)
        if self.SOFTMAX_INIT_STD is None:
            table.table_init = self.init(1.0)
        return table

    def norm(self) -> fdl.Config[RMSNorm]:
        """RMSNorm."""
        return fdl.Config(RMSNorm, epsilon=self.RMS_NORM_EPSILON, dtype=self.FPROP_DTYPE)


class PileGLaM126M64E(GLaM):
    """GLaM 126M with 64 experts (1.9B parameters) on the Pile, 64 GPUs."""

    NUM_LAYERS = 12
    NUM_HEADS = 12
    DIMS_PER_HEAD = 64
    MODEL_DIMS = 768
    HIDDEN_DIMS = 3072
    ICI_MESH_SHAPE = (1, 64, 1)
    PERCORE_BATCH_SIZE = 8
    PACKED_INPUT = True
    EVAL_SETS = ("PileValidation",)


class PileGLaM64B64E(PileGLaM126M64E):
    """GLaM 64B with 64 experts (1.1T parameters) on the Pile, 512 GPUs."""

    NUM_LAYERS = 64
    NUM_HEADS = 64
    DIMS_PER_HEAD = 128
    MODEL_DIMS = 8192
    HIDDEN_DIMS = 32768
    ICI_MESH_SHAPE = (1, 1, 8)
    DCN_MESH_SHAPE = (1, 64, 1)
    PERCORE_BATCH_SIZE = 4
    SEQUENCE_PARALLEL = True
    USE_REPEATED_LAYER = True
    CHECKPOINT_POLICY = "SAVE_NOTHING"
    LEARNING_RATE = 2e-5
    LR_COS_WARMUP = 398
    LR_COS_DECAY_START = 399
    LR_COS_DECAY_END = 162900
    ADAM_BETA2 = 0.99
    CHECKPOINT_EVERY_N_STEPS = 100
    CHECKPOINT_MAX_TO_KEEP = 2
    SUMMARY_INTERVAL_STEPS = 10


class LambadaGLaM126M64E(EvaluatesOnly, PileGLaM126M64E):
    """GLaM 126M with 64 experts, evaluated on LAMBADA (--mode=eval)."""

    EVAL_SETS = ("LambadaValidation",)
    ICI_MESH_SHAPE = (1, 8, 1)


class LambadaGLaM64B64E(EvaluatesOnly, PileGLaM64B64E):
    """GLaM 64B with 64 experts, evaluated on LAMBADA (--mode=eval)."""

    EVAL_SETS = ("LambadaValidation",)


class SyntheticGLaM126M64E(SyntheticData, PileGLaM126M64E):
    """GLaM 126M with 64 experts on synthetic tokens, for speed."""

    MAX_STEPS = 100
    SYNTHETIC_RANDOM = True
    EVAL_SETS = ()


class SyntheticGLaM64B64E(SyntheticData, PileGLaM64B64E):
    """GLaM 64B with 64 experts on synthetic tokens, for speed."""

    MAX_STEPS = 100
    SYNTHETIC_RANDOM = True
    EVAL_SETS = ()


def _uniform(**options: Any) -> fdl.Config[Any]:
    """Uniform of variance 1 / inputs."""
    return fdl.Config(
        nn.initializers.variance_scaling,
        1.0,
        "fan_in",
        "uniform",
        in_axis=-2,
        out_axis=-1,
        **options,
    )
