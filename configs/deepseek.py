"""DeepSeek-V2 and V3: latent attention, many narrow experts beside shared ones, dense layers first.

Sources: the reports on DeepSeek-V2 and DeepSeek-V3 (2024), Dai et al. 2024 (DeepSeekMoE), Wang et al. 2024 (balancing
by a bias), and the `config.json` that is published with each. There is no multi-token prediction.
"""

import copy
from typing import Annotated, Any

import fiddle as fdl

from configs.bounds import AtLeast
from configs.knobs import replace
from configs.llama import BaseLLaMA
from configs.moe import MoEKnobs
from configs.optimization import NORMS_AND_BIASES
from paxlike.layers.block import Block
from paxlike.layers.feedforward import FeedForward
from paxlike.layers.latent_attention import LatentAttention
from paxlike.weights import DeepSeekWeights


class DeepSeekKnobs(MoEKnobs, BaseLLaMA, abstract=True):
    """The DeepSeek model."""

    FIRST_DENSE_LAYERS: Annotated[int, "layers without experts, the first ones", AtLeast(0)] = 1
    QUERY_RANK: Annotated[
        int | None, "width between the two projections of queries; None: one projection", AtLeast(1)
    ] = None
    KEY_RANK: Annotated[int, "width of the vector that keys and values are made of", AtLeast(1)] = (
        512
    )
    ROPE_DIMS_PER_HEAD: Annotated[int, "features of a head that positions turn", AtLeast(1)] = 64
    VALUE_DIMS_PER_HEAD: Annotated[int, "size of a value", AtLeast(1)] = 128
    DIMS_PER_HEAD = 192
    ROPE_LAYOUT = "interleaved"
    RMS_NORM_EPSILON = 1e-6
    WEIGHT_DECAY_EXCLUDE = NORMS_AND_BIASES
    ROPE_SCALING = "yarn"
    ROPE_SCALING_FACTOR = 40.0
    ROPE_ORIGINAL_LEN = 4096


