"""The LLaMA family and its neighbours: LLaMA 2 and 3, Mistral, Qwen 2.5 and 3, Gemma 2 and 3.

Sources: Touvron et al. 2023 (LLaMA 2), Jiang et al. 2023 (Mistral 7B), the reports on Llama 3, Qwen 2.5, Qwen 3,
Gemma 2 and Gemma 3, and the `config.json` that is published with each. The numbers of training are those of Pax.
"""

from configs.llama_architecture import Llama
from configs.lora import LoraKnobs
from configs.transformer import QuickstartRun


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
