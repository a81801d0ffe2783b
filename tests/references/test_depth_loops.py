"""Exits, Residual and Skip against loops that anyone can read: each row alone, and a plain Python ``if``."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pliant
from pliant import Decision, Site, Trace, rules, scores
from pliant.execute import Exits, MostConfident, Residual, Skip

WIDTH, CLASSES, EXITS = 5, 3, 4
FORMS = {"masked": pliant.masked, "gathered": pliant.gathered}


# The loops.


def exits_alone(net: Exits, row: Tensor, values: list[float] | None = None) -> Tensor:
    """One row through a chain with exits; it decides by score and threshold where ``values`` don't say."""
    for k in range(len(net.stages)):
        row = net.stages[k](row)
        logits = net.heads[k](row)
        if k == len(net.stages) - 1:
            return logits
        site = net.sites[k]
        goes_on = site.scorer(logits).item() > site.rule.threshold.item() if values is None else values[k] == 1
        if not goes_on:
            return logits
    raise AssertionError("a chain has a last exit")


def surest_alone(net: Exits, row: Tensor, sure: float) -> Tensor:
    """Shallow-Deep Networks: leave at the first exit with confidence ``sure``; if there is none, the surest answers."""
    seen = []
    for k in range(len(net.stages)):
        row = net.stages[k](row)
        logits = net.heads[k](row)
        confidence = logits.softmax(-1).max().item()
        if confidence >= sure and k < len(net.stages) - 1:
            return logits
        seen.append((confidence, logits))
    best = seen[0]
    for pair in seen:
        if pair[0] > best[0]:
            best = pair
    return best[1]


def patient_alone(net: Exits, row: Tensor, patience: int) -> Tensor:
    """Leave when ``patience`` exits in a row agreed with the one before them."""
    label, agreed, logits = None, 0, row
    for k in range(len(net.stages)):
        row = net.stages[k](row)
        logits = net.heads[k](row)
        new = logits.argmax(-1).item()
        agreed = agreed + 1 if new == label else 0
        label = new
        if agreed >= patience:
            return logits
    return logits


def residual_alone(block: Residual, row: Tensor, value: float) -> Tensor:
    """Shortcut, and the branch if it's wanted."""
    y = block.shortcut(row)
    if value == 1:
        y = y + block.branch(row)
    return y


def skip_alone(skip: Skip, row: Tensor, value: float) -> Tensor:
    """One block or the other."""
    if value == 1:
        return skip.block(row)
    if skip.otherwise is None:
        return row
    return skip.otherwise(row)


# What they are compared with.


def layer() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())


def chain(*sites: Site, answer: MostConfident | None = None) -> Exits:
    torch.manual_seed(0)
    heads = [nn.Linear(WIDTH, CLASSES) for _ in range(len(sites) + 1)]
    for head in heads:
        nn.init.normal_(head.weight)
    return Exits([layer() for _ in heads], heads, sites, answer=answer).eval()


def confident(threshold: float = 0.5) -> Site:
    return Site(scores.MaxProbability(), rules.Threshold(threshold))


def gate() -> Site:
    return Site(scores.LinearGate(WIDTH), rules.Threshold(0.0))


