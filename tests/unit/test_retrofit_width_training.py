"""Models with experts or channels train as users train: with activation checkpointing, in mixed precision, and it pays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pliant
from hosts import call_of, logits
from pliant import rules
from pliant.retrofit import channels, experts, fit_routers

Attach = Callable[[nn.Module, Any], Any]
MADE: dict[str, tuple[Attach, str]] = {
    "timm vit_tiny_patch16_224": (
        lambda host, call: experts(host, ["blocks.[01]"], experts=4, top=2, example=call), "set_grad_checkpointing",
    ),
    "transformers BERT": (
        lambda host, call: experts(host, ["bert.encoder.layer.*"], experts=4, top=2, example=call),
        "activation_checkpointing_enable",
    ),
    "timm resnet50": (lambda host, call: channels(host, ["layer1.*"], example=call), "set_grad_checkpointing"),
}  # fmt: skip


def made(name: str) -> tuple[Any, dict[str, Tensor]]:
    host, call = call_of(name)
    return MADE[name][0](host, call), call


def gradients(model: nn.Module, call: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a loss on answers and on expected cost."""
    torch.manual_seed(3)
    model.zero_grad(set_to_none=True)
    y, trace = pliant.record(model)(**call)
    loss = F.cross_entropy(logits(y).float(), torch.arange(5)) + pliant.cost.expected_flops(trace).mean() / 1e8
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MADE)
def test_activation_checkpointing_changes_no_gradient(name: str) -> None:
    model, call = made(name)
    whole = gradients(model.train(), call)
    getattr(model, MADE[name][1])()
    again = gradients(model, call)
    assert whole.keys() == again.keys()
    assert any(".scorer." in n for n in whole)
    for n in whole:
        torch.testing.assert_close(again[n], whole[n], rtol=1e-4, atol=1e-6, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize("name", MADE)
def test_mixed_precision_trains_routers_and_host(name: str) -> None:
    model, call = made(name)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model.train(), call)
        with torch.no_grad():
            answer = logits(model.eval()(**call))
            masked = logits(pliant.masked(model)(**call))
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in found.values())
    assert answer.dtype == torch.bfloat16
    torch.testing.assert_close(answer, masked, rtol=0.05, atol=0.05)


class Ring(nn.Module):
    """A host for points in the plane: four layers of which the middle two are to be split."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(2, 32), nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        return self.head(h + self.block(h))


class Stripes(nn.Module):
    """A host for small pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 8, 3, padding=1))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        return self.head((h + self.block(h)).relu().mean((2, 3)))


def points(rows: int) -> tuple[Tensor, Tensor]:
    """Which ring a point lies in."""
    x = torch.randn(rows, 2) * 1.2
    return x, x.norm(dim=1).mul(2).long().clamp(max=3)


def pictures(rows: int) -> tuple[Tensor, Tensor]:
    """Which way stripes run, under noise."""
    y = torch.randint(4, (rows,))
    i, j = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    ways = torch.stack([i, j, i + j, i - j]).mul(1.6).add(torch.rand(rows, 1, 1, 1) * 6).sin()
    return ways[torch.arange(rows), y][:, None] + 0.5 * torch.randn(rows, 1, 8, 8), y


def trained(model: nn.Module, batch: Callable[[int], tuple[Tensor, Tensor]], steps: int) -> nn.Module:
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        x, y = batch(128)
        optimiser.zero_grad()
        F.cross_entropy(model.train()(x), y).backward()
        optimiser.step()
    return model.eval()


@pytest.mark.parametrize(
    ("host", "batch", "attach"),
    [
        (Ring, points, lambda host, x: experts(host, ["block"], experts=16, top=8, example=x)),
        (Stripes, pictures, lambda host, x: channels(host, ["block"], top=0.5, example=x)),
    ],
)
def test_fitted_routers_lose_less_than_chance_does_and_training_wins_it_back(
    host: Any, batch: Any, attach: Any
) -> None:
    torch.manual_seed(0)
    dense = trained(host(), batch, 250)
    x, y = batch(1000)

    def right(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(x).argmax(1) == y).float().mean())

    model = attach(dense, x[:4])
    fit_routers(model, [batch(1000)])
    drawn = pliant.bind(model, {"*": rules.Random(0.5, torch.Generator().manual_seed(0))})
    assert right(model) >= right(drawn) + 0.1
    wanted = right(dense)
    assert right(trained(model, batch, 100)) >= wanted - 0.02
