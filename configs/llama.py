"""The LLaMA family and its neighbours: LLaMA 2 and 3, Mistral, Qwen 2.5 and 3, Gemma 2 and 3.

Sources: Touvron et al. 2023 (LLaMA 2), Jiang et al. 2023 (Mistral 7B), the reports on Llama 3, Qwen 2.5, Qwen 3,
Gemma 2 and Gemma 3, and the `config.json` that is published with each. The numbers of training are those of Pax.
"""

from typing import Annotated, Any, Literal

import fiddle as fdl

from configs.lora import LoraKnobs
from configs.transformer import QuickstartRun, TransformerKnobs
from paxlike.layers.attention import Attention
from paxlike.layers.block import Block
from paxlike.layers.norm import RMSNorm
from paxlike.models.decoder import Decoder
from paxlike.ops.rope import Rope, RopeScaling
from paxlike.weights import GemmaWeights, LlamaWeights

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


class LlamaKnobs(TransformerKnobs, abstract=True):
    """The LLaMA model."""

    NUM_KV_HEADS: Annotated[int | None, "key/value heads; None: NUM_HEADS"] = None
    USE_MQA: Annotated[bool, "one key/value head for all (NUM_KV_HEADS=1)"] = False
    RMS_NORM_EPSILON: Annotated[float, "added to the mean square"] = 1e-5
    ROPE_THETA: Annotated[float, "base of the rotary wavelengths"] = 10000.0
    ROPE_LAYOUT: Annotated[
        Literal["half", "interleaved"],
        "pairs of features: Hugging Face's, or Meta's and Pax's; imported weights are turned to it",
    ] = "half"
    ROPE_SCALING: Annotated[
        Literal["linear", "llama3", "yarn"] | None, "stretches wavelengths for long rows"
    ] = None
    ROPE_SCALING_FACTOR: Annotated[float, "of the stretch"] = 8.0
    ROPE_LOW_FREQ_FACTOR: Annotated[float, "llama3: wavelengths above original / this are long"] = (
        1.0
    )
    ROPE_HIGH_FREQ_FACTOR: Annotated[
        float, "llama3: wavelengths below original / this are left alone"
    ] = 4.0
    ROPE_ORIGINAL_LEN: Annotated[int, "llama3, yarn: tokens of a row in pretraining"] = 8192
    ROPE_BETA_FAST: Annotated[
        float, "yarn: pairs that turn more often in a row of pretraining are left alone"
    ] = 32.0
    ROPE_BETA_SLOW: Annotated[float, "yarn: pairs that turn less often are stretched whole"] = 1.0
    ROPE_MSCALE: Annotated[
        float | None, "yarn: weight of ln(factor) in the size of turned features; None: 1"
    ] = None
    ROPE_MSCALE_ALL_DIM: Annotated[
        float | None, "yarn: the same for what that is divided by; DeepSeek: for scores, too"
    ] = None
    SLIDING_WINDOW: Annotated[int | None, "keys a query sees in local layers; None: all"] = None
    LOCAL_LAYERS_PER_GLOBAL: Annotated[
        int | None, "local layers before each global one; None: all are local if there is a window"
    ] = None
    LOCAL_ROPE_THETA: Annotated[
        float | None, "base of the wavelengths in local layers, which are not stretched; None: same"
    ] = None
    QK_NORM: Annotated[bool, "RMSNorm of each head's queries and keys"] = False
    QKV_BIAS: Annotated[bool, "biases of queries, keys and values"] = False
    QUERY_PRE_ATTN_SCALAR: Annotated[
        int | None, "scores are divided by its square root; None: DIMS_PER_HEAD"
    ] = None
    ATTEN_LOGIT_CAP: Annotated[float, "bound of the scores, 0 or less: none"] = -1.0
    SOFTMAX_CAP_LOGITS: Annotated[float, "bound of the logits, 0 or less: none"] = -1.0
    POST_NORM: Annotated[bool, "a norm behind each half of a block too"] = False
    NORM_ZERO_CENTERED: Annotated[bool, "gains are stored as distance from 1"] = False
    SCALE_EMBEDDING: Annotated[bool, "embeddings times sqrt(MODEL_DIMS)"] = False
    VOCAB_SIZE = 32000
    ACTIVATION = "silu"
    SEPARATE_EMBEDDING = True
    COMBINE_QKV = False
    INIT_STD = 0.02


