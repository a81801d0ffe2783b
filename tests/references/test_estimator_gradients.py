"""Gradients of estimators: against enumeration where they are unbiased, against their written formulas where they aren't."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pliant
from pliant import estimators, rules
from pliant.estimators import (
    Clipped,
    Copy,
    EpsilonGreedy,
    EpsilonGreedyOneHot,
    Gumbel,
    GumbelOneHot,
    GumbelSoftmax,
    HardConcrete,
    HardSigmoid,
    ScoreFunction,
    SemHash,
    SoftBinaryConcrete,
    StochasticStraightThrough,
    StraightThrough,
)

LOGITS = (0.5, -0.8, 1.2)


def zero() -> rules.Threshold:
    return rules.Threshold(0.0)


def loss(h: Tensor) -> Tensor:
    """Any loss of three gates, no sum over them."""
    return (h[..., 0] - 0.7 * h[..., 1] + 0.4 * h[..., 2] - 0.45) ** 2 + h[..., 0] * h[..., 2] + 0.5


def exact(floor: float) -> tuple[Tensor, float]:
    """Gradient and value of the expected loss, coin by coin."""
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    total = torch.zeros((), dtype=torch.float64)
    for outcome in itertools.product((0, 1), repeat=3):
        chance = torch.ones((), dtype=torch.float64)
        for k, bit in enumerate(outcome):
            p = torch.sigmoid(logits[k])
            p = floor * p + (1 - floor) * (1 - p)
            chance = chance * (p if bit else 1 - p)
        total = total + chance * loss(torch.tensor(outcome, dtype=torch.float64))
    return torch.autograd.grad(total, logits)[0], total.item()


# Unbiased.


@pytest.mark.parametrize("floor", [1.0, 0.8])
@pytest.mark.parametrize("with_baseline", [False, True], ids=["no baseline", "baseline"])
def test_the_score_function_has_the_exact_gradient(floor: float, with_baseline: bool) -> None:
    torch.manual_seed(0)
    wanted, mean = exact(floor)
    rows = 200_000
    scores = torch.tensor(LOGITS, dtype=torch.float64).repeat(rows, 1).requires_grad_()
    out = ScoreFunction(zero(), floor=floor)(scores)
    assert not out.value.requires_grad
    assert out.log_prob is not None
    each = out.log_prob.sum(-1) * (loss(out.value) - (mean if with_baseline else 0.0))
    (gradient,) = torch.autograd.grad(each.sum(), scores)
    error = gradient.std(0) / rows**0.5
    assert ((gradient.mean(0) - wanted).abs() < 4 * error).all()
    assert (error < 0.05 * wanted.norm()).all()


def test_a_baseline_lowers_the_variance() -> None:
    torch.manual_seed(0)
    _, mean = exact(1.0)
    scores = torch.tensor(LOGITS).repeat(50_000, 1).requires_grad_()
    out = ScoreFunction(zero())(scores)
    assert out.log_prob is not None
    spread = [
        torch.autograd.grad((out.log_prob.sum(-1) * (loss(out.value) - b)).sum(), scores, retain_graph=True)[0].var(0)
        for b in (0.0, mean)
    ]
    assert (spread[1].sum() < 0.7 * spread[0].sum()).all()


def test_the_floor_is_the_written_one_in_value_and_gradient() -> None:
    scores = torch.tensor([-40.0, -2.0, 0.0, 1.0, 40.0], dtype=torch.float64, requires_grad=True)
    out = ScoreFunction(zero(), floor=0.8)(scores)
    p = 0.8 * torch.sigmoid(scores) + 0.2 * (1 - torch.sigmoid(scores))
    torch.testing.assert_close(out.soft, p)
    torch.testing.assert_close(out.log_prob, torch.where(out.value > 0, p, 1 - p).log())
    assert out.log_prob is not None
    (found,) = torch.autograd.grad(out.log_prob.sum(), scores, retain_graph=True)
    (wanted,) = torch.autograd.grad(torch.where(out.value > 0, p, 1 - p).log().sum(), scores)
    torch.testing.assert_close(found, wanted)


def test_the_score_function_of_far_logits_is_finite() -> None:
    scores = torch.tensor([-1e4, -200.0, 200.0, 1e4], requires_grad=True)
    out = ScoreFunction(zero())(scores)
    assert out.log_prob is not None
    out.log_prob.sum().backward()
    assert out.log_prob.isfinite().all()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


# As written.

AT = torch.tensor([-3.0, -1.0001, -0.5, -0.19, 0.0, 0.1, 0.7, 0.99, 2.5], dtype=torch.float64)
WRITTEN: dict[str, tuple[Any, Any]] = {
    "sigmoid": (estimators.Sigmoid(), lambda a: torch.sigmoid(a) * (1 - torch.sigmoid(a))),
    "copy": (Copy(), lambda a: torch.ones_like(a)),
    "clipped": (Clipped(), lambda a: (a.abs() <= 1).double()),
    "slope 1": (HardSigmoid(), lambda a: 0.5 * (a.abs() < 1).double()),
    "slope 5": (HardSigmoid(5.0), lambda a: 2.5 * (a.abs() < 0.2).double()),
}


@pytest.mark.parametrize("estimator", [StraightThrough, StochasticStraightThrough])
@pytest.mark.parametrize("name", WRITTEN)
def test_the_gradient_is_the_surrogates(estimator: type[StraightThrough], name: str) -> None:
    surrogate, written = WRITTEN[name]
    s = (AT + 0.25).requires_grad_()
    incoming = torch.linspace(-2, 2, len(AT), dtype=torch.float64)
    out = estimator(rules.Threshold(0.25), surrogate=surrogate).double()(s)
    assert set(out.value.detach().unique().tolist()) <= {0.0, 1.0}
    (gradient,) = torch.autograd.grad(out.value, s, incoming, retain_graph=True)
    torch.testing.assert_close(gradient, incoming * written(AT), atol=1e-6, rtol=0)
    (through_soft,) = torch.autograd.grad(out.soft, s, incoming)
    torch.testing.assert_close(through_soft, gradient)
    step = 1e-6
    smooth = (AT.abs() - 1).abs() > 1e-3
    finite = (surrogate(AT + step) - surrogate(AT - step)) / (2 * step)
    torch.testing.assert_close(finite[smooth], written(AT)[smooth], atol=1e-6, rtol=0)


def test_semantic_hashing_passes_the_gradient_of_alpha_soft_or_hard() -> None:
    s = torch.linspace(-4, 4, 4000, dtype=torch.float64).reshape(1000, 4).requires_grad_()
    torch.manual_seed(5)
    out = SemHash(zero())(s)
    (gradient,) = torch.autograd.grad(out.value.sum(), s)
    torch.manual_seed(5)
    noisy = s.detach() + torch.randn_like(s)
    p = torch.sigmoid(noisy)
    stretched = 1.2 * p - 0.1
    inside = ((stretched > 0) & (stretched < 1)).double()
    torch.testing.assert_close(gradient, 1.2 * p * (1 - p) * inside, atol=1e-6, rtol=0)
    value, hard, soft = out.value.detach(), (noisy > 0).double(), stretched.clamp(0, 1)
    is_hard, is_soft = (value == hard).all(1), (value == soft).all(1)
    assert (is_hard | is_soft).all()
    told_apart = is_hard != is_soft
    assert abs(is_hard[told_apart].double().mean().item() - 0.5) < 4 * 0.5 / told_apart.sum().item() ** 0.5


def test_hard_concrete_passes_the_gradient_inside_its_clip_and_none_outside() -> None:
    s = torch.linspace(-3, 3, 500, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    out = HardConcrete(zero(), temperature=0.5)(s)
    (gradient,) = torch.autograd.grad(out.value.sum(), s)
    torch.manual_seed(5)
    one, other = torch.empty(2, 500, dtype=torch.float64).exponential_().log()
    p = torch.sigmoid((s.detach() + one - other) / 0.5)
    stretched = 1.2 * p - 0.1
    torch.testing.assert_close(out.value.detach(), stretched.clamp(0, 1))
    inside = ((stretched > 0) & (stretched < 1)).double()
    torch.testing.assert_close(gradient, 1.2 * p * (1 - p) / 0.5 * inside)


@pytest.mark.parametrize("kind", [GumbelSoftmax, GumbelOneHot])
def test_the_choice_among_k_passes_the_gradient_of_the_relaxed_sample(kind: type[GumbelSoftmax]) -> None:
    s = torch.randn(50, 2, 4, dtype=torch.float64, requires_grad=True)
    incoming = torch.randn(50, 2, 4, dtype=torch.float64)
    torch.manual_seed(5)
    out = kind(temperature=0.7)(s)
    (gradient,) = torch.autograd.grad(out.value, s, incoming)
    torch.manual_seed(5)
    noise = -torch.empty(50, 2, 4, dtype=torch.float64).exponential_().log()
    relaxed = ((s + noise) / 0.7).softmax(-1)
    (wanted,) = torch.autograd.grad(relaxed, s, incoming)
    torch.testing.assert_close(gradient, wanted)


# Under checkpointing.

BINARY: dict[str, Any] = {
    "straight-through": lambda: StraightThrough(zero()),
    "stochastic": lambda: StochasticStraightThrough(zero(), surrogate=HardSigmoid(0.5)),
    "gumbel": lambda: Gumbel(zero()),
    "soft": lambda: SoftBinaryConcrete(zero()),
    "hard concrete": lambda: HardConcrete(zero()),
    "semhash": lambda: SemHash(zero()),
    "score function": lambda: ScoreFunction(zero(), floor=0.9),
    "epsilon": lambda: EpsilonGreedy(zero(), epsilon=0.5),
}


class Block(nn.Module):
    """A skipped layer, checkpointed or not; the loss reads value, soft and log-probability."""

    def __init__(self, rule: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        gate = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
        self.skip = pliant.execute.Skip(nn.Linear(4, 4), pliant.Site(gate, rule))
        self.saves = False

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.skip, x, use_reentrant=False) if self.saves else self.skip(x)  # pyright: ignore


@pytest.mark.parametrize("name", BINARY)
def test_gradients_under_checkpointing_are_the_same(name: str) -> None:
    found = []
    for saves in (False, True):
        block = Block(BINARY[name]()).train()
        block.saves = saves
        x = torch.linspace(-1, 1, 40).reshape(10, 4)
        torch.manual_seed(1)
        y = block(x)
        (y**2).sum().backward()
        found.append([torch.zeros(()) if p.grad is None else p.grad for p in block.parameters()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", [GumbelSoftmax, GumbelOneHot, EpsilonGreedyOneHot])
def test_choices_under_checkpointing_are_the_same(kind: Any) -> None:
    rule = kind()
    found = []
    for saves in (False, True):
        s = torch.linspace(-1, 1, 12).reshape(4, 3).requires_grad_()

        def run(s: Tensor) -> Tensor:
            return (rule(s).value * torch.sin(s)).square().sum()

        torch.manual_seed(1)
        total = checkpoint(run, s, use_reentrant=False) if saves else run(s)
        assert isinstance(total, Tensor)
        found.append(torch.autograd.grad(total, s)[0])
    assert torch.equal(*found)
