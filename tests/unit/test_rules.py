"""Rules: thresholds, fixed decisions, soft weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from pliant import PliantError, rules


def test_threshold_spends_above_it_only() -> None:
    s = torch.tensor([-1.0, 0.0, 1e-7, 1.0, math.inf, -math.inf, math.nan])
    assert rules.Threshold(0.0)(s).value.tolist() == [0, 0, 1, 1, 1, 0, 1]
    assert rules.Threshold(-math.inf)(s[:5]).value.all()
    assert rules.Threshold(math.inf)(s).value.tolist() == [0, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("bad", [math.nan, "0.5", None, True])
def test_threshold_refuses_what_is_no_number(bad: object) -> None:
    with pytest.raises(PliantError, match="expected a number"):
        rules.Threshold(bad)  # pyright: ignore[reportArgumentType]


def test_threshold_is_a_dial_in_the_state() -> None:
    rule = rules.Threshold(0.5)
    rule.threshold.fill_(0.1)
    other = rules.Threshold(0.0)
    other.load_state_dict(rule.state_dict())
    assert other(torch.tensor([0.2])).value.item() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_have_the_type_of_the_scores(dtype: torch.dtype) -> None:
    s = torch.randn(5, 2).to(dtype)
    for rule in (rules.Threshold(0.0), rules.Always(), rules.Never(), rules.Random(0.5), rules.Sigmoid()):
        value = rule(s).value
        assert (value.dtype, value.shape) == (dtype, s.shape)


def test_fixed_rules_read_no_scores() -> None:
    fixed = (rules.Always(), rules.Never(), rules.Random(0.5))
    assert not any(rule.reads_scores for rule in fixed)
    assert rules.Threshold(0.0).reads_scores
    assert rules.Sigmoid().reads_scores


def test_random_draws_at_its_rate_from_its_own_stream() -> None:
    n, p = 100_000, 0.3
    before = torch.get_rng_state()
    out = rules.Random(p, torch.Generator().manual_seed(0))(torch.zeros(n))
    assert torch.equal(torch.get_rng_state(), before)
    assert abs(float(out.value.mean()) - p) < 3 * math.sqrt(p * (1 - p) / n)
    assert out.soft is not None
    assert out.soft.unique().tolist() == pytest.approx([p])
    elsewhere = torch.zeros(4, device="meta")  # stands in for an accelerator: the draw is made where the generator is
    assert rules.Random(0.5, torch.Generator())(elsewhere).value.device == elsewhere.device
    assert not rules.Random(0.0)(torch.zeros(99)).value.any()
    assert rules.Random(1.0)(torch.zeros(99)).value.all()


def test_a_copy_of_random_goes_on_with_the_stream() -> None:
    rule = rules.Random(0.5, torch.Generator().manual_seed(0))
    both = torch.cat([rule(torch.zeros(8)).value, copy.deepcopy(rule)(torch.zeros(8)).value])
    assert torch.equal(both, rules.Random(0.5, torch.Generator().manual_seed(0))(torch.zeros(16)).value)


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_random_refuses_what_is_no_probability(p: float) -> None:
    with pytest.raises(PliantError, match="expected a probability"):
        rules.Random(p)


def test_sigmoid_is_its_own_soft_value() -> None:
    out = rules.Sigmoid()(torch.tensor([0.0, 2.0]))
    assert out.soft is out.value
    assert out.value.tolist() == pytest.approx([0.5, 1 / (1 + math.exp(-2))])
