"""LLaMA's neighbours with experts in every layer: Mixtral and Qwen 3.

Sources: Jiang et al. 2024 (Mixtral), the report on Qwen 3, and the `config.json` that is published with each. No token
is dropped, as in the models as published.
"""

from typing import Annotated, Any

import fiddle as fdl

from configs.llama import BaseLLaMA
from configs.moe import MoEKnobs
from paxlike.weights import MixtralWeights, QwenMoeWeights, UpcycledWeights


class Mixtral(MoEKnobs, BaseLLaMA, abstract=True):
    """Experts in every layer."""

    UPCYCLE: Annotated[
        bool,
        "CHECKPOINT_RESTORE_PATH has the model without experts (Hugging Face): each becomes a copy of its layer",
    ] = False

    def feed_forward(self) -> fdl.Config[Any]:
        """Experts."""
        return self.moe(num_layers=self.NUM_LAYERS, gated=True)

    def weights(self) -> fdl.Config[Any]:
        """How Hugging Face names these weights."""
        if self.UPCYCLE:
            return self._dense_weights()
        return fdl.Config(
            QwenMoeWeights if self.QK_NORM else MixtralWeights,
            config=self.hugging_face_config(),
            rope_interleaved=self.ROPE_LAYOUT == "interleaved",
        )

    def _dense_weights(self) -> fdl.Config[Any]:
        if self.expert_width() != self.HIDDEN_DIMS or self.NUM_SHARED_EXPERTS:
            raise ValueError(
                f"UPCYCLE=True copies a layer of HIDDEN_DIMS={self.HIDDEN_DIMS} to each expert: leave "
                "EXPERT_HIDDEN_DIMS and NUM_SHARED_EXPERTS unset"
            )
        if not self.RENORMALIZE_GATES or self.GATE_SCALE != 1.0:
            raise ValueError(
                "UPCYCLE=True keeps the function only where the gates of a token sum to 1: set RENORMALIZE_GATES=True "
                "and GATE_SCALE=1"
            )
        if self.USE_LORA:
            raise ValueError("UPCYCLE=True trains new routers: leave out USE_LORA")
        return fdl.Config(
            UpcycledWeights,
            config=super().hugging_face_config(),
            rope_interleaved=self.ROPE_LAYOUT == "interleaved",
        )

    def hugging_face_config(self) -> dict[str, Any]:
        """What `config.json` of Hugging Face says about this model."""
        config = super().hugging_face_config()
        config["num_experts_per_tok"] = self.NUM_EXPERTS_PER_TOKEN
        config["router_aux_loss_coef"] = self.LOAD_BALANCING_WEIGHT
        if self.QK_NORM:
            return config | {
                "architectures": ["Qwen3MoeForCausalLM"],
                "model_type": "qwen3_moe",
                "num_experts": self.NUM_EXPERTS,
                "moe_intermediate_size": self.expert_width(),
                "norm_topk_prob": self.RENORMALIZE_GATES,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            }
        return config | {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_local_experts": self.NUM_EXPERTS,
            "intermediate_size": self.expert_width(),
        }


class Mixtral8x7B(Mixtral):
    """Mixtral 8x7B (47B parameters, 13B for a token), 16 GPUs."""

    NUM_LAYERS = 32
    NUM_HEADS = 32
    NUM_KV_HEADS = 8
    DIMS_PER_HEAD = 128
    MODEL_DIMS = 4096
    HIDDEN_DIMS = 14336
    NUM_EXPERTS = 8
    LOAD_BALANCING_WEIGHT = 0.02
    ROPE_THETA = 1000000.0
    DCN_MESH_SHAPE = (1, 2, 1)
    PERCORE_BATCH_SIZE = 4


class Mixtral8x22B(Mixtral8x7B):
    """Mixtral 8x22B (141B parameters, 39B for a token), 64 GPUs."""

    NUM_LAYERS = 56
    NUM_HEADS = 48
    MODEL_DIMS = 6144
    HIDDEN_DIMS = 16384
    LOAD_BALANCING_WEIGHT = 0.001
    DCN_MESH_SHAPE = (1, 8, 1)
    PERCORE_BATCH_SIZE = 2


class Qwen3_30B_A3B(Mixtral):
    """Qwen 3 30B: 128 experts, 3B parameters for a token, 16 GPUs."""

    NUM_LAYERS = 48
    NUM_HEADS = 32
    NUM_KV_HEADS = 4
    DIMS_PER_HEAD = 128
    MODEL_DIMS = 2048
    HIDDEN_DIMS = 6144
    EXPERT_HIDDEN_DIMS = 768
    NUM_EXPERTS = 128
    NUM_EXPERTS_PER_TOKEN = 8
    LOAD_BALANCING_WEIGHT = 0.001
    VOCAB_SIZE = 151936
    ROPE_THETA = 1000000.0
    RMS_NORM_EPSILON = 1e-6
    QK_NORM = True
    DCN_MESH_SHAPE = (1, 2, 1)
    PERCORE_BATCH_SIZE = 4


class Qwen3_235B_A22B(Qwen3_30B_A3B):
    """Qwen 3 235B: 128 experts, 22B parameters for a token, 64 GPUs."""

    NUM_LAYERS = 94
    NUM_HEADS = 64
    MODEL_DIMS = 4096
    HIDDEN_DIMS = 12288
    EXPERT_HIDDEN_DIMS = 1536
    DCN_MESH_SHAPE = (1, 8, 1)
    PERCORE_BATCH_SIZE = 2
