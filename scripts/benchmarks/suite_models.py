"""Configs of the suite that are no config of a family: known shapes on synthetic tokens."""

from configs.data import SyntheticData
from configs.gpt import Synthetic126M
from configs.llama import LLaMA7B


class Synthetic1B(Synthetic126M):
    """GPT-3 XL: 1.3B (Brown et al. 2020, table 2.1)."""

    NUM_LAYERS = 24
    NUM_HEADS = 16
    DIMS_PER_HEAD = 128
    MODEL_DIMS = 2048
    HIDDEN_DIMS = 8192
    USE_REPEATED_LAYER = True
    CHECKPOINT_POLICY = "SAVE_DOT_WITH_NO_BATCH_DIM"


class SyntheticLLaMA7B(SyntheticData, LLaMA7B):
    """LLaMA 2 7B on synthetic tokens."""

    EVAL_SETS = ()
    EVAL_ON_TEST = False
