"""Greedy `generate` of a Hugging Face GPT-2 or LLaMA with random weights; needs torch and transformers."""

from __future__ import annotations

import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from scripts.benchmarks.protocol import serve
from scripts.benchmarks.shapes import SHAPES, Shape

ENDS = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}


def _gpt2(shape: Shape) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=shape.vocab,
        n_positions=shape.length,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_inner=shape.hidden,
        **ENDS,
    )
    return GPT2LMHeadModel(config)


def _llama(shape: Shape) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=shape.vocab,
        max_position_embeddings=shape.length,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads // 2,
        intermediate_size=shape.hidden,
        **ENDS,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    options = json.loads(sys.argv[1])
    shape = SHAPES[options["shape"]]
    model = _llama(shape) if options["family"] == "llama" else _gpt2(shape)
    model.eval()
    prompts = torch.randint(2, shape.vocab, (options["rows"], options["prompt"]))
    mask = torch.ones_like(prompts)
    tokens = options["tokens"]

    def step() -> float:
        made = model.generate(
            prompts,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
        )
        if made.shape != (options["rows"], options["prompt"] + tokens):
            raise RuntimeError(f"generate returned {tuple(made.shape)}")
        return 0.0

    serve(step, {"torch": torch.__version__, "transformers": transformers.__version__})


if __name__ == "__main__":
    main()
