"""The same GPT, batch and optimizer in PyTorch; a worker process of its own, since it may live in another environment.

Needs torch and numpy. Attention is `scaled_dot_product_attention`, the optimizer torch's fused AdamW.
"""

from __future__ import annotations

import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

import torch
from torch import nn
from torch.nn import functional as F

from scripts.benchmarks import protocol, shapes


class Block(nn.Module):
    def __init__(self, shape: shapes.Shape):
        super().__init__()
        d, self.heads = shape.width, shape.heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.ffn1, self.ffn2 = nn.Linear(d, shape.hidden), nn.Linear(shape.hidden, d)

    def forward(self, x):
        b, s, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, s, d))
        return x + self.ffn2(F.gelu(self.ffn1(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, shape: shapes.Shape):
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab, shape.width)
        self.position = nn.Parameter(torch.empty(shape.length, shape.width))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)

    def forward(self, tokens, targets):
        x = self.embedding(tokens) + self.position
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.embedding.weight).flatten(0, 1)
        return F.cross_entropy(logits.float(), targets.flatten())


def load(model: GPT, params) -> None:
    """Copies paxlike's parameters into the model."""
    tensor = lambda array: torch.from_numpy(array.copy())
    norm = lambda p: {"weight": 1 + tensor(p["scale"]), "bias": tensor(p["bias"])}
    stacked = params["stack"]["period_0"]
    model.embedding.weight.data = tensor(params["embedding"]["table"])
    model.position.data = tensor(params["position"]["table"])
    model.norm.load_state_dict(norm(params["norm"]))
    d = model.position.shape[1]
    for i, block in enumerate(model.blocks):
        at = lambda p, i=i: {name: array[i] for name, array in p.items()}
        block.norm1.load_state_dict(norm(at(stacked["mixer_norm"])))
        block.norm2.load_state_dict(norm(at(stacked["ffn_norm"])))
        layers = ("mixer", "qkv"), ("mixer", "out"), ("ffn", "ffn1"), ("ffn", "ffn2")
        for room, name in layers:
            p, linear = at(stacked[room][name]), getattr(block, name)
            rows = d if name != "ffn2" else p["kernel"].shape[0]
            linear.weight.data = tensor(p["kernel"]).reshape(rows, -1).t().contiguous()
            linear.bias.data = tensor(p["bias"]).reshape(-1)


def main() -> None:
    options = json.loads(sys.argv[1])
    shape = shapes.SHAPES[options["shape"]]
    torch.set_num_threads(options.get("threads") or len(os.sched_getaffinity(0)))
    model = GPT(shape)
    load(model, shapes.initial_parameters(shape))
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=shapes.LEARNING_RATE,
        betas=(shapes.B1, shapes.B2),
        eps=shapes.EPSILON,
        weight_decay=shapes.WEIGHT_DECAY,
        fused=True,
    )
    call = torch.compile(model) if options["kind"] == "torch.compile" else model
    data = [
        {name: torch.from_numpy(array).long() for name, array in batch.items() if name != "weights"}
        for batch in shapes.batches(shape)
    ]
    narrow = options.get("dtype") == "bfloat16"
    count = 0

    def step() -> float:
        nonlocal count
        batch = data[count % len(data)]
        count += 1
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            loss = call(batch["tokens"], batch["targets"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), shapes.CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    protocol.serve(step, {"torch": torch.__version__, "threads": torch.get_num_threads()})


if __name__ == "__main__":
    main()
