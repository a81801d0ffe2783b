"""Policies that plan everything at once, and gates with convolutions."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import pliant
from pliant import PliantError, Rule, Site, estimators, rules, scores
from pliant.execute import Chain, Exits, Planned, Residual, Skip

CHANNELS, BLOCKS = 4, 3
BATCHES = st.sampled_from([0, 1, 2, 3, 5, 7])


def site() -> Site:
    return Site(nn.Identity(), rules.Always())


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS), nn.ReLU())


def policy(sites: int = BLOCKS, rule: Rule | None = None) -> Site:
    features = nn.Sequential(scores.Shrink(4), nn.Conv2d(3, 6, 3), nn.ReLU())
    made = scores.Policy(features, 6, sites, bias=0.0)
    nn.init.normal_(made.linear.weight, std=3.0)
    return Site(made, rules.Threshold(0.0) if rule is None else rule, shape=(sites,))


def planned(rule: Rule | None = None) -> Planned:
    torch.manual_seed(0)
    chain = Chain([Residual(conv(), site()), Skip(conv(), site()), nn.ReLU(), Skip(conv(), site(), otherwise=conv())])
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 3))
    return Planned(policy(rule=rule), chain, stem=nn.Conv2d(3, CHANNELS, 3, padding=1), head=head).eval()


def backbone(net: Planned, x: torch.Tensor) -> torch.Tensor:
    """The untouched network: all blocks, one after the other."""
    x = net.stem(x)
    first, second, relu, third = net.chain.blocks
    x = relu(second.block(x + first.branch(x)))
    return net.head(third.block(x))


@given(data=st.data(), batch=BATCHES)
def test_a_plan_in_groups_is_a_plan_row_by_row(data: st.DataObject, batch: int) -> None:
    net, x = planned(), torch.randn(batch, 3, 8, 8)
    row = st.one_of(
        st.just([0.0] * BLOCKS), st.just([1.0] * BLOCKS),
        st.lists(st.sampled_from([0.0, 1.0]), min_size=BLOCKS, max_size=BLOCKS),
    )  # fmt: skip
    plan = torch.tensor([data.draw(row) for _ in range(batch)]).reshape(batch, BLOCKS)
    found = []
    with torch.no_grad():
        for form in (pliant.masked, pliant.gathered):
            with FlopCounterMode(display=False) as counter:
                y, trace = pliant.record(form(net))(x, given=plan)
            assert int(trace.flops.sum()) == counter.get_total_flops()
            assert torch.equal(trace.dense("site"), plan)
            found.append(y)
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
        alone = [net(r, given=p) for r, p in zip(x.split(1), plan.split(1), strict=True)] if batch else [found[1]]
        torch.testing.assert_close(found[1], torch.cat(alone), rtol=1e-5, atol=1e-6)


@given(batch=BATCHES, seed=st.integers(0, 9))
def test_its_own_plan_is_recorded_and_paid_for(batch: int, seed: int) -> None:
    net, x = planned(), torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        y, trace = pliant.record(net)(x)
    assert int(trace.flops.sum()) == counter.get_total_flops()
    assert torch.equal(trace.dense("site"), (net.site.scorer(x) > 0).float())
    paths = [f"chain.blocks.{k}.site" for k in (0, 1, 3)]
    assert list(trace) == ["site", *paths]
    assert torch.equal(torch.stack([trace.dense(path) for path in paths], 1), trace.dense("site"))
    assert torch.equal(pliant.bind(net, {"*": rules.Given(trace)})(x), y)
    free = pliant.record(net)(x, given=trace.dense("site"))[1]
    looks = 2 * 3 * 9 * 6 * 4 + 2 * 6 * BLOCKS  # a 3x3 convolution at 2 by 2 places, and the linear layer
    assert (trace.flops - free.flops == looks).all()


def test_all_on_is_the_untouched_backbone_bit_for_bit() -> None:
    net, x = planned(), torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        wanted = backbone(net, x)
        assert torch.equal(net(x, given=torch.ones(5, BLOCKS)), wanted)
        assert torch.equal(pliant.bind(net, {"*": rules.Always()})(x), wanted)
        assert torch.equal(pliant.plain(net)(x), wanted)


def test_estimators_learn_a_plan() -> None:
    net = planned(estimators.Gumbel(rules.Threshold(0.0))).train()
    y, trace = pliant.record(net)(torch.randn(6, 3, 8, 8))
    decision = trace["site"][0]
    assert decision.log_prob is not None
    assert decision.log_prob.shape == (6, BLOCKS)
    y.square().sum().backward()
    for p in net.site.parameters():
        assert p.grad is not None
        assert p.grad.abs().sum() > 0


@pytest.mark.parametrize("form", [pliant.masked, pliant.gathered])
def test_the_expected_cost_of_a_plan_moves_the_policy(form: Callable[..., nn.Module]) -> None:
    net = form(planned(estimators.ScoreFunction(rules.Threshold(0.0))).train())
    _, trace = pliant.record(net)(torch.randn(5, 3, 8, 8))
    (plan,) = trace["site"]
    for gate, path in enumerate(f"chain.blocks.{k}.site" for k in (0, 1, 3)):
        (decision,) = trace[path]
        assert torch.equal(decision.value, plan.value[:, gate])
        assert torch.equal(decision.soft, plan.soft[:, gate])  # pyright: ignore[reportArgumentType, reportOptionalSubscript]
        assert decision.log_prob is None  # it counts once, where it was drawn
    pliant.cost.expected_flops(trace).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.site.scorer.linear.parameters())  # pyright: ignore


def test_exits_take_a_plan_too() -> None:
    heads = [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 3)) for _ in range(3)]
    chain = Exits([nn.Conv2d(3, CHANNELS, 3), conv(), conv()], heads, [site(), site()])
    net, x = Planned(policy(2), chain).eval(), torch.randn(6, 3, 8, 8)
    with torch.no_grad():
        y, trace = pliant.record(net)(x)
        plan = trace.dense("site")
        assert torch.equal(y, chain(x, given=plan))
        torch.testing.assert_close(pliant.masked(net)(x), y, rtol=1e-5, atol=1e-6)


def test_copies_and_checks() -> None:
    net, x = planned(), torch.randn(4, 3, 8, 8)
    twin = copy.deepcopy(net)
    for p in twin.parameters():
        nn.init.zeros_(p)
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(x), net(x))
    pliant.check(planned(estimators.StraightThrough(rules.Threshold(0.0))), torch.randn(5, 3, 24, 24))


@given(batch=BATCHES, height=st.integers(1, 9), width=st.integers(1, 9), stride=st.integers(1, 2))
def test_masks_have_a_logit_for_each_place_of_the_block(batch: int, height: int, width: int, stride: int) -> None:
    x = torch.randn(batch, CHANNELS, height, width)
    like = nn.Conv2d(CHANNELS, 2, 3, stride=stride, padding=1)(x)
    for head in (
        scores.MaskHead(CHANNELS, stride=stride), scores.MaskHead(CHANNELS, kernel=3, stride=stride),
        scores.SqueezeMaskHead(CHANNELS, stride=stride),
    ):  # fmt: skip
        found = head(x)
        assert found.shape == (batch, 1, *like.shape[2:])
        torch.testing.assert_close(torch.cat([head(r) for r in x.split(1)]) if batch else found, found)
        assert (rules.Threshold(0.0)(head(torch.zeros_like(x))).value == 1).all()  # starts open
        assert rules.TopK(share=0.5, dims=3)(found).value.shape == found.shape


@given(batch=st.sampled_from([0, 1, 3]), side=st.integers(1, 9))
def test_the_convolutional_gate_scores_rows_and_starts_open(batch: int, side: int) -> None:
    gate, x = scores.ConvGate(CHANNELS, hidden=2).eval(), torch.randn(batch, CHANNELS, side, side)
    assert gate(x).shape == (batch,)
    assert (gate(x) > 0.5).all()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: scores.MaskHead(4, kernel=2), "odd"),
        (lambda: scores.Policy(nn.Identity(), 4, 0), "at least 1"),
        (lambda: scores.Shrink(0), "at least 1"),
        (lambda: planned(rules.Sigmoid())(torch.zeros(2, 3, 8, 8)), "soft rule"),
        (
            lambda: Planned(Site(nn.Flatten(0), rules.Always()), Chain([nn.ReLU()]))(torch.zeros(2, 1)),
            r"\(rows, sites\)",
        ),
        (lambda: Planned(policy(2), planned().chain)(torch.zeros(2, 3, 8, 8)), "each gated block"),
    ],
)
def test_mistakes_are_told(make: Callable[[], object], says: str) -> None:
    with pytest.raises(PliantError, match=says):
        make()