def batch(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def stacked(rows: list[Tensor], width: int) -> Tensor:
    return torch.cat(rows) if rows else torch.empty(0, width)


def replayed(net: nn.Module, values: Tensor) -> nn.Module:
    """The decisions of a trace, (R, sites), given to a model's sites in their order."""
    visits = {path: (Decision(values[:, k]),) for k, path in enumerate(pliant.sites(net))}
    return pliant.bind(net, {"*": rules.Given(Trace(visits, (), (), len(values)))})


@st.composite
def decisions(draw: st.DrawFn, sites: int) -> Tensor:
    rows = draw(st.sampled_from([0, 1, 2, 5, 7]))
    bits = st.lists(st.sampled_from([0.0, 1.0]), min_size=rows * sites, max_size=rows * sites)
    plan = draw(st.one_of(bits, st.just([0.0] * rows * sites), st.just([1.0] * rows * sites)))
    return torch.tensor(plan).reshape(rows, sites)


@pytest.mark.parametrize("form", FORMS)
@given(plan=decisions(EXITS - 1))
def test_exits_with_decisions_given(form: str, plan: Tensor) -> None:
    net, x = chain(*(confident() for _ in range(EXITS - 1))), batch(len(plan))
    want = stacked([exits_alone(net, x[i : i + 1], plan[i].tolist()) for i in range(len(x))], CLASSES)
    run = FORMS[form](net)
    torch.testing.assert_close(run(x, given=plan), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(FORMS[form](replayed(net, plan))(x), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("score", [scores.MaxProbability, scores.Entropy, scores.Margin])
@given(seed=st.integers(0, 999), threshold=st.sampled_from([0.1, 0.3, 0.5, 0.7]))
def test_exits_that_decide_for_themselves(form: str, score: type[nn.Module], seed: int, threshold: float) -> None:
    net, x = chain(*(Site(score(), rules.Threshold(threshold)) for _ in range(EXITS - 1))), batch(7, seed)
    want = stacked([exits_alone(net, x[i : i + 1]) for i in range(len(x))], CLASSES)
    torch.testing.assert_close(FORMS[form](net)(x), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@given(seed=st.integers(0, 999), sure=st.sampled_from([0.5, 0.75, 0.9, 0.999]))
def test_exits_whose_surest_answers(form: str, seed: int, sure: float) -> None:
    sites = [confident(1 - sure) for _ in range(EXITS - 1)]
    net, x = chain(*sites, answer=MostConfident(scores.MaxProbability())), batch(7, seed)
    want = stacked([surest_alone(net, x[i : i + 1], sure) for i in range(len(x))], CLASSES)
    torch.testing.assert_close(FORMS[form](net)(x), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@given(seed=st.integers(0, 999), patience=st.integers(1, 3))
def test_exits_that_are_patient(form: str, seed: int, patience: int) -> None:
    net = chain(*(Site(scores.Patience(patience), rules.Threshold(0.0)) for _ in range(EXITS)))
    x = batch(7, seed)
    want = stacked([patient_alone(net, x[i : i + 1], patience) for i in range(len(x))], CLASSES)
    torch.testing.assert_close(FORMS[form](net)(x), want, rtol=1e-5, atol=1e-6)


@given(plan=decisions(EXITS - 1))
def test_exits_cost_what_the_loop_runs(plan: Tensor) -> None:
    net, x = chain(*(confident() for _ in range(EXITS - 1))), batch(len(plan))
    _, trace = pliant.record(pliant.gathered(replayed(net, plan)))(x)
    for i in range(len(x)):
        with FlopCounterMode(display=False) as counter:
            exits_alone(net, x[i : i + 1], plan[i].tolist())
        assert int(trace.flops[i]) == counter.get_total_flops()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shortcut", [None, nn.Linear(WIDTH, WIDTH)])
@given(plan=decisions(1))
def test_residual(form: str, shortcut: nn.Module | None, plan: Tensor) -> None:
    block, x, values = Residual(layer(), gate(), shortcut=shortcut).eval(), batch(len(plan)), plan[:, 0]
    kept = x.clone()
    want = stacked([residual_alone(block, x[i : i + 1], values[i].item()) for i in range(len(x))], WIDTH)
    torch.testing.assert_close(FORMS[form](block)(x, given=values), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(FORMS[form](replayed(block, plan))(x), want, rtol=1e-5, atol=1e-6)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("otherwise", [None, nn.Linear(WIDTH, WIDTH)])
@given(plan=decisions(1))
def test_skip(form: str, otherwise: nn.Module | None, plan: Tensor) -> None:
    skip, x, values = Skip(layer(), gate(), otherwise=otherwise).eval(), batch(len(plan)), plan[:, 0]
    kept = x.clone()
    want = stacked([skip_alone(skip, x[i : i + 1], values[i].item()) for i in range(len(x))], WIDTH)
    torch.testing.assert_close(FORMS[form](skip)(x, given=values), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(FORMS[form](replayed(skip, plan))(x), want, rtol=1e-5, atol=1e-6)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("form", FORMS)
@given(plan=decisions(3))
def test_blocks_in_a_row_give_the_gradients_of_the_loop(form: str, plan: Tensor) -> None:
    net = nn.Sequential(Residual(layer(), gate()), Skip(layer(), gate()), Skip(layer(), gate(), otherwise=layer()))
    x = batch(len(plan))
    alone = (residual_alone, skip_alone, skip_alone)
    total = torch.zeros(())
    for i in range(len(x)):
        row = x[i : i + 1]
        for part, block, value in zip(alone, net, plan[i].tolist(), strict=True):
            row = part(block, row, value)
        total = total + row.sum() * (i + 1)
    parameters = [p for name, p in net.named_parameters() if "site" not in name]
    y = FORMS[form](replayed(net, plan))(x)
    loss = (y.sum(1) * torch.arange(1, len(x) + 1)).sum()
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-5)
    if total.requires_grad and loss.requires_grad:
        got, want = (torch.autograd.grad(t, parameters, allow_unused=True) for t in (loss, total))
        for a, b, p in zip(got, want, parameters, strict=True):
            zero = torch.zeros_like(p)
            torch.testing.assert_close(zero if a is None else a, zero if b is None else b, rtol=1e-4, atol=1e-5)
    else:
        assert not total.requires_grad or not plan.any()
