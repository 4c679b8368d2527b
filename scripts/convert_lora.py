"""The part of scripts/convert.py that knows adapters: merged into the base, or in the format of PEFT, and back.

Unlike the rest it holds the parameters of the model in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from paxlike import parallel
from paxlike.checkpoint import layout, named_leaves, streaming
from paxlike.layers.lora import Lora, adapters_of, merge_lora
from paxlike.train.state import abstract_variables
from paxlike.weights import export_params, peft

Report = Callable[[int, int], None]


def adapter_of(model: Any) -> Lora | None:
    """The adapter that the projections of a model have; None where there is none."""
    for block in model.stack.period:
        for part in (block.mixer, block.ffn):
            for adapter in (getattr(part, "adapters", None) or {}).values():
                return adapter
    return None


def export(
    experiment: Any, source: Path, output: Path, *, to: str, dtype: str, step: int | None, **options
) -> str:
    """A trained model as Hugging Face's, adapters merged into its weights, or its adapters as PEFT's."""
    adapter = adapter_of(experiment.model)
    layout.locate(source, step=step)  # ours, and there
    mesh = parallel.Mesh().build(jax.devices()[:1])
    with parallel.activate(mesh):
        abstract = abstract_variables(experiment.model, mesh)
        params = experiment.read_variables(source, abstract, step=step).variables["params"]
        if to == "peft":
            peft.export_peft(params, output, _peft_config(experiment, adapter), **_rope(experiment))
        else:
            merged = merge_lora(params, adapter)
            export_params(merged, output, experiment.weights, dtype=dtype, **options)
    return to


def import_adapters(experiment: Any, source: Path, output: Path, *, config: str, text: str) -> str:
    """PEFT's adapters as a checkpoint that holds them alone."""
    adapter, found = adapter_of(experiment.model), peft.read_config(source)
    if (adapter.rank, adapter.kind) != (found.rank, found.kind) or adapter.scale != _scale(found):
        raise ValueError(
            f"{source} has LORA_RANK={found.rank}, LORA_ALPHA={found.alpha:g}, LORA_KIND={found.kind}; this config has "
            f"LORA_RANK={adapter.rank}, LORA_ALPHA={adapter.alpha}, LORA_KIND={adapter.kind}: set the knobs alike"
        )
    mesh = parallel.Mesh().build(jax.devices()[:1])
    with parallel.activate(mesh):
        abstract = abstract_variables(experiment.model, mesh)["params"]
        start = jax.tree.map(
            lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), adapters_of(abstract)
        )
        if found.kind == "dora":
            start = experiment.read_initial_params(abstract, _zeros(abstract))
        params = peft.import_peft(source, start, **_rope(experiment))
    arrays = {
        name: streaming.streamed(leaf.shape, leaf.dtype, _whole(leaf), num_lead=0)
        for name, leaf in named_leaves(adapters_of(params)).items()
    }
    streaming.write_params(output, arrays, config=config, config_text=text)
    return "paxlike"


def _whole(leaf: Any) -> Callable[[], Any]:
    return lambda: iter([(tuple(slice(0, size) for size in leaf.shape), leaf)])


def _zeros(abstract: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), abstract)


def _scale(found: peft.PeftConfig) -> float:
    return Lora(found.rank, found.alpha, found.kind).scale


def _rope(experiment: Any) -> dict[str, str]:
    interleaved = getattr(experiment.weights, "rope_interleaved", False)
    return {"rope_layout": "interleaved" if interleaved else "half"}


def _peft_config(experiment: Any, adapter: Lora) -> peft.PeftConfig:
    base = experiment.initial_weights
    return peft.PeftConfig(
        rank=adapter.rank,
        alpha=adapter.rank if adapter.alpha is None else adapter.alpha,
        kind=adapter.kind,
        dropout=adapter.dropout,
        base_model=None if base is None else base.path,
    )