class Llama(LlamaKnobs, abstract=True):
    """RMSNorm, rotary positions, gated feed-forward, grouped keys and values."""

    def model(self) -> fdl.Config[Any]:
        """A pre-norm decoder without learned positions."""
        self.check_sizes()
        scale = {"scale": float(self.MODEL_DIMS) ** 0.5} if self.SCALE_EMBEDDING else {}
        stack, tail = self.stacks(*self.period())
        return fdl.Config(
            Decoder,
            embedding=self.table(**scale),
            head=self.table() if self.SEPARATE_EMBEDDING else None,
            stack=stack,
            norm=self.norm(),
            embedding_dropout=self.EMBEDDING_DROPOUT_PROB,
            context=self.CONTEXT_PARALLEL,
            logit_cap=_cap(self.SOFTMAX_CAP_LOGITS),
            **({} if tail is None else {"tail": tail}),
        )

    def period(self) -> tuple[fdl.Config[Block], ...]:
        """Local layers, then a global one; one block where all are alike."""
        if self.LOCAL_LAYERS_PER_GLOBAL is None:
            return (self.block(local=self.SLIDING_WINDOW is not None),)
        if self.SLIDING_WINDOW is None:
            raise ValueError(
                f"LOCAL_LAYERS_PER_GLOBAL={self.LOCAL_LAYERS_PER_GLOBAL} needs a SLIDING_WINDOW"
            )
        local = [self.block(local=True) for _ in range(self.LOCAL_LAYERS_PER_GLOBAL)]
        return (*local, self.block(local=False))

    def block(self, *, local: bool) -> fdl.Config[Block]:
        """Attention, then feed-forward."""
        post = {"mixer_post_norm": self.norm(), "ffn_post_norm": self.norm()}
        return fdl.Config(
            Block,
            mixer=self.mixer(local=local),
            ffn=self.feed_forward(),
            mixer_norm=self.norm(),
            ffn_norm=self.norm(),
            **(post if self.POST_NORM else {}),
        )

    def feed_forward(self) -> fdl.Config[Any]:
        """The second half of a block."""
        return self.feed_forward_layer(gated=True, use_bias=False)

    def mixer(self, *, local: bool) -> fdl.Config[Attention]:
        """Attention with rotary positions."""
        size, scalar = self.head_dim(), self.QUERY_PRE_ATTN_SCALAR
        return fdl.Config(
            Attention,
            num_heads=self.NUM_HEADS,
            head_dim=size,
            num_kv_heads=self.kv_heads(),
            combine_qkv=self.COMBINE_QKV,
            window=self.SLIDING_WINDOW if local else None,
            use_bias=self.QKV_BIAS,
            use_out_bias=False,
            rope=self.rope(local=local),
            query_norm=self.norm() if self.QK_NORM else None,
            key_norm=self.norm() if self.QK_NORM else None,
            query_scale=None if scalar is None else scalar**-0.5,
            logit_cap=_cap(self.ATTEN_LOGIT_CAP),
            implementation=self.attention_backend(),
            **self.projections(),
        )

    def rope(self, *, local: bool) -> fdl.Config[Rope]:
        """Rotary positions; local layers may have wavelengths of their own."""
        if local and self.LOCAL_ROPE_THETA is not None:
            return fdl.Config(Rope, theta=self.LOCAL_ROPE_THETA, layout=self.ROPE_LAYOUT)
        return fdl.Config(
            Rope,
            theta=self.ROPE_THETA,
            layout=self.ROPE_LAYOUT,
            scaling=self.stretch(),
        )

    def stretch(self) -> fdl.Config[RopeScaling] | None:
        """How wavelengths are stretched."""
        yarn: dict[str, Any] = {
            "beta_fast": self.ROPE_BETA_FAST,
            "beta_slow": self.ROPE_BETA_SLOW,
            "mscale": self.ROPE_MSCALE,
            "mscale_all_dim": self.ROPE_MSCALE_ALL_DIM,
        }
        if self.ROPE_SCALING is None:
            return None
        return fdl.Config(
            RopeScaling,
            kind=self.ROPE_SCALING,
            factor=self.ROPE_SCALING_FACTOR,
            low_frequency_factor=self.ROPE_LOW_FREQ_FACTOR,
            high_frequency_factor=self.ROPE_HIGH_FREQ_FACTOR,
            original_length=self.ROPE_ORIGINAL_LEN,
            **(yarn if self.ROPE_SCALING == "yarn" else {}),
        )

    def kv_heads(self) -> int:
        """Key/value heads, checked."""
        if self.USE_MQA and self.NUM_KV_HEADS not in (None, 1):
            raise ValueError(
                f"USE_MQA=True is one key/value head, not NUM_KV_HEADS={self.NUM_KV_HEADS}"
            )
        heads = (
            1
            if self.USE_MQA
            else self.NUM_HEADS
            if self.NUM_KV_HEADS is None
            else self.NUM_KV_HEADS
        )
        if heads < 1 or self.NUM_HEADS % heads:
            raise ValueError(
                f"NUM_HEADS={self.NUM_HEADS} is not a multiple of NUM_KV_HEADS={heads}"
            )
        if self.COMBINE_QKV and heads != self.NUM_HEADS:
            raise ValueError(
                f"COMBINE_QKV=True needs as many key/value heads as heads, not {heads} of {self.NUM_HEADS}"
            )
        return heads

    def weights(self) -> fdl.Config[Any]:
        """How Hugging Face and Meta name these weights."""
        kind = GemmaWeights if self.POST_NORM else LlamaWeights
        return fdl.Config(
            kind,
            config=self.hugging_face_config(),
            rope_interleaved=self.ROPE_LAYOUT == "interleaved",
        )

    def hugging_face_config(self) -> dict[str, Any]:
        """What `config.json` of Hugging Face says about this model."""
        kind = self.model_type()
        config: dict[str, Any] = {
            "architectures": [ARCHITECTURES[kind]],
            "model_type": kind,
            "vocab_size": self.VOCAB_SIZE,
            "hidden_size": self.MODEL_DIMS,
            "intermediate_size": self.HIDDEN_DIMS,
            "num_hidden_layers": self.NUM_LAYERS,
            "num_attention_heads": self.NUM_HEADS,
            "num_key_value_heads": self.kv_heads(),
            "head_dim": self.head_dim(),
            "rms_norm_eps": self.RMS_NORM_EPSILON,
            "tie_word_embeddings": not self.SEPARATE_EMBEDDING,
            "max_position_embeddings": self.MAX_SEQ_LEN,
            "hidden_act": {"gelu": "gelu_pytorch_tanh", "gelu_exact": "gelu"}.get(
                self.ACTIVATION, self.ACTIVATION
            ),
            **self._rope_config(),
        }
        if self.SLIDING_WINDOW is not None:
            config["sliding_window"] = self.SLIDING_WINDOW
        if self.POST_NORM:
            period = (self.LOCAL_LAYERS_PER_GLOBAL or 0) + 1
            config["hidden_activation"] = config.pop("hidden_act")
            config["query_pre_attn_scalar"] = self.QUERY_PRE_ATTN_SCALAR or self.head_dim()
            config["attn_logit_softcapping"] = _cap(self.ATTEN_LOGIT_CAP)
            config["final_logit_softcapping"] = _cap(self.SOFTMAX_CAP_LOGITS)
            config["layer_types"] = [
                "sliding_attention" if layer % period < period - 1 else "full_attention"
                for layer in range(self.NUM_LAYERS)
            ]
        return config

    def model_type(self) -> str:
        """The family by its name at Hugging Face."""
        if self.POST_NORM:
            return "gemma3_text" if self.QK_NORM else "gemma2"
        if self.QK_NORM:
            return "qwen3"
        if self.QKV_BIAS:
            return "qwen2"
        return "llama" if self.SLIDING_WINDOW is None else "mistral"

    def _rope_config(self) -> dict[str, Any]:
        scaling: dict[str, Any] | None = None
        if self.ROPE_SCALING is not None:
            scaling = {"rope_type": self.ROPE_SCALING, "factor": self.ROPE_SCALING_FACTOR}
        if self.ROPE_SCALING == "llama3":
            scaling |= {
                "low_freq_factor": self.ROPE_LOW_FREQ_FACTOR,
                "high_freq_factor": self.ROPE_HIGH_FREQ_FACTOR,
                "original_max_position_embeddings": self.ROPE_ORIGINAL_LEN,
            }
        if self.ROPE_SCALING == "yarn":
            scaling |= {
                "original_max_position_embeddings": self.ROPE_ORIGINAL_LEN,
                "beta_fast": self.ROPE_BETA_FAST,
                "beta_slow": self.ROPE_BETA_SLOW,
            }
            mscale = {"mscale": self.ROPE_MSCALE, "mscale_all_dim": self.ROPE_MSCALE_ALL_DIM}
            scaling |= {name: value for name, value in mscale.items() if value is not None}
        if self.LOCAL_ROPE_THETA is None:
            return {"rope_theta": self.ROPE_THETA, "rope_scaling": scaling}
        full = {"rope_type": "default", **(scaling or {}), "rope_theta": self.ROPE_THETA}
        local = {"rope_type": "default", "rope_theta": self.LOCAL_ROPE_THETA}
        return {"rope_parameters": {"full_attention": full, "sliding_attention": local}}

    def norm(self) -> fdl.Config[RMSNorm]:
        """RMSNorm."""
        return fdl.Config(
            RMSNorm,
            epsilon=self.RMS_NORM_EPSILON,
            zero_centered=self.NORM_ZERO_CENTERED,
            dtype=self.FPROP_DTYPE,
        )


