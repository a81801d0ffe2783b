"""Planned against a loop that anyone can read: each row is planned alone, and a plain Python ``if`` runs its blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pliant
from pliant import Site, estimators, losses, rules, scores
from pliant.execute import Chain, Exits, Planned, Residual, Skip

WIDTH, CLASSES, BLOCKS, ODDS = 4, 3, 3, 0.8
FORMS: dict[str, Callable[[nn.Module], Any]] = {"masked": pliant.masked, "gathered": pliant.gathered}


# The loop.


def planned_alone(net: Any, row: Tensor, plan: list[bool]) -> Tensor:
    """One row through stem, blocks and head; ``plan`` says of every gated block, in order, whether it runs."""
    row, gate = net.stem(row), 0
    for block in net.chain.blocks:
        if isinstance(block, Residual):
            shortcut = block.shortcut(row)
            row = shortcut + block.branch(row) if plan[gate] else shortcut
            gate += 1
        elif isinstance(block, Skip):
            if plan[gate]:
                row = block.block(row)
            elif block.otherwise is not None:
                row = block.otherwise(row)
            gate += 1
        else:
            row = block(row)
    assert gate == len(plan)
    return net.head(row)


def looked_alone(net: Any, row: Tensor) -> list[bool]:
    """What the policy says of one row: a block runs where its logit is above 0, an action more likely than not."""
    return [logit > 0 for logit in net.site.scorer(row)[0].tolist()]


def left_alone(net: Any, row: Tensor, plan: list[bool]) -> Tensor:
    """One row through a chain with exits; it leaves at the first one whose plan doesn't say to go on."""
    row, chain = net.stem(row), net.chain
    for k, goes_on in enumerate([*plan, False]):
        row = chain.stages[k](row)
        if not goes_on:
            return net.head(chain.heads[k](row))
    raise AssertionError("a chain has a last exit")


def rewarded_alone(net: Any, row: Tensor, label: int, plan: list[bool], gamma: float) -> float:
    """BlockDrop's reward of a plan: 1 - (share of the blocks)^2 for a right answer, -gamma for a wrong one."""
    if planned_alone(net, row, plan).argmax().item() != label:
        return -gamma
    return 1 - (sum(plan) / len(plan)) ** 2


def odds_alone(net: Any, row: Tensor, plan: list[bool], floor: float) -> Tensor:
    """The plan's log-probability: u ~ Bernoulli(a s + (1 - a) (1 - s)), one block after the other."""
    total = torch.zeros(())
    for logit, runs in zip(net.site.scorer(row)[0], plan, strict=True):
        s = logit.sigmoid()
        p = floor * s + (1 - floor) * (1 - s)
        total = total + (p if runs else 1 - p).log()
    return total


# What it is compared with.


def layer() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())


def unread() -> Site:
    """A block's own site, which a plan keeps from being asked: it would say no to everything."""
    return Site(nn.Flatten(0), rules.Never())


def policy(sites: int, rule: Any = None) -> Site:
    made = scores.Policy(layer(), WIDTH, sites, bias=0.0)
    nn.init.normal_(made.linear.weight, std=3.0)
    return Site(made, rules.Threshold(0.0) if rule is None else rule, shape=(sites,))


def network(rule: Any = None) -> Planned:
    torch.manual_seed(0)
    blocks = [
        Residual(layer(), unread(), shortcut=nn.Linear(WIDTH, WIDTH)), nn.ReLU(),
        Skip(layer(), unread()), Skip(layer(), unread(), otherwise=layer()),
    ]  # fmt: skip
    head = nn.Linear(WIDTH, CLASSES)
    return Planned(policy(BLOCKS, rule), Chain(blocks), stem=layer(), head=head).eval()


def batch(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def stacked(rows: list[Tensor]) -> Tensor:
    return torch.cat(rows) if rows else torch.empty(0, CLASSES)


@st.composite
def plans(draw: st.DrawFn, sites: int = BLOCKS) -> Tensor:
    rows = draw(st.sampled_from([0, 1, 2, 5, 7]))
    size = rows * sites
    bits = st.lists(st.sampled_from([0.0, 1.0]), min_size=size, max_size=size)
    return torch.tensor(draw(st.one_of(bits, st.just([0.0] * size), st.just([1.0] * size)))).reshape(rows, sites)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25, deadline=None)
@given(plan=plans())
def test_any_plan(form: str, plan: Tensor) -> None:
    net, x = network(), batch(len(plan))
    want = stacked([planned_alone(net, x[i : i + 1], plan[i].bool().tolist()) for i in range(len(x))])
    torch.testing.assert_close(FORMS[form](net)(x, given=plan), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25, deadline=None)
@given(rows=st.sampled_from([0, 1, 2, 5, 7]), seed=st.integers(0, 99))
def test_the_policys_own_plan(form: str, rows: int, seed: int) -> None:
    net, x = network(), batch(rows, seed)
    alone = [looked_alone(net, x[i : i + 1]) for i in range(rows)]
    want = stacked([planned_alone(net, x[i : i + 1], alone[i]) for i in range(rows)])
    y, trace = pliant.record(FORMS[form](net))(x)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-6)
    assert trace.dense("site").bool().tolist() == alone


@settings(max_examples=25, deadline=None)
@given(rows=st.sampled_from([1, 2, 5]), seed=st.integers(0, 99))
def test_it_costs_what_the_loop_runs(rows: int, seed: int) -> None:
    net, x = network(), batch(rows, seed)
    _, trace = pliant.record(net)(x)
    for i in range(rows):
        with FlopCounterMode(display=False) as counter:
            planned_alone(net, x[i : i + 1], looked_alone(net, x[i : i + 1]))
        assert int(trace.flops[i]) == counter.get_total_flops()


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25, deadline=None)
@given(plan=plans(BLOCKS - 1))
def test_a_plan_of_exits(form: str, plan: Tensor) -> None:
    torch.manual_seed(0)
    heads = [nn.Linear(WIDTH, CLASSES) for _ in range(BLOCKS)]
    chain = Exits([layer() for _ in heads], heads, [unread() for _ in heads[1:]])
    net, x = Planned(policy(BLOCKS - 1), chain, stem=layer()).eval(), batch(len(plan))
    want = stacked([left_alone(net, x[i : i + 1], plan[i].bool().tolist()) for i in range(len(x))])
    torch.testing.assert_close(FORMS[form](net)(x, given=plan), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(4))
def test_the_self_critical_gradient_of_a_drawn_plan(form: str, seed: int) -> None:
    net, x, gamma = network(estimators.ScoreFunction(rules.Threshold(0.0), floor=ODDS)).train(), batch(7, seed), 2.0
    labels = torch.arange(7) % CLASSES
    torch.manual_seed(seed)
    model = FORMS[form](net)
    y, trace = pliant.record(model)(x)
    with torch.no_grad():
        greedy = pliant.record(pliant.bind(model, {"site": rules.Threshold(0.0)}))(x)
    loss = losses.SelfCritical(losses.BlockDropReward(gamma=gamma))(y, trace, labels, 0.0, greedy)
    want = torch.zeros(())
    for i in range(7):
        row, label = x[i : i + 1], int(labels[i])
        drawn = trace["site"][0].value[i].bool().tolist()
        better = rewarded_alone(net, row, label, drawn, gamma)
        better -= rewarded_alone(net, row, label, looked_alone(net, row), gamma)
        want = want - better * odds_alone(net, row, drawn, ODDS) / 7
    parameters = list(net.site.parameters())
    got, due = (torch.autograd.grad(t, parameters) for t in (loss, want))
    for a, b in zip(got, due, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
