"""Halting per position against the paper's rule as anyone would write it: one row, one unit, one position at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pliant
from pliant import PliantError, Site, losses, rules, scores
from pliant.execute import Branch, HaltingMap, HaltingPixels

C, UNITS, EPS = 3, 4, 0.01
FORMS = (pliant.masked, pliant.gathered)


def branch() -> Branch:
    norm = nn.BatchNorm2d(C)
    nn.init.normal_(norm.running_mean)
    return Branch(
        norm, nn.LeakyReLU(0.1), nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, C, 1)
    )


def built(units: int = UNITS) -> HaltingPixels:
    torch.manual_seed(0)
    made: list[HaltingMap] = []
    for _ in range(units - 1):
        halt = HaltingMap(C, scores.HaltingHead(C, bias=0.0))
        nn.init.normal_(halt.local[-1].weight, std=1.0)
        made.append(halt)
    sites = [Site(scores.Remainder(), rules.Halting(EPS)) for _ in made]
    return HaltingPixels(nn.Conv2d(C, C, 1), [branch() for _ in made], made, sites).eval()


def alone(stage: HaltingPixels, x: Tensor, plan: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Answer (1, C, H, W), units N and ponder cost N + R (H, W) of one row (1, C, H, W)."""
    s = stage.first(x)
    height, width = s.shape[2:]
    states, h = [], []
    on = torch.ones(height, width, dtype=torch.bool)
    count = torch.ones(height, width, dtype=torch.int64)
    total = torch.zeros(height, width)
    for n in range(len(stage.branches)):
        states.append(s)
        h.append(torch.sigmoid(stage.halts[n](s))[0, 0])
        total = total + h[-1]
        grown = s + stage.branches[n](s)
        new = s.clone()
        for i in range(height):
            for j in range(width):
                go = (total[i, j] < 1 - EPS) if plan is None else plan[n, i, j] > 0
                on[i, j] = on[i, j] and bool(go)
                if on[i, j]:
                    new[:, :, i, j] = grown[:, :, i, j]
                    count[i, j] += 1
        s = new
    states.append(s)
    answer, rho = torch.zeros_like(s), torch.zeros(height, width)
    for i in range(height):
        for j in range(width):
            left = torch.ones(())
            for n in range(int(count[i, j]) - 1):
                p = torch.minimum(h[n][i, j], left)
                answer[:, :, i, j] += p * states[n][:, :, i, j]
                left = left - p
            answer[:, :, i, j] += left * states[int(count[i, j]) - 1][:, :, i, j]
            rho[i, j] = count[i, j] + left
    return answer, count, rho


@st.composite
def inputs(draw: st.DrawFn) -> Tensor:
    size = draw(st.sampled_from([0, 1, 2, 3])), C, draw(st.integers(1, 4)), draw(st.integers(1, 5))
    return 2 * torch.randn(size, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))


def same(stage: HaltingPixels, x: Tensor, plan: Tensor | None) -> None:
    rows = [alone(stage, row, None if plan is None else plan[r]) for r, row in enumerate(x.split(1))] if len(x) else []
    for form in FORMS:
        with FlopCounterMode(display=False) as counter:
            y, trace = pliant.record(form(stage))(x, given=plan)
        assert int(trace.flops.sum()) == counter.get_total_flops()
        if rows:
            torch.testing.assert_close(y, torch.cat([r[0] for r in rows]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stage(x, given=plan), y, rtol=0, atol=0)
    torch.testing.assert_close(pliant.cost.expected_flops(trace), trace.flops.double())
    if rows and plan is None:
        torch.testing.assert_close(losses.steps(trace), torch.stack([r[1].float().mean() for r in rows]))
        torch.testing.assert_close(losses.ponder(trace), torch.stack([r[2].mean() for r in rows]), rtol=1e-4, atol=1e-4)


@given(x=inputs())
@torch.no_grad()
def test_both_forms_are_the_loop_over_positions(x: Tensor) -> None:
    same(built(), x, None)


@given(x=inputs(), p=st.sampled_from([0.0, 0.3, 0.7, 1.0]), seed=st.integers(0, 99))
@torch.no_grad()
def test_any_plan_runs_as_it_says(x: Tensor, p: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    plan = (torch.rand(len(x), UNITS - 1, *x.shape[2:], generator=generator) < p).float()
    same(built(), x, plan)


@given(x=inputs())
def test_gradients_are_those_of_the_loop_and_weights_sum_to_one(x: Tensor) -> None:
    stage = built()
    if not len(x):
        return
    found = []
    for form in FORMS:
        y, trace = pliant.record(form(stage))(x)
        loss = (y * torch.linspace(0.5, 1.5, y.numel()).reshape(y.shape)).sum() + losses.ponder(trace).sum()
        found.append(torch.autograd.grad(loss, list(stage.parameters()), allow_unused=True))
    rows = [alone(stage, row) for row in x.split(1)]
    loss = (torch.cat([r[0] for r in rows]) * torch.linspace(0.5, 1.5, y.numel()).reshape(y.shape)).sum()
    loss = loss + torch.stack([r[2].mean() for r in rows]).sum()
    found.append(torch.autograd.grad(loss, list(stage.parameters()), allow_unused=True))
    for p, *each in zip(stage.parameters(), *found, strict=True):
        a, b, c = (torch.zeros_like(p) if g is None else g for g in each)
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(b, c, rtol=1e-3, atol=1e-3)


def test_bounds_of_the_ponder_cost_and_always_is_plain() -> None:
    stage, x = built(), 2 * torch.randn(3, C, 5, 5)
    _, trace = pliant.record(stage)(x)
    n, rho = losses.steps(trace), losses.ponder(trace)
    assert (n <= rho).all()
    assert (rho <= n + 1).all()
    always, trace = pliant.record(pliant.bind(stage, {"*": rules.Always()}))(x)
    torch.testing.assert_close(always, pliant.plain(stage)(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(trace.flops, trace.dense_flops)
    torch.testing.assert_close(pliant.bind(stage, {"*": rules.Never()})(x), stage.first(x))


def test_training_statistics_are_alike_in_both_forms() -> None:
    x, ran = 2 * torch.randn(3, C, 4, 4), []
    for form in FORMS:
        stage = built().train()
        ran.append([form(stage)(x), *stage.buffers()])
    for a, b in zip(*ran, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_lists_that_do_not_fit_are_refused() -> None:
    site = Site(scores.Remainder(), rules.Halting())
    with pytest.raises(PliantError, match="1 branches"):
        HaltingPixels(nn.Identity(), [branch()], [], [site])
    strided = Branch(nn.Conv2d(C, C, 1, stride=2))
    with pytest.raises(PliantError, match=r"strides \[2\]"):
        HaltingPixels(nn.Identity(), [strided], [HaltingMap(C, scores.HaltingHead(C))], [site])