class DeepSeek(DeepSeekKnobs, abstract=True):
    """Latent attention, dense layers, then layers of experts."""

    def model(self) -> fdl.Config[Any]:
        """Dense layers, then layers of experts."""
        first, layers = self.FIRST_DENSE_LAYERS, self.NUM_LAYERS
        if not 0 <= first < layers:
            raise ValueError(f"FIRST_DENSE_LAYERS={first} is not between 0 and NUM_LAYERS={layers}")
        if not first:
            return super().model()
        model = replace(self, NUM_LAYERS=layers - first, FIRST_DENSE_LAYERS=0).model()
        # In front of a pipeline, not in it: all stages share its rows.
        model.prefix = copy.deepcopy(model.stack)
        model.prefix.period = (self.block_of(self.dense()),)
        model.prefix.repeats = first
        model.prefix.remat_layers = "all"
        model.prefix.pipeline = None
        return model

    def block(self, *, local: bool) -> fdl.Config[Block]:
        """Attention, then experts."""
        return self.block_of(
            self.moe(num_layers=self.NUM_LAYERS - self.FIRST_DENSE_LAYERS, gated=True)
        )

    def block_of(self, ffn: fdl.Config[Any]) -> fdl.Config[Block]:
        """Attention, then `ffn`."""
        return fdl.Config(
            Block,
            mixer=self.mixer(local=False),
            ffn=ffn,
            mixer_norm=self.norm(),
            ffn_norm=self.norm(),
        )

    def dense(self) -> fdl.Config[FeedForward]:
        """The second half of the first layers."""
        return self.feed_forward()

    def mixer(self, *, local: bool) -> fdl.Config[LatentAttention]:
        """Latent attention."""
        scaling = self.stretch()
        factor = 1.0 if scaling is None else fdl.build(scaling).score_factor
        return fdl.Config(
            LatentAttention,
            num_heads=self.NUM_HEADS,
            head_dim=self.head_dim(),
            combine_qkv=False,
            use_bias=False,
            rope=self.rope(local=local),
            rope_dim=self.ROPE_DIMS_PER_HEAD,
            value_dim=self.VALUE_DIMS_PER_HEAD,
            query_rank=self.QUERY_RANK,
            key_rank=self.KEY_RANK,
            query_latent_norm=None if self.QUERY_RANK is None else self.norm(),
            key_latent_norm=self.norm(),
            query_scale=None if factor == 1.0 else factor * self.head_dim() ** -0.5,
            implementation=self.attention_backend(),
            **self.projections(),
        )

    def weights(self) -> fdl.Config[Any]:
        """How Hugging Face names these weights."""
        return fdl.Config(
            DeepSeekWeights,
            config=self.hugging_face_config(),
            rope_interleaved=self.ROPE_LAYOUT == "interleaved",
        )

    def hugging_face_config(self) -> dict[str, Any]:
        """What `config.json` of Hugging Face says about this model."""
        config = super().hugging_face_config()
        third = self.ROUTER_SCORE == "sigmoid"
        version = 3 if third else 2
        grouped = "group_limited_greedy" if self.EXPERT_GROUPS > 1 else "greedy"
        return config | {
            "architectures": [f"DeepseekV{version}ForCausalLM"],
            "model_type": f"deepseek_v{version}",
            "head_dim": self.ROPE_DIMS_PER_HEAD,
            "num_experts_per_tok": self.NUM_EXPERTS_PER_TOKEN,
            "n_routed_experts": self.NUM_EXPERTS,
            "moe_intermediate_size": self.expert_width(),
            "n_shared_experts": self.NUM_SHARED_EXPERTS,
            "first_k_dense_replace": self.FIRST_DENSE_LAYERS,
            "q_lora_rank": self.QUERY_RANK,
            "kv_lora_rank": self.KEY_RANK,
            "qk_nope_head_dim": self.head_dim() - self.ROPE_DIMS_PER_HEAD,
            "qk_rope_head_dim": self.ROPE_DIMS_PER_HEAD,
            "v_head_dim": self.VALUE_DIMS_PER_HEAD,
            "n_group": self.EXPERT_GROUPS,
            "topk_group": self.EXPERT_GROUPS_PER_TOKEN,
            "norm_topk_prob": self.RENORMALIZE_GATES,
            "routed_scaling_factor": self.GATE_SCALE,
            **({} if third else {"topk_method": grouped}),
        }


class DeepSeekV2Lite(DeepSeek):
    """DeepSeek-V2-Lite (16B parameters, 2.4B for a token), 8 GPUs."""

    NUM_LAYERS = 27
    NUM_HEADS = 16
    MODEL_DIMS = 2048
    HIDDEN_DIMS = 10944
    VOCAB_SIZE = 102400
    EXPERT_HIDDEN_DIMS = 1408
    NUM_EXPERTS = 64
    NUM_EXPERTS_PER_TOKEN = 6
    NUM_SHARED_EXPERTS = 2
    RENORMALIZE_GATES = False
    ROPE_MSCALE = 0.707
    ROPE_MSCALE_ALL_DIM = 0.707
    LOAD_BALANCING_WEIGHT = 0.001
    PERCORE_BATCH_SIZE = 4


class DeepSeekV3(DeepSeek):
    """DeepSeek-V3 (671B parameters, 37B for a token), 512 GPUs."""

    NUM_LAYERS = 61
    NUM_HEADS = 128
    MODEL_DIMS = 7168
    HIDDEN_DIMS = 18432
    VOCAB_SIZE = 129280
    FIRST_DENSE_LAYERS = 3
    QUERY_RANK = 1536
    EXPERT_HIDDEN_DIMS = 2048
    NUM_EXPERTS = 256
    NUM_EXPERTS_PER_TOKEN = 8
    NUM_SHARED_EXPERTS = 1
    ROUTER_SCORE = "sigmoid"
    GATE_SCALE = 2.5
    EXPERT_GROUPS = 8
    EXPERT_GROUPS_PER_TOKEN = 4
    ROUTER_BIAS_RATE = 0.001
    ROPE_MSCALE = 1.0
    ROPE_MSCALE_ALL_DIM = 1.0
    LOAD_BALANCING_WEIGHT = 0.0001
    DCN_MESH_SHAPE = (1, 64, 1)
    PERCORE_BATCH_SIZE = 2
