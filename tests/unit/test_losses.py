"""Losses against their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pliant
from pliant.losses import CrossEntropy, FlopsBudget, MultiExit, TargetRate, Total, falling, ramped


def recorded(weights=None):
    torch.manual_seed(0)
    model = pliant.create_model("msdnet", num_classes=4, exits=3, base=1, step=1, channels=4).train()
    x, target = torch.randn(6, 3, 16, 16), torch.randint(4, (6,))
    y, trace = pliant.record(model)(x)
    return model, y, trace, target


def test_multi_exit_is_the_weighted_sum():
    _, y, trace, target = recorded()
    each = [F.cross_entropy(e.logits, target) for e in trace.exits]
    torch.testing.assert_close(MultiExit()(y, trace, target, 0.0), sum(each))
    torch.testing.assert_close(MultiExit([1.0, 0.5, 0.0])(y, trace, target, 0.0), each[0] + 0.5 * each[1])
    torch.testing.assert_close(
        MultiExit(ramped([0.2, 0.6]))(y, trace, target, 0.5), 0.11 * each[0] + 0.31 * each[1] + each[2]
    )
    with pytest.raises(pliant.PliantError, match="2 weights for 3"):
        MultiExit([1.0, 1.0])(y, trace, target, 0.0)


def test_last_exit_only_gives_the_backbone_the_gradients_of_single_exit_training():
    model, y, trace, target = recorded()
    MultiExit([0.0, 0.0, 1.0])(y, trace, target, 0.0).backward()
    found = [p.grad.clone() for p in model.stages.parameters()]
    model.zero_grad()
    torch.manual_seed(0)
    twin = pliant.create_model("msdnet", num_classes=4, exits=3, base=1, step=1, channels=4).train()
    x = torch.randn(6, 3, 16, 16)
    F.cross_entropy(pliant.plain(twin)(x), target).backward()
    for a, b in zip(found, twin.stages.parameters(), strict=True):
        assert torch.equal(a, b.grad)


def gated(rule):
    torch.manual_seed(0)
    site = pliant.Site(pliant.scores.LinearGate(4), rule)
    model = nn.Sequential(pliant.execute.Skip(nn.Linear(4, 4), site), nn.Linear(4, 2))
    return model, site


def test_target_rate_is_of_the_hard_values_and_moves_the_gate():
    model, site = gated(pliant.estimators.Gumbel(pliant.rules.Threshold()))
    y, trace = pliant.record(model.train())(torch.randn(32, 4))
    loss = TargetRate({"0.site": 0.3})(y, trace, torch.zeros(32), 0.0)
    torch.testing.assert_close(loss, (0.3 - trace["0.site"][0].value.mean()) ** 2)
    loss.backward()
    assert site.scorer.linear.bias.grad.abs() > 0
    with pytest.raises(pliant.PliantError, match="matches"):
        TargetRate({"nowhere": 0.3})(y, trace, torch.zeros(32), 0.0)
    with pytest.raises(pliant.PliantError, match="within"):
        TargetRate(1.5)


def test_flops_budget_is_zero_at_the_budget_and_differentiable():
    model, site = gated(pliant.estimators.StraightThrough(pliant.rules.Threshold()))
    y, trace = pliant.record(model.train())(torch.randn(8, 4))
    share = (pliant.cost.expected_flops(trace).mean() / trace.dense_flops[0]).item()
    assert FlopsBudget(share)(y, trace, torch.zeros(8), 0.0).item() == pytest.approx(0, abs=1e-12)
    FlopsBudget(0.3)(y, trace, torch.zeros(8), 0.0).backward()
    assert site.scorer.linear.bias.grad.abs() > 0
    with pytest.raises(pliant.PliantError, match="share"):
        FlopsBudget(0.0)


def test_a_budget_may_be_lowered_while_training():
    _, _, trace, _ = recorded()
    lowered = FlopsBudget(falling(0.4, over=0.5))
    for progress, share in ((0.25, 0.7), (0.5, 0.4), (1.0, 0.4)):
        got = lowered(torch.zeros(1), trace, torch.zeros(1), progress)
        torch.testing.assert_close(got, FlopsBudget(share)(torch.zeros(1), trace, torch.zeros(1), progress))


def test_a_budget_of_counted_gates_is_that_of_what_runs_and_pulls_at_the_weights():
    """A small soft gate costs little in expectation and all of its block in truth; the masked form runs everything."""
    model, site = gated(pliant.estimators.Counted(pliant.rules.ReluTanh()))
    with torch.no_grad():
        site.scorer.linear.bias.zero_()
    x = torch.randn(64, 4)
    y, trace = pliant.record(model.train())(x)
    open_ = trace[next(iter(trace))][0].value > 0
    assert 0 < open_.sum() < 64
    runs = pliant.record(pliant.gathered(model))(x)[1].flops
    expected = pliant.cost.expected_flops(trace)
    torch.testing.assert_close(expected.detach(), runs.double())
    assert bool((trace.flops == trace.dense_flops).all())
    share = (runs.double() / trace.dense_flops).mean().item()
    assert FlopsBudget(share)(y, trace, torch.zeros(64), 0.0).item() == pytest.approx(0, abs=1e-9)
    FlopsBudget(0.1)(y, trace, torch.zeros(64), 0.0).backward()
    assert site.scorer.linear.bias.grad.abs() > 0


def test_total_names_every_term_once():
    _, y, trace, target = recorded()
    terms = Total({"exits": (1.0, MultiExit()), "last": (0.5, CrossEntropy())})(y, trace, target, 0.0)
    assert list(terms) == ["exits", "last"]
    torch.testing.assert_close(terms["last"], 0.5 * F.cross_entropy(y, target))
    with pytest.raises(pliant.PliantError, match="no loss terms"):
        Total({})
