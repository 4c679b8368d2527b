"""Weights of other programs, in and out: one table per family, read and written tensor by tensor."""

from paxlike.weights.exporting import export_params
from paxlike.weights.foreign import is_foreign
from paxlike.weights.hugging_face import check_config
from paxlike.weights.importing import Source, import_params, open_folder, open_source
from paxlike.weights.maps import (
    DeepSeekWeights,
    GemmaWeights,
    GPT2Weights,
    LlamaWeights,
    MixtralWeights,
    QwenMoeWeights,
    UpcycledWeights,
)

__all__ = [
    "DeepSeekWeights",
    "GPT2Weights",
    "GemmaWeights",
    "LlamaWeights",
    "MixtralWeights",
    "QwenMoeWeights",
    "Source",
    "UpcycledWeights",
    "check_config",
    "export_params",
    "import_params",
    "is_foreign",
    "open_folder",
    "open_source",
]
