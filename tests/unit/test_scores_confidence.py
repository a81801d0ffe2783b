"""Confidence scores against naive formulas, where numbers saturate, and gates."""

from __future__ import annotations

import math

import pytest
import torch

from pliant import PliantError
from pliant.core.site import Score
from pliant.scores import Entropy, LinearGate, Margin, MaxProbability, MLPGate, Patience, Pooled


def softmax(z: list[float]) -> list[float]:
    e = [math.exp(v - max(z)) for v in z]
    return [v / sum(e) for v in e]


def test_against_naive_formulas() -> None:
    z = 3 * torch.randn(20, 7, dtype=torch.float64)
    for i, row in enumerate(z.tolist()):
        p = sorted(softmax(row), reverse=True)
        assert float(MaxProbability()(z)[i]) == pytest.approx(1 - p[0], rel=1e-9)
        assert float(Margin()(z)[i]) == pytest.approx(1 - (p[0] - p[1]), rel=1e-9)
        assert float(Entropy()(z)[i]) == pytest.approx(-sum(v * math.log(v) for v in p) / math.log(7), rel=1e-9)


def test_saturated_logits_keep_their_order_without_ties() -> None:
    gaps = torch.linspace(15, 80, 66)
    z = torch.stack([gaps, torch.zeros_like(gaps), torch.zeros_like(gaps)], 1)
    found = MaxProbability()(z)
    assert (found.diff() < 0).all()
    naive = 1 - z.softmax(1).amax(1)
    assert len(naive.unique()) < len(naive)  # what the score is there to avoid


def test_two_classes_entropy_margin_and_max_probability_rank_alike() -> None:
    z = torch.randn(200, 2, dtype=torch.float64)
    order = MaxProbability()(z).argsort()
    assert torch.equal(Entropy()(z).argsort(), order)
    assert torch.equal(Margin()(z).argsort(), order)


def test_temperature_divides_the_logits() -> None:
    z = torch.randn(5, 4)
    for score in (MaxProbability(), Entropy(), Margin()):
        cold = score(z / 2.5)
        score.temperature.fill_(2.5)
        torch.testing.assert_close(score(z), cold)
        assert "temperature" in score.state_dict()


@pytest.mark.parametrize("score", [MaxProbability(), Entropy(), Margin(), Patience(2)])
def test_nan_in_nan_out(score: torch.nn.Module) -> None:
    z = torch.randn(3, 4)
    z[1, 2] = float("nan")
    assert score(z).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("score", [MaxProbability(), Entropy(), Margin()])
def test_no_rows_no_scores(score: torch.nn.Module) -> None:
    assert score(torch.zeros(0, 4)).shape == (0,)


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_logits_need_two_classes(shape: tuple[int, ...]) -> None:
    with pytest.raises(PliantError, match="at least two classes"):
        MaxProbability()(torch.zeros(shape))


def test_gradients_of_scores_are_finite_even_if_saturated() -> None:
    for score in (MaxProbability(), Entropy(), Margin()):
        z = torch.tensor([[200.0, 0.0, -200.0], [0.0, 0.0, 0.0]], requires_grad=True)
        score(z).sum().backward()
        assert z.grad is not None
        assert z.grad.isfinite().all()


def test_patience_needs_a_positive_count() -> None:
    with pytest.raises(PliantError, match="patience 0"):
        Patience(0)


def test_a_nan_row_never_becomes_patient() -> None:
    score, carry = Patience(1), None
    z = torch.tensor([[float("nan"), 0.0]])
    for _ in range(3):
        s, carry = score.step(z, carry)
        assert s.isnan().all()


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3), (5, 4, 3, 2)])
def test_pooled_is_the_mean_behind_the_channels(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    torch.testing.assert_close(Pooled()(x), x.reshape(5, 4, -1).mean(2))


@pytest.mark.parametrize("gate", [LinearGate, MLPGate])
def test_gates_score_each_row(gate: type) -> None:
    made = gate(4).eval()
    x = torch.randn(5, 4, 3, 3)
    s = made(x)
    assert s.shape == (5,)
    torch.testing.assert_close(made(x[2:3])[0], s[2])
    assert (s > 0).all()  # gates start open


@pytest.mark.parametrize("score", [MaxProbability(), Entropy(), Margin()])
def test_a_class_that_is_ruled_out_counts_for_nothing(score: Score) -> None:
    logits = torch.tensor([[1.0, 0.5, -float("inf")], [float("nan"), 0.0, 0.0]])
    found = score(logits)
    assert 0 < float(found[0]) < 1
    assert found[1].isnan()
