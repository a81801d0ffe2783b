"""Estimators: forward values, the gradients they stand in for, and the distribution they draw from."""

from __future__ import annotations

import math

import pytest
import torch

from pliant import PliantError, rules
from pliant.estimators import Gumbel, GumbelSample, StraightThrough


def test_straight_through_is_hard_forward_and_a_sigmoid_backward() -> None:
    s = torch.linspace(-4, 4, 9, requires_grad=True)
    out = StraightThrough(rules.Threshold(0.5))(s)
    assert torch.equal(out.value, (s > 0.5).float())
    out.value.sum().backward()
    p = torch.sigmoid(s.detach() - 0.5)
    torch.testing.assert_close(s.grad, p * (1 - p))
    torch.testing.assert_close(out.soft, p)


def test_straight_through_in_evaluation_is_the_rule() -> None:
    s = torch.randn(9, requires_grad=True)
    out = StraightThrough(rules.Threshold(0.0)).eval()(s)
    assert torch.equal(out.value, (s > 0).float())
    assert not out.value.requires_grad


@pytest.mark.parametrize("logit", [-2.0, -0.3, 0.0, 1.0, 3.0])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_gumbel_spends_with_the_probability_of_its_logit(logit: float, threshold: float) -> None:
    n = 100_000
    out = Gumbel(rules.Threshold(threshold))(torch.full((n,), logit))
    p = 1 / (1 + math.exp(threshold - logit))
    sigma = math.sqrt(p * (1 - p) / n)
    assert abs(float(out.value.mean()) - p) < 3 * sigma
    assert out.soft is not None
    torch.testing.assert_close(out.soft, torch.full((n,), p))


def test_gumbel_knows_the_log_probability_of_its_draw() -> None:
    s = torch.randn(50)
    out = Gumbel(rules.Threshold(0.0))(s)
    p = torch.sigmoid(s)
    torch.testing.assert_close(out.log_prob, torch.where(out.value > 0, p, 1 - p).log())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_gumbel_passes_the_gradient_of_the_relaxed_choice(temperature: float) -> None:
    s = torch.randn(200, requires_grad=True)
    torch.manual_seed(3)
    out = Gumbel(rules.Threshold(0.0), temperature=temperature)(s)
    assert set(out.value.detach().unique().tolist()) <= {0.0, 1.0}
    (grad,) = torch.autograd.grad(out.value.sum(), s)
    torch.manual_seed(3)
    draws = torch.empty(2, 200).exponential_().log()
    relaxed = torch.sigmoid((s.detach() + draws[0] - draws[1]) / temperature)
    torch.testing.assert_close(grad, relaxed * (1 - relaxed) / temperature)
    assert torch.equal(out.value.detach(), (s + draws[0] - draws[1] > 0).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gumbel_is_finite_in_half_precision(dtype: torch.dtype) -> None:
    s = torch.linspace(-12, 12, 20_000).to(dtype).requires_grad_()
    out = Gumbel(rules.Threshold(0.0))(s)
    assert out.value.dtype == dtype
    assert set(out.value.detach().float().unique().tolist()) == {0.0, 1.0}
    out.value.sum().backward()
    assert s.grad is not None
    assert s.grad.isfinite().all()
    assert out.log_prob is not None
    assert out.log_prob.isfinite().all()


def test_gumbel_in_evaluation_is_the_rule_and_draws_nothing() -> None:
    gumbel = Gumbel(rules.Threshold(0.0)).eval()
    s = torch.randn(100)
    before = torch.get_rng_state()
    values = [gumbel(s).value for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(v, (s > 0).float()) for v in values)
    assert not torch.equal(*(GumbelSample(rules.Threshold(0.0)).eval()(s).value for _ in range(2)))


def test_nan_spends_through_every_estimator() -> None:
    s = torch.tensor([float("nan"), 1.0])
    for estimator in (StraightThrough, Gumbel, GumbelSample):
        for training in (True, False):
            assert estimator(rules.Threshold(0.0)).train(training)(s).value[0] == 1


def test_estimators_refuse_what_they_cannot_wrap() -> None:
    with pytest.raises(PliantError, match="got a Always rule; expected a Threshold"):
        StraightThrough(rules.Always())
    with pytest.raises(PliantError, match=r"temperature 0\.0"):
        Gumbel(rules.Threshold(0.0), temperature=0.0)
    with pytest.raises(PliantError, match="temperature nan"):
        Gumbel(rules.Threshold(0.0), temperature=math.nan)


def test_state_travels_with_the_model() -> None:
    gumbel = Gumbel(rules.Threshold(0.25), temperature=2.0)
    other = Gumbel(rules.Threshold(0.0))
    other.load_state_dict(gumbel.state_dict())
    assert float(other.temperature) == 2.0
    assert float(other.rule.threshold) == 0.25