class BaseLLaMA(LoraKnobs, Llama, abstract=True):
    """Fine-tuning of the published models with Pax's numbers, on BoolQ unless TRAIN_SET says otherwise."""

    TRAIN_SET = "boolq"
    EVAL_SETS = ("BoolQ",)
    EVAL_ON_TEST = True
    MAX_SEQ_LEN = 4096
    ICI_MESH_SHAPE = (1, 8, 1)
    USE_REPEATED_LAYER = True
    MAX_STEPS = 1000
    LEARNING_RATE = 1e-6
    LR_COS_WARMUP = 500
    LR_COS_DECAY_START = 501
    LR_COS_DECAY_END = 1000
    ADAM_BETA2 = 0.99
    ADAM_EPSILON = 1e-6
    ADAM_CLIP_THRESHOLD = 1.0
    WEIGHT_DECAY = 1e-3
    CLIP_GRADIENT_NORM_TO_VALUE = 5.0
    CHECKPOINT_EVERY_N_STEPS = 200
    CHECKPOINT_MAX_TO_KEEP = 3
    SUMMARY_INTERVAL_STEPS = 10


class LLaMA7B(BaseLLaMA):
    """LLaMA 2 7B: BoolQ, fine-tuning, LoRA."""

    NUM_LAYERS = 32
    NUM_HEADS = 32
    DIMS_PER_HEAD = 128
    MODEL_DIMS = 4096
    HIDDEN_DIMS = 11008
    PERCORE_BATCH_SIZE = 16


