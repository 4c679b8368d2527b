"""What the models of the LLaMA family and its neighbours are made of; their sizes are in `configs.llama`."""

from typing import Annotated, Any, Literal

import fiddle as fdl

from configs.bounds import Above, AtLeast
from configs.knobs import knobs
from configs.transformer import TransformerKnobs
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
# Knobs that only some rules of ROPE_SCALING read.
_ROPE_RULES = {
    "ROPE_SCALING_FACTOR": ("linear", "llama3", "yarn"),
    "ROPE_LOW_FREQ_FACTOR": ("llama3",),
    "ROPE_HIGH_FREQ_FACTOR": ("llama3",),
    "ROPE_ORIGINAL_LEN": ("llama3", "yarn"),
    "ROPE_BETA_FAST": ("yarn",),
    "ROPE_BETA_SLOW": ("yarn",),
    "ROPE_MSCALE": ("yarn",),
    "ROPE_MSCALE_ALL_DIM": ("yarn",),
}


class LlamaKnobs(TransformerKnobs, abstract=True):
    """The LLaMA model."""

    NUM_KV_HEADS: Annotated[int | None, "key/value heads; None: NUM_HEADS", AtLeast(1)] = None
    USE_MQA: Annotated[bool, "one key/value head for all (NUM_KV_HEADS=1)"] = False
    RMS_NORM_EPSILON: Annotated[float, "added to the mean square", AtLeast(0)] = 1e-5
    ROPE_THETA: Annotated[float, "base of the rotary wavelengths", Above(0)] = 10000.0
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
    ROPE_ORIGINAL_LEN: Annotated[
        int, "llama3, yarn: tokens of a row in pretraining", AtLeast(1)
    ] = 8192
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
    SLIDING_WINDOW: Annotated[
        int | None, "keys a query sees in local layers; None: all", AtLeast(1)
    ] = None
    LOCAL_LAYERS_PER_GLOBAL: Annotated[
        int | None,
        "local layers before each global one; None: all are local if there is a window",
        AtLeast(1),
    ] = None
    LOCAL_ROPE_THETA: Annotated[
        float | None,
        "base of the wavelengths in local layers, which are not stretched; None: same",
        Above(0),
    ] = None
    QK_NORM: Annotated[bool, "RMSNorm of each head's queries and keys"] = False
    QKV_BIAS: Annotated[bool, "biases of queries, keys and values"] = False
    QUERY_PRE_ATTN_SCALAR: Annotated[
        int | None, "scores are divided by its square root; None: DIMS_PER_HEAD", AtLeast(1)
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
        self.check_stretch()
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

    def check_stretch(self) -> None:
        """Refuses knobs of a rule that is not the one in force, where they differ from what the config has."""
        rule = self.ROPE_SCALING
        for knob in knobs(type(self)):
            rules = _ROPE_RULES.get(knob.name)
            if rules is None or rule in rules or getattr(self, knob.name) == knob.default:
                continue
            raise ValueError(
                f"{knob.name}={getattr(self, knob.name)} has no effect with ROPE_SCALING={rule}: leave it out, or "
                f"set ROPE_SCALING={' or '.join(rules)}"
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
        scaling: dict[str, Any] = {}
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
            return {"rope_theta": self.ROPE_THETA, "rope_scaling": scaling or None}
        full = {"rope_type": "default", **scaling, "rope_theta": self.ROPE_THETA}
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


def _cap(value: float) -> float | None:
    return value if value > 0 else None
