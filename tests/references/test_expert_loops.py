"""Experts against a loop that anyone can read: one text, one token, one expert at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pliant
from pliant import Decision, PliantError, Site, Trace, rules
from pliant.cost import expected_flops
from pliant.execute import Experts
from pliant.losses import Importance, Load, SwitchBalance, load
from pliant.scores import Noise, NoisyRouter, Router
from pliant.systems.width.sparsely_gated_moe import mixture

WIDTH, EXPERTS = 3, 4


def made(rule: rules.Rule | None = None) -> Experts:
    torch.manual_seed(0)
    experts = [nn.Sequential(nn.Linear(WIDTH, 5), nn.ReLU(), nn.Linear(5, WIDTH)) for _ in range(EXPERTS)]
    site = Site(nn.Linear(WIDTH, EXPERTS), rule or rules.TopKSoftmax(2), shape=(EXPERTS,))
    return Experts(experts, site).eval()


def loop(model: Experts, x: Tensor, gates: Tensor) -> Tensor:
    """A token's answer is the sum of its experts' answers, each times its gate."""
    y = torch.zeros_like(x)
    for row in range(x.shape[0]):
        for token in range(x.shape[1]):
            for e, expert in enumerate(model.experts):
                if gates[row, token, e] != 0:
                    y[row, token] += gates[row, token, e] * expert(x[row, token][None])[0]
    return y


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_both_forms_are_the_loop_and_bill_what_ran(data: Any) -> None:
    model, rows, tokens = made(), data.draw(st.sampled_from([0, 1, 2, 5])), data.draw(st.integers(1, 4))
    size = rows * tokens * EXPERTS
    gates = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 0.0, 0.3, 1.0]), min_size=size, max_size=size)))
    gates = gates.reshape(rows, tokens, EXPERTS)
    x = torch.randn(rows, tokens, WIDTH)
    given_ = pliant.core.site.Outcome(gates, weight=True)
    with torch.no_grad():
        y = model(x, given=given_)
        torch.testing.assert_close(pliant.masked(model)(x, given=given_), y)
        torch.testing.assert_close(y, loop(model, x, gates))
        if rows == 0:  # nobody, and nothing to bill
            return
        with FlopCounterMode(display=False) as counter:
            _, trace = pliant.record(model)(x, given=given_)
    assert int(trace.flops.sum()) == counter.get_total_flops()
    assert trace.flops.tolist() == (2 * 2 * WIDTH * 5 * (gates != 0).sum((1, 2))).tolist()
    assert expected_flops(trace).tolist() == trace.flops.tolist()


def test_one_decision_for_each_row_serves_too() -> None:
    model, x = made(), torch.randn(5, WIDTH)
    with torch.no_grad():
        y, trace = pliant.record(model)(x)
        torch.testing.assert_close(pliant.masked(model)(x), y)
        torch.testing.assert_close(loop(model, x[:, None], trace["site"][0].value[:, None])[:, 0], y)
    assert trace["site"][0].value.count_nonzero(1).tolist() == [2] * 5


def test_gates_are_a_softmax_over_the_kept_alone() -> None:
    scores = torch.randn(6, 3, EXPERTS)
    value = rules.TopKSoftmax(2)(scores).value
    for row in scores.reshape(-1, EXPERTS).tolist():
        best = sorted(row, reverse=True)[:2]
        total = sum(math.exp(s) for s in best)
        wanted = [math.exp(s) / total if s in best else 0.0 for s in row]
        torch.testing.assert_close(
            value.reshape(-1, EXPERTS)[scores.reshape(-1, EXPERTS).tolist().index(row)], torch.tensor(wanted)
        )


def test_with_room_for_one_the_first_token_is_served_and_the_rest_pass_by() -> None:
    model = made(rules.Switch(capacity=EXPERTS / 6, serving=EXPERTS / 6))  # six tokens: room for one
    with torch.no_grad():
        model.site.scorer.weight.zero_()
        model.site.scorer.bias.copy_(torch.tensor([0.0, 5.0, 0.0, 0.0]))
        x = torch.randn(2, 6, WIDTH)
        for form in (model, pliant.masked(model), model.train()):
            y = form(x)
            p = float(model.site.scorer.bias.softmax(0)[1])
            torch.testing.assert_close(y[:, 0], p * model.experts[1](x[:, 0]))
            assert not y[:, 1:].any()


def test_a_text_does_not_feel_its_neighbours() -> None:
    model = made(rules.Switch(capacity=0.5, serving=0.5))
    x = torch.randn(4, 8, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[2:3], model(x[2:3]))


def test_the_smooth_load_is_the_chance_to_stay_and_has_its_gradient() -> None:
    torch.manual_seed(0)
    clean = torch.randn(6, EXPERTS, dtype=torch.float64, requires_grad=True)
    std = torch.rand(6, EXPERTS, dtype=torch.float64) + 0.5
    noise = torch.randn(6, EXPERTS, dtype=torch.float64) * std

    def loads(clean: Tensor) -> Tensor:
        return load(Decision(torch.ones(6, EXPERTS), scores=clean + noise, carry=Noise(clean, std)), 2)

    found = loads(clean).detach()
    scores = (clean + noise).detach()
    draws = 4_000
    again = clean.detach() + std * torch.randn(draws, 6, EXPERTS, dtype=torch.float64)
    for e in range(EXPERTS):
        others = scores.index_select(1, torch.tensor([i for i in range(EXPERTS) if i != e]))
        bound = others.topk(2, -1).values[:, 1]
        share = (again[:, :, e] > bound).double().mean(0).sum()
        assert abs(float(share - found[e])) < 0.1
    assert torch.autograd.gradcheck(loads, (clean,))


def trace_of(decision: Decision) -> Trace:
    return Trace({"a": (decision,)}, (), (), 2)


def test_balance_is_least_where_experts_are_equally_busy() -> None:
    y = torch.zeros(2, 4)
    even, odd = torch.eye(EXPERTS).repeat(2, 1)[None], torch.zeros(1, 8, EXPERTS)
    odd[..., 0] = 1
    for term, first, last in (
        (Importance(), Decision(even), Decision(odd)),
        (SwitchBalance(), Decision(even, scores=even), Decision(odd, scores=odd)),
    ):
        low, high = (float(term(y, trace_of(d), y, 0.0)) for d in (first, last))
        assert low < high
    assert float(Importance()(y, trace_of(Decision(even)), y, 0.0)) == pytest.approx(0)
    assert float(SwitchBalance()(y, trace_of(Decision(even, scores=torch.zeros(1, 8, 4))), y, 0.0)) == pytest.approx(1)


def test_noise_is_there_in_training_alone_and_both_matrices_learn() -> None:
    model = mixture(WIDTH, 5, experts=EXPERTS, k=2)
    x = torch.randn(3, 4, WIDTH)
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    y, trace = pliant.record(model)(x)
    (y.square().mean() + Importance()(y, trace, y, 0.0) + Load(2)(y, trace, y, 0.0)).backward()
    router = model.site.scorer
    assert isinstance(router, NoisyRouter)
    assert router.gate.weight.grad is not None
    assert router.gate.weight.grad.any()
    assert router.noise.weight.grad is not None
    assert router.noise.weight.grad.any()


def test_what_is_refused() -> None:
    y = torch.zeros(2, 4)
    for call, message in (
        (lambda: Experts([nn.Identity()], Site(nn.Identity(), rules.Always(), shape=(2,))), r"shape \(E,\)"),
        (lambda: rules.Switch(capacity=0), "factors above 0"),
        (lambda: rules.Switch()(torch.zeros(2, 3)), "rows, tokens, experts"),
        (lambda: Router(3, 2, jitter=1.0), r"within \[0, 1\)"),
        (lambda: Load(1)(y, trace_of(Decision(torch.ones(2, 3))), y, 0.0), "scores without noise"),
        (lambda: Importance("b")(y, trace_of(Decision(torch.ones(2, 3))), y, 0.0), "the pattern 'b'"),
        (lambda: Importance()(y, trace_of(Decision(torch.ones(2))), y, 0.0), "a gate for each of several experts"),
        (lambda: SwitchBalance()(y, trace_of(Decision(torch.ones(2, 3))), y, 0.0), "without scores"),
    ):
        with pytest.raises(PliantError, match=message):
            call()