class LLaMA13B(LLaMA7B):
    """LLaMA 2 13B: BoolQ, fine-tuning, LoRA."""

    NUM_LAYERS = 40
    NUM_HEADS = 40
    MODEL_DIMS = 5120
    HIDDEN_DIMS = 13824
    PERCORE_BATCH_SIZE = 8


class LLaMA70B(LLaMA7B):
    """LLaMA 2 70B, 16 GPUs: BoolQ, fine-tuning, LoRA."""

    NUM_LAYERS = 80
    NUM_HEADS = 64
    NUM_KV_HEADS = 8
    MODEL_DIMS = 8192
    HIDDEN_DIMS = 28672
    DCN_MESH_SHAPE = (1, 2, 1)
    PERCORE_BATCH_SIZE = 4


class LLaMA3_1_8B(BaseLLaMA):
    """LLaMA 3.1 8B."""

    NUM_LAYERS = 32
    NUM_HEADS = 32
    NUM_KV_HEADS = 8
    DIMS_PER_HEAD = 128
    MODEL_DIMS = 4096
    HIDDEN_DIMS = 14336
    VOCAB_SIZE = 128256
    ROPE_THETA = 500000.0
    ROPE_SCALING = "llama3"
    PERCORE_BATCH_SIZE = 8


class LLaMA3_1_70B(LLaMA3_1_8B):
    """LLaMA 3.1 70B, 16 GPUs."""

    NUM_LAYERS = 80
    NUM_HEADS = 64
    MODEL_DIMS = 8192
    HIDDEN_DIMS = 28672
    DCN_MESH_SHAPE = (1, 2, 1)
    PERCORE_BATCH_SIZE = 4


