"""Losses of rates, resources and ranking against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import pliant
from pliant import Decision, PliantError, Trace, estimators, rules, scores
from pliant.core.trace import Exit
from pliant.cost import expected_flops, expected_shares
from pliant.execute import Skip
from pliant.losses import (
    BlockBounds,
    FlopsBudget,
    GateL1,
    GlobalTargetRate,
    Ranking,
    ResourceAware,
    Scheduled,
    TargetRate,
    above,
    falling,
    hard,
    rising,
)  # fmt: skip

NONE = torch.zeros(1)


def traced(**values: torch.Tensor) -> Trace:
    rows = len(next(iter(values.values())))
    return Trace({name: (Decision(v),) for name, v in values.items()}, (), (), rows)


def gates(inner: int = 4) -> nn.Sequential:
    """Two gated blocks; the second costs ``inner / 4`` times the first."""

    def site():
        return pliant.Site(scores.LinearGate(4, bias=0.0), estimators.StraightThrough(rules.Threshold(0.0)))

    wide = nn.Sequential(nn.Linear(4, inner), nn.Linear(inner, 4))
    narrow = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    return nn.Sequential(Skip(narrow, site()), Skip(wide, site()))


def test_target_rates_per_site_and_of_the_mean():
    a, b = torch.tensor([1.0, 1, 0, 0], requires_grad=True), torch.tensor([1.0, 1, 1, 1], requires_grad=True)
    trace = traced(a=a, b=b)
    got = TargetRate(0.6)(NONE, trace, NONE, 0.0)
    torch.testing.assert_close(got, torch.tensor(((0.5 - 0.6) ** 2 + (1 - 0.6) ** 2) / 2))
    torch.testing.assert_close(GlobalTargetRate(0.6)(NONE, trace, NONE, 0.0), torch.tensor((0.75 - 0.6) ** 2))
    torch.testing.assert_close(GlobalTargetRate(0.6, sites="a")(NONE, trace, NONE, 0.0), torch.tensor(0.01))
    GlobalTargetRate(0.6)(NONE, trace, NONE, 0.0).backward()
    torch.testing.assert_close(a.grad, torch.full((4,), 2 * 0.15 / 8))


def test_one_side_only_and_a_target_that_falls():
    trace = traced(a=torch.tensor([1.0, 0.0]), b=torch.tensor([1.0, 1.0]))
    got = TargetRate(0.6, miss=above)(NONE, trace, NONE, 0.0)
    torch.testing.assert_close(got, torch.tensor(0.4**2 / 2))
    assert GlobalTargetRate(0.8, miss=above)(NONE, trace, NONE, 0.0) == 0
    term = GlobalTargetRate(falling(0.25, over=0.5))
    for progress, wanted in ((0.0, 1.0), (0.25, 0.625), (0.9, 0.25)):
        torch.testing.assert_close(term(NONE, trace, NONE, progress), torch.tensor((0.75 - wanted) ** 2))


def test_sites_without_rows_count_nothing():
    empty, full = torch.zeros(0), torch.tensor([1.0, 0.0])
    visits = {"a": (Decision(empty, rows=empty.long()),), "b": (Decision(full),)}
    trace = Trace(visits, (), (), 2)
    torch.testing.assert_close(TargetRate(0.6)(NONE, trace, NONE, 0.0), torch.tensor(0.01))
    torch.testing.assert_close(GateL1()(NONE, trace, NONE, 0.0), torch.tensor(0.5))
    _, nothing = pliant.record(gates().eval())(torch.randn(0, 4))
    for term in (FlopsBudget(0.5), BlockBounds(0.5), ResourceAware(0.5)):
        assert term(NONE, nothing, NONE, 0.0) == 0
    nobody = Trace({"a": visits["a"]}, (), (), 0)
    for term in (TargetRate(0.6), GlobalTargetRate(0.6), GateL1()):
        assert term(NONE, nobody, NONE, 0.0) == 0


def test_l1_is_normalised_per_site():
    small, large = torch.rand(2, 1, 2, 2), torch.rand(2, 1, 8, 8)
    got = GateL1()(NONE, traced(a=small, b=large), NONE, 0.0)
    torch.testing.assert_close(got, small.mean() + large.mean())
    soft = Decision(torch.tensor([1.0, 0.0]), soft=torch.tensor([0.7, 0.4]))
    trace = Trace({"a": (soft,)}, (), (), 2)
    torch.testing.assert_close(GateL1()(NONE, trace, NONE, 0.0), torch.tensor(0.55))
    torch.testing.assert_close(GateL1(of=hard)(NONE, trace, NONE, 0.0), torch.tensor(0.5))
    warmed = Scheduled(GateL1(), rising(0.2))
    assert warmed(NONE, trace, NONE, 0.0) == 0
    torch.testing.assert_close(warmed(NONE, trace, NONE, 0.1), torch.tensor(0.275))
    torch.testing.assert_close(warmed(NONE, trace, NONE, 0.7), torch.tensor(0.55))


def test_expected_shares_leave_out_scores_and_what_nobody_decides():
    model = gates(40)
    _, trace = pliant.record(model.train())(torch.randn(64, 4))
    shares = expected_shares(trace)
    assert list(shares) == ["0.site", "1.site"]
    for site, share in shares.items():
        torch.testing.assert_close(share.float(), trace[site][0].soft)
    price = {"0.site": 2 * 4 * 4 * 2, "1.site": 2 * 4 * 40 * 2}
    scored = 2 * (2 * 4 * 1)
    wanted = scored + sum(price[site] * share for site, share in shares.items())
    torch.testing.assert_close(expected_flops(trace), wanted)


def test_shares_of_gathered_rows_are_of_those_that_came():
    inner = Skip(nn.Linear(4, 4), pliant.Site(scores.LinearGate(4), rules.Always()))
    outer = Skip(inner, pliant.Site(scores.LinearGate(4), rules.Always()))
    given = torch.tensor([1.0, 0, 1, 0])
    _, trace = pliant.record(pliant.gathered(outer))(torch.randn(4, 4), given=given)
    shares = expected_shares(trace)
    assert shares["site"].tolist() == [1, 0, 1, 0]
    assert shares["block.site"].tolist() == [1, 1]


def test_bounds_relax_by_the_square_of_a_cosine():
    model = gates()
    _, trace = pliant.record(model.train())(torch.randn(32, 4))
    means = [float(s.mean().detach()) for s in expected_shares(trace).values()]
    theta, relax = 0.3, 0.5
    term = BlockBounds(theta, relax=relax)
    for progress in (0.0, 0.2, 0.4, 0.5, 0.9):
        q = math.cos(math.pi / 2 * min(1, progress / relax)) ** 2
        low, high = q * theta, 1 - q * (1 - theta)
        wanted = sum(max(0, s - high) ** 2 + max(0, low - s) ** 2 for s in means) / 2
        assert float(term(NONE, trace, NONE, progress).detach()) == pytest.approx(wanted, abs=1e-6)
    whole = ResourceAware(theta, relax=relax)(NONE, trace, NONE, 0.2)
    torch.testing.assert_close(whole, FlopsBudget(theta)(NONE, trace, NONE, 0.2) + term(NONE, trace, NONE, 0.2))
    whole.backward()
    assert all(block.site.scorer.linear.bias.grad.abs() > 0 for block in model)
    assert FlopsBudget(0.99, miss=above)(NONE, trace, NONE, 0.0) == 0


def test_a_budget_in_flops_closes_the_dear_block_and_a_budget_of_counts_does_not_tell_them_apart():
    model = gates(40)
    y, trace = pliant.record(model.train())(torch.randn(64, 4))
    grads = []
    for term in (FlopsBudget(0.1), GlobalTargetRate(0.1)):
        found = torch.autograd.grad(
            term(y, trace, NONE, 0.0), [b.site.scorer.linear.bias for b in model], retain_graph=True
        )
        grads.append(float(found[1] / found[0]))
    assert grads[0] > 5 * grads[1]


def test_ranking_is_a_hinge_on_the_true_class():
    z = [torch.randn(5, 3, requires_grad=True) for _ in range(3)]
    target = torch.tensor([0, 1, 2, 0, 1])
    trace = Trace({}, tuple(Exit(t) for t in z), (), 5)
    p = [t.softmax(-1)[torch.arange(5), target] for t in z]
    hinge = lambda a, b, m: (a - b + m).clamp_min(0).mean()  # noqa: E731
    torch.testing.assert_close(Ranking()(NONE, trace, target, 0.0), hinge(p[0], p[1], 0.05) + hinge(p[1], p[2], 0.05))
    torch.testing.assert_close(Ranking(0.2, pairs=[(0, 2)])(NONE, trace, target, 0.0), hinge(p[0], p[2], 0.2))
    got = torch.autograd.grad(Ranking()(NONE, trace, target, 0.0), z)
    wanted = torch.autograd.grad(hinge(p[0], p[1], 0.05) + hinge(p[1], p[2], 0.05), z)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_ranking_reads_rows_that_came_to_both_stages():
    z = [torch.randn(4, 3), torch.randn(2, 3)]
    target = torch.tensor([0, 1, 2, 0])
    rows = torch.tensor([1, 3])
    p = [z[0].softmax(-1)[rows, target[rows]], z[1].softmax(-1)[torch.arange(2), target[rows]]]
    trace = Trace({}, (Exit(z[0]), Exit(z[1], rows)), (), 4)
    torch.testing.assert_close(Ranking()(NONE, trace, target, 0.0), (p[0] - p[1] + 0.05).clamp_min(0).mean())
    none = Trace({}, (Exit(z[0]), Exit(z[1][:0], rows[:0])), (), 4)
    assert Ranking()(NONE, none, target, 0.0) == 0


def test_what_cannot_be_is_refused():
    trace = traced(a=torch.ones(2))
    for term in (TargetRate({"b": 0.5}), GlobalTargetRate(0.5, sites="b"), GateL1("b")):
        with pytest.raises(PliantError, match="matches"):
            term(NONE, trace, NONE, 0.0)
    for make in (lambda: TargetRate(1.5), lambda: GlobalTargetRate(-0.1)):
        with pytest.raises(PliantError, match="within"):
            make()
    for make in (lambda: BlockBounds(0.0), lambda: BlockBounds(0.5, relax=0.0), lambda: ResourceAware(2.0)):
        with pytest.raises(PliantError, match="share"):
            make()
    for make in (lambda: rising(0.0), lambda: falling(0.5, over=2.0)):
        with pytest.raises(PliantError, match="over="):
            make()
    alone = Trace({}, (Exit(torch.zeros(2, 2)),), (), 2)
    for term in (Ranking(), Ranking(pairs=[(0, 1)])):
        with pytest.raises(PliantError, match="pairs"):
            term(NONE, alone, torch.zeros(2, dtype=torch.long), 0.0)
