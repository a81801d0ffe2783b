"""AtMost: no row of any network spends more, whatever it would like."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pliant
from nets import CLASSES, NETS, WIDTH, built, confidence, head, layer
from pliant import PliantError, Site, rules
from pliant.execute import Chain, Exits, Halting, Planned, Residual
from pliant.rules import AtMost


def extremes(model: nn.Module, x: torch.Tensor) -> tuple[int, int]:
    """FLOPs of a row on the cheapest path and on the dearest with every score asked."""
    ends = (rules.Never(), rules.Threshold(float("-inf")))
    low, high = (int(pliant.record(pliant.bind(model, {"*": r}))(x)[1].flops[0]) for r in ends)
    return low, high


@pytest.mark.parametrize("name", NETS)
@settings(max_examples=6)
@given(share=st.floats(0, 1), batch=st.sampled_from([0, 1, 5]), seed=st.integers(0, 99))
def test_no_row_spends_more(name: str, share: float, batch: int, seed: int) -> None:
    model = built(name)
    like = torch.zeros(1, WIDTH)
    low, high = extremes(model, like)
    budget = low + share * (high - low)
    x = torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(seed))
    for rule in (None, rules.Always(), rules.Threshold(float("-inf"))):
        bound = pliant.bind(model, {"*": AtMost(budget, like=like, rule=rule)})
        y, trace = pliant.record(bound)(x)
        assert (trace.flops <= budget).all()
        torch.testing.assert_close(pliant.masked(bound)(x), y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NETS)
def test_a_budget_for_everything_changes_nothing(name: str) -> None:
    model, x = built(name), torch.randn(5, WIDTH)
    bound = pliant.bind(model, {"*": AtMost(extremes(model, x)[1], like=x)})
    y, trace = pliant.record(model)(x)
    again, spent = pliant.record(bound)(x)
    assert torch.equal(again, y)
    assert torch.equal(spent.flops, trace.flops)


def test_exits_go_to_the_deepest_stage_that_is_paid_for() -> None:
    model = Exits([layer() for _ in range(5)], [head() for _ in range(5)], [confidence() for _ in range(4)]).eval()
    stage, x = 2 * WIDTH * WIDTH + 2 * WIDTH * CLASSES, torch.randn(3, WIDTH)
    for depth in range(1, 6):
        for spare in (0, 1, stage - 1):
            bound = pliant.bind(model, {"*": AtMost(depth * stage + spare, like=x, rule=rules.Always())})
            assert (pliant.record(bound)(x)[1].flops == depth * stage).all()


def test_it_keeps_the_rule_and_asks_no_scorer_in_vain() -> None:
    model, x = built("residual"), torch.randn(5, WIDTH)
    low, high = extremes(model, x)
    bound = pliant.bind(model, {"*": AtMost((low + high) / 2, like=x)})
    first, second = (site.rule for site in pliant.sites(bound).values())
    assert isinstance(first.rule, rules.Threshold)
    assert (first.fits, second.fits) == (True, False)
    notes = pliant.record(bound)(x)[1].notes
    assert {note.site for note in notes if note.choice == "score"} == {"0.site"}
    again = pliant.bind(bound, {"*": AtMost(high, like=x)})  # a budget in place of a budget, not around it
    assert torch.equal(again(x), model(x))
    assert torch.equal(copy.deepcopy(bound)(x), bound(x))
    assert torch.equal(pliant.bind(bound, {"1.site": rules.Always()})(x[:0]), model(x[:0]))


def test_sites_without_a_budget_count_at_their_dearest() -> None:
    model, x = built("residual"), torch.randn(5, WIDTH)
    _, high = extremes(model, x)
    bound = pliant.bind(model, {"0.site": AtMost(high - 1, like=x)})
    open_ = pliant.bind(bound, {"1.site": rules.Threshold(float("-inf"))})
    assert not pliant.sites(bound)["0.site"].rule.fits
    assert (pliant.record(open_)(x)[1].flops <= high - 1).all()


def planned() -> nn.Module:
    blocks = [Residual(nn.Identity(), Site(nn.Identity(), rules.Always()))]
    return Planned(Site(nn.Linear(WIDTH, 1), rules.Threshold(0.0), shape=(1,)), Chain(blocks))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: AtMost(float("nan")), "a number"),
        (lambda: AtMost("1e6"), "a number"),
        (lambda: AtMost(1e6)(torch.zeros(2)), "never priced"),
        (lambda: pliant.bind(built("skip"), {"*": AtMost(1e6)}), "like=x"),
        (
            lambda: pliant.bind(built("exits"), {"*": AtMost(1, like=torch.zeros(1, WIDTH))}),
            "at least the cheapest path's 120 ",
        ),
        (lambda: pliant.bind(planned(), {"*": AtMost(1e6, like=torch.zeros(1, WIDTH))}), "follow a plan"),
    ],
)
def test_mistakes_are_told(make: Callable[[], object], says: str) -> None:
    with pytest.raises(PliantError, match=says):
        make()


def test_a_loop_of_own_sites_is_cut_where_the_budget_ends() -> None:
    unit, halts = layer(), [nn.Sequential(nn.Linear(WIDTH, 1), nn.Flatten(0)) for _ in range(4)]
    sites = [Site(pliant.scores.Remainder(), rules.Halting()) for _ in halts]
    loop, x = Halting([unit] * 5, halts, sites).eval(), torch.randn(4, WIDTH)
    step = 2 * WIDTH * WIDTH + 2 * WIDTH
    bound = pliant.bind(loop, {"*": AtMost(3 * step, like=x, rule=rules.Always())})
    _, trace = pliant.record(bound)(x)
    assert (trace.flops == 3 * step).all()
