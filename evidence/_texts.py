"""A small transformer for AG News with an exit after every layer, for the claims about exits of language models."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant import Site, rules, scores
from pliant.data import Dataset, load
from pliant.execute import Exits
from pliant.reproduce import Lab
from pliant.train import Phase

LENGTH, WIDTH, HEADS, LAYERS = 48, 64, 4, 6
TOLD = f"AG News, small part: 5,130 training, 570 held-out and 1,520 test articles, first {LENGTH} words; {LAYERS} layers of {WIDTH}, from scratch"
State = tuple[Tensor, Tensor]
"""Features (rows, words, width), and where there are words."""


class Embed(nn.Module):
    """Words and their places."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, WIDTH, padding_idx=0)
        self.places = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.02)
        nn.init.normal_(self.words.weight, std=0.1)

    def forward(self, x: Tensor) -> State:
        return self.words(x) + self.places, x != 0


class Layer(nn.Module):
    """Pre-norm self-attention and two linear layers."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.dropout = nn.Dropout(dropout)

    def forward(self, state: State) -> State:
        x, there = state
        rows, words = there.shape
        q, k, v = self.qkv(self.norms[0](x)).view(rows, words, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        near = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~there[:, None, None], -1e4).softmax(-1)
        x = x + self.dropout(self.out((near @ v).transpose(1, 2).reshape(rows, words, -1)))
        return x + self.dropout(self.wide(self.norms[1](x))), there


class Head(nn.Module):
    """A linear layer on the mean of the words."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, classes)

    def forward(self, state: State) -> Tensor:
        x, there = state
        weights = F.normalize(there.to(x.dtype), p=1.0, dim=1)
        return self.linear(self.norm((x * weights[..., None]).sum(1)))


def transformer(data: Dataset, *, dropout: float = 0.2) -> Exits:
    """Six layers, each with an exit that entropy decides."""
    layers: list[nn.Module] = [Layer(dropout) for _ in range(LAYERS)]
    stages = [nn.Sequential(Embed(len(data.vocabulary)), layers[0]), *layers[1:]]
    heads = [Head(len(data.classes)) for _ in range(LAYERS)]
    return Exits(stages, heads, [Site(scores.Entropy(), rules.Threshold(0.5)) for _ in heads[1:]])


def news(lab: Lab) -> Dataset:
    """AG News, cut to the first words."""
    data = load("ag_news", lab.root)
    parts = {name: getattr(data, name) for name in ("train", "val", "test")}
    return replace(data, **{name: replace(part, x=part.x[:, :LENGTH]) for name, part in parts.items()})


def adamw(epochs: int) -> Phase:
    """AdamW with half an epoch of warm-up and a cosine schedule."""
    return Phase(
        "train", epochs=epochs, optimizer="adamw", lr=1e-3, weight_decay=0.05, schedule="cosine", warmup=0.5, clip=1.0
    )


def linear(model: Exits) -> list[nn.Linear]:
    """The layers that say the logits."""
    return [head.linear for head in model.heads]  # pyright: ignore[reportReturnType]
