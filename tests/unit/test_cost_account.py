"""Counted cost against numbers worked out by hand."""

from __future__ import annotations

import copy
import gc
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import pliant
from nets import WIDTH, built, force
from pliant import PliantError, Site, cost, rules, scores
from pliant.cost.count import describe
from pliant.execute import Exits, Residual, Skip

# Two FLOPs a multiply-add. A 3x3 convolution of c to d channels on an 8x8 map, padded:
STEM = 2 * 9 * 3 * 4 * 64
BRANCH = 2 * 9 * 4 * 4 * 64
GATE = 2 * 4 * 1
HEAD = 2 * 4 * 5


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.mean((2, 3)))


def tiny() -> nn.Module:
    block = Residual(nn.Conv2d(4, 4, 3, padding=1), Site(scores.LinearGate(4), rules.Threshold(0.0)))
    first = nn.Conv2d(3, 4, 3, padding=1)
    return Exits([first, block], [Head(), Head()], [Site(scores.MaxProbability(), rules.Threshold(0.5))]).eval()


def test_by_hand() -> None:
    model = tiny()
    values = {"sites.0": [0, 1, 1], "stages.1.site": [0, 0, 1]}
    x = torch.randn(3, 3, 8, 8)
    _, trace = pliant.record(force(model, values, 3))(x)
    leaves, stays = STEM + HEAD, STEM + 2 * HEAD
    assert trace.flops.tolist() == [leaves, stays, stays + BRANCH]
    assert trace.dense_flops.tolist() == [stays + BRANCH] * 3
    # With a gate that is asked, its own cost is on the bill of those who come to it.
    model = pliant.bind(model, {"sites.0": rules.Given(trace)})
    model.stages[1].site.rule.threshold.fill_(float("-inf"))
    _, trace = pliant.record(model)(x)
    assert trace.flops.tolist() == [leaves, stays + GATE + BRANCH, stays + GATE + BRANCH]
    assert trace.dense_flops.tolist() == [stays + GATE + BRANCH] * 3


def test_expected_cost_is_a_product_of_probabilities_and_has_their_gradient() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.tensor(0.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.p.expand(len(x))

    inner = Skip(nn.Linear(4, 4), Site(Half(), rules.Sigmoid()))
    outer = Skip(inner, Site(Half(), rules.Sigmoid()), otherwise=nn.Linear(4, 4, bias=False))
    _, trace = pliant.record(outer)(torch.randn(3, 4))
    expected = cost.expected_flops(trace)
    one = 2 * 4 * 4
    assert expected.tolist() == [0.5 * 0.5 * one + 0.5 * one] * 3
    expected[0].backward()
    # d/ds of v (w 32) + (1 - v) 32 at v = w = 1/2, dv/ds = 1/4.
    assert float(outer.site.scorer.p.grad) == pytest.approx(0.25 * (0.5 * one - one))
    assert float(inner.site.scorer.p.grad) == pytest.approx(0.25 * 0.5 * one)


def test_the_costliest_alternative_may_be_that_of_value_0() -> None:
    costly = nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 4))
    block = Skip(nn.Linear(4, 4), Site(scores.LinearGate(4), rules.Never()), otherwise=costly)
    cheap = pliant.bind(block, {"*": rules.Always()}).eval()
    _, trace = pliant.record(cheap)(torch.randn(2, 4))
    assert trace.flops.tolist() == [2 * 16] * 2
    assert trace.dense_flops.tolist() == [2 * 2 * 4 * 64] * 2


def test_an_empty_batch_costs_nothing() -> None:
    for form in (pliant.gathered, pliant.masked):
        _, trace = pliant.record(form(tiny()))(torch.zeros(0, 3, 8, 8))
        assert trace.flops.shape == trace.dense_flops.shape == (0,)
        assert trace.flops.dtype == torch.int64


def test_prices_are_counted_once_per_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["pliant.cost.count"]  # the package has a function of that name
    calls: list[object] = []
    counted = module.count
    monkeypatch.setattr(module, "count", lambda *a: calls.append(a) or counted(*a))
    model = tiny()
    run = pliant.record(model)
    for rows in (2, 3, 5, 0):
        _ = run(torch.randn(rows, 3, 8, 8))[1].flops
    assert len(calls) == 1
    small = run(torch.randn(2, 3, 6, 6))[1]
    assert len(calls) == 1  # nothing is counted before it's asked for
    _ = small.flops, small.dense_flops, small.flops
    assert len(calls) == 2


def test_counting_leaves_no_mark() -> None:
    model = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Dropout(0.5), built("skip")).train()
    run, x = pliant.record(model), torch.randn(4, WIDTH)
    _, trace = run(x)
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    assert int(trace.flops.sum()) > 0
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_trace_holds_neither_the_batch_nor_a_dead_model_alive() -> None:
    model = built("exits")
    x = torch.randn(4, WIDTH)
    watch = weakref.ref(x)
    with torch.no_grad():
        _, trace = pliant.record(pliant.bind(model, {"*": rules.Never()}))(x)
    del x
    gc.collect()
    assert watch() is None
    assert int(trace.flops.sum()) > 0


def test_a_cost_that_does_not_grow_with_the_rows_is_refused() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + (self.w @ self.w.T).sum()

    model = Skip(Fixed(), Site(scores.LinearGate(4), rules.Threshold(0.0))).eval()
    _, trace = pliant.record(model)(torch.randn(7, 4))
    with pytest.raises(PliantError, match="for 7 rows; expected a cost that grows with the rows"):
        _ = trace.flops


def test_a_plain_model_costs_its_backbone() -> None:
    with FlopCounterMode(display=False) as counter:
        _, trace = pliant.record(pliant.plain(tiny()))(torch.randn(3, 3, 8, 8))
    assert int(trace.flops.sum()) == counter.get_total_flops() == 3 * (STEM + BRANCH + HEAD)


def test_count_itself() -> None:
    table = cost.count(tiny(), describe((torch.zeros(2, 3, 8, 8),), {}))
    assert table.root.own == STEM + HEAD
    assert table.part(("sites.0", 0, "1")).own == HEAD
    assert table.part(("sites.0", 7, "1")).own == HEAD  # a later visit costs what the first did
    assert table.part(("stages.1.site", 0, "score")).own == GATE
    with pytest.raises(PliantError, match="which the dense pass never ran"):
        table.part(("nowhere", 0, "1"))


def test_training_form_is_billed_for_everything() -> None:
    model = force(tiny(), {"sites.0": [0, 1, 1], "stages.1.site": [0, 0, 1]}, 3).train()
    with FlopCounterMode(display=False) as counter:
        _, trace = pliant.record(model)(torch.randn(3, 3, 8, 8))
    assert int(trace.flops.sum()) == counter.get_total_flops()
    assert trace.flops.tolist() == [STEM + 2 * HEAD + BRANCH] * 3