class LLaMA3_2_1B(LLaMA3_1_8B):
    """LLaMA 3.2 1B, tied embeddings."""

    NUM_LAYERS = 16
    NUM_HEADS = 32
    DIMS_PER_HEAD = 64
    MODEL_DIMS = 2048
    HIDDEN_DIMS = 8192
    SEPARATE_EMBEDDING = False
    ROPE_SCALING_FACTOR = 32.0


class Mistral7B(LLaMA7B):
    """Mistral 7B v0.1, attention to the last 4,096 tokens."""

    NUM_KV_HEADS = 8
    HIDDEN_DIMS = 14336
    SLIDING_WINDOW = 4096
    PERCORE_BATCH_SIZE = 8


class Qwen2_5_7B(BaseLLaMA):
    """Qwen 2.5 7B, biases of queries, keys and values."""

    NUM_LAYERS = 28
    NUM_HEADS = 28
    NUM_KV_HEADS = 4
    DIMS_PER_HEAD = 128
    MODEL_DIMS = 3584
    HIDDEN_DIMS = 18944
    VOCAB_SIZE = 152064
    ROPE_THETA = 1000000.0
    RMS_NORM_EPSILON = 1e-6
    QKV_BIAS = True
    PERCORE_BATCH_SIZE = 8


class Qwen2_5_0_5B(Qwen2_5_7B):
    """Qwen 2.5 0.5B, tied embeddings."""

    NUM_LAYERS = 24
    NUM_HEADS = 14
    NUM_KV_HEADS = 2
    DIMS_PER_HEAD = 64
    MODEL_DIMS = 896
    HIDDEN_DIMS = 4864
    VOCAB_SIZE = 151936
    SEPARATE_EMBEDDING = False


class Qwen3_8B(BaseLLaMA):
    """Qwen 3 8B, norms of queries and keys."""

    NUM_LAYERS = 36
    NUM_HEADS = 32
    NUM_KV_HEADS = 8
    DIMS_PER_HEAD = 128
    MODEL_DIMS = 4096
    HIDDEN_DIMS = 12288
    VOCAB_SIZE = 151936
    ROPE_THETA = 1000000.0
    RMS_NORM_EPSILON = 1e-6
    QK_NORM = True
    PERCORE_BATCH_SIZE = 8


class Qwen3_0_6B(Qwen3_8B):
    """Qwen 3 0.6B, tied embeddings."""

    NUM_LAYERS = 28
    NUM_HEADS = 16
    MODEL_DIMS = 1024
    HIDDEN_DIMS = 3072
    SEPARATE_EMBEDDING = False


