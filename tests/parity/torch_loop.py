"""A training loop in PyTorch: the model is Hugging Face's, AdamW is `torch.optim`'s, the rest is here.

It shares no code with paxlike. LayerNorm gains are parametrised as 1 + g: the decay of g pulls them
towards 1.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable

import torch
from torch.nn.utils import parametrize
from transformers import GPT2LMHeadModel


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Numbers of a run; `decays(name)` says whether the parameter called `name` is decayed."""

    peak: float
    warmup: int
    decay_start: int
    decay_end: int
    min_ratio: float
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    clip_norm: float
    z_loss: float = 0.0
    num_microbatches: int = 1
    decays: Callable[[str], bool] = lambda name: True


@dataclasses.dataclass
class Trace:
    """What each step did, and the weights at the end, by the names of an ordinary GPT-2."""

    losses: list[float]
    grad_norms: list[float]
    rates: list[float]
    weights: dict[str, torch.Tensor]


class _OnePlus(torch.nn.Module):
    def forward(self, distance):
        return 1.0 + distance

    def right_inverse(self, gain):
        return gain - 1.0


def train(model: GPT2LMHeadModel, batches: Iterable[dict], recipe: Recipe) -> Trace:
    """Trains a copy of `model` for one step per batch."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            parametrize.register_parametrization(module, "weight", _OnePlus())
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if recipe.decays(n)], "weight_decay": recipe.weight_decay},
        {"params": [p for n, p in named if not recipe.decays(n)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=recipe.betas, eps=recipe.epsilon)
    trace = Trace([], [], [], {})
    for step, batch in enumerate(batches):
        batch = {name: torch.from_numpy(value) for name, value in batch.items()}
        optimizer.zero_grad()
        scored = batch["weights"].sum()
        total = 0.0
        for part in _microbatches(batch, recipe.num_microbatches):
            loss = _summed_loss(model, part, recipe.z_loss) / scored
            loss.backward()
            total += loss.item()
        gradients = [p.grad for _, p in named]
        norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients))
        for gradient in gradients:
            gradient.mul_(min(1.0, recipe.clip_norm / norm))
        rate = _rate(step, recipe)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        trace.losses.append(total)
        trace.grad_norms.append(norm)
        trace.rates.append(rate)
    for module in model.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    trace.weights = model.state_dict()
    return trace


def _summed_loss(model, batch, z_loss: float) -> torch.Tensor:
    logits = model(batch["tokens"].long(), use_cache=False).logits
    nll = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["targets"].long().flatten(), reduction="none"
    )
    z = torch.logsumexp(logits, dim=-1).flatten() ** 2
    return ((nll + z_loss * z) * batch["weights"].flatten()).sum()


def _microbatches(batch, parts: int):
    """The rows in `parts` consecutive pieces; their sums add up whichever rows are in which piece."""
    pieces = {name: value.chunk(parts) for name, value in batch.items()}
    return [{name: pieces[name][i] for name in pieces} for i in range(parts)]


def _rate(step: int, recipe: Recipe) -> float:
    """Linear from 0 at step 0 to the peak, flat, then half a cosine down to `min_ratio` of it."""
    if step < recipe.warmup:
        return recipe.peak * step / recipe.warmup
    if step < recipe.decay_start:
        return recipe.peak
    progress = min(1.0, (step - recipe.decay_start) / (recipe.decay_end - recipe.decay_start))
    floor = recipe.peak * recipe.min_ratio
    return floor + (recipe.peak - floor) * (1 + math.cos(math.pi * progress)) / 2