class Gemma2_2B(BaseLLaMA):
    """Gemma 2 2B: local and global layers in turn, bounded scores and logits."""

    NUM_LAYERS = 26
    NUM_HEADS = 8
    NUM_KV_HEADS = 4
    DIMS_PER_HEAD = 256
    MODEL_DIMS = 2304
    HIDDEN_DIMS = 9216
    VOCAB_SIZE = 256000
    ACTIVATION = "gelu"
    RMS_NORM_EPSILON = 1e-6
    SEPARATE_EMBEDDING = False
    NORM_ZERO_CENTERED = True
    POST_NORM = True
    SCALE_EMBEDDING = True
    SLIDING_WINDOW = 4096
    LOCAL_LAYERS_PER_GLOBAL = 1
    ATTEN_LOGIT_CAP = 50.0
    SOFTMAX_CAP_LOGITS = 30.0
    QUERY_PRE_ATTN_SCALAR = 256
    PERCORE_BATCH_SIZE = 4


class Gemma2_9B(Gemma2_2B):
    """Gemma 2 9B."""

    NUM_LAYERS = 42
    NUM_HEADS = 16
    NUM_KV_HEADS = 8
    MODEL_DIMS = 3584
    HIDDEN_DIMS = 14336


class Gemma2_27B(Gemma2_2B):
    """Gemma 2 27B, 16 GPUs."""

    NUM_LAYERS = 46
    NUM_HEADS = 32
    NUM_KV_HEADS = 16
    DIMS_PER_HEAD = 128
    MODEL_DIMS = 4608
    HIDDEN_DIMS = 36864
    QUERY_PRE_ATTN_SCALAR = 144
    DCN_MESH_SHAPE = (1, 2, 1)


class Gemma3_4B(Gemma2_2B):
    """Gemma 3 4B (text): five local layers to a global one, norms of queries and keys."""

    NUM_LAYERS = 34
    MODEL_DIMS = 2560
    HIDDEN_DIMS = 10240
    VOCAB_SIZE = 262208
    SLIDING_WINDOW = 1024
    LOCAL_LAYERS_PER_GLOBAL = 5
    LOCAL_ROPE_THETA = 10000.0
    ROPE_THETA = 1000000.0
    ROPE_SCALING = "linear"
    QK_NORM = True
    ATTEN_LOGIT_CAP = -1.0
    SOFTMAX_CAP_LOGITS = -1.0


class Gemma3_1B(Gemma3_4B):
    """Gemma 3 1B."""

    NUM_LAYERS = 26
    NUM_HEADS = 4
    NUM_KV_HEADS = 1
    MODEL_DIMS = 1152
    HIDDEN_DIMS = 6912
    VOCAB_SIZE = 262144
    SLIDING_WINDOW = 512
    ROPE_SCALING = None


class Gemma3_12B(Gemma3_4B):
    """Gemma 3 12B (text)."""

    NUM_LAYERS = 48
    NUM_HEADS = 16
    NUM_KV_HEADS = 8
    MODEL_DIMS = 3840
    HIDDEN_DIMS = 15360


class Gemma3_27B(Gemma3_4B):
    """Gemma 3 27B (text), 16 GPUs."""

    NUM_LAYERS = 62
    NUM_HEADS = 32
    NUM_KV_HEADS = 16
    DIMS_PER_HEAD = 128
    MODEL_DIMS = 5376
    HIDDEN_DIMS = 21504
    QUERY_PRE_ATTN_SCALAR = 168
    DCN_MESH_SHAPE = (1, 2, 1)


class QuickstartLLaMA(QuickstartRun, LoraKnobs, Llama):
    """A small LLaMA on the text that comes with Python; minutes on a laptop."""

    NUM_LAYERS = 4
    NUM_HEADS = 4
    NUM_KV_HEADS = 2
    MODEL_DIMS = 128
    HIDDEN_DIMS = 352


def _cap(value: float) -> float | None:
    return value if value > 0 else None
