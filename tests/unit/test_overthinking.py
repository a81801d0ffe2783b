"""Over-thinking rates, confusion and the rest against loops and hand-made cases."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pliant
from pliant import PliantError, rules
from pliant.insight.overthinking import Confusion, auroc, confusion, exit_logits, overthinking


@given(seed=st.integers(0, 999), exits=st.integers(2, 6), samples=st.integers(1, 20))
def test_rates_are_those_of_a_loop(seed: int, exits: int, samples: int) -> None:
    g = torch.Generator().manual_seed(seed)
    predicted = torch.randint(3, (exits, samples), generator=g)
    labels = torch.randint(3, (samples,), generator=g)
    wasteful = destructive = errors = 0
    ever = [0] * exits
    for n in range(samples):
        early = any(predicted[k, n] == labels[n] for k in range(exits - 1))
        final = predicted[-1, n] == labels[n]
        wasteful += bool(early and final)
        destructive += bool(early and not final)
        errors += not final
        for k in range(exits):
            ever[k] += any(predicted[j, n] == labels[n] for j in range(k + 1))
    found = overthinking(predicted, labels)
    assert found.wasteful == wasteful / samples
    assert found.destructive == destructive / samples
    assert found.cumulative == tuple(n / samples for n in ever)
    assert found.accuracy[-1] == 1 - errors / samples or math.isclose(found.accuracy[-1], 1 - errors / samples)
    assert found.explained == destructive / errors if errors else math.isnan(found.explained)
    # Whatever an exit rule does, it can't be right where no exit is.
    assert found.cumulative[-1] == pytest.approx(found.accuracy[-1] + found.destructive)
    assert max(found.accuracy) <= found.cumulative[-1]


def test_a_perfect_network_only_wastes() -> None:
    labels = torch.tensor([0, 1, 2])
    found = overthinking(labels.expand(4, 3), labels)
    assert (found.wasteful, found.destructive, found.cumulative) == (1.0, 0.0, (1.0,) * 4)
    assert math.isnan(found.explained)


@pytest.mark.parametrize(
    ("predicted", "labels"),
    [(torch.zeros(1, 3), torch.zeros(3)), (torch.zeros(2, 0), torch.zeros(0)), (torch.zeros(2, 3), torch.zeros(2))],
)
def test_what_cannot_be_judged_is_refused(predicted: torch.Tensor, labels: torch.Tensor) -> None:
    with pytest.raises(PliantError, match="two exits and one sample"):
        overthinking(predicted.long(), labels.long())


def test_confusion_is_the_sum_of_distances_to_the_last_exit() -> None:
    logits = torch.randn(4, 6, 5)
    got = confusion(logits)
    for n in range(6):
        p = [logits[k, n].softmax(-1) for k in range(4)]
        want = sum(float((q - p[-1]).abs().sum()) for q in p)
        assert float(got[n]) == pytest.approx(want, rel=1e-5)
    assert (got <= 2 * 3).all()
    assert torch.equal(confusion(logits[-1:].expand(4, 6, 5)), torch.zeros(6))


def test_confusion_is_normalised_by_a_reference_set() -> None:
    reference, other = torch.randn(3, 50, 4), torch.randn(3, 7, 4)
    score = Confusion.of(reference)
    assert float(score(reference).mean()) == pytest.approx(0, abs=1e-5)
    assert float(score(reference).std(correction=0)) == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(score(other), (confusion(other) - score.mean) / score.std)
    with pytest.raises(PliantError, match="positive"):
        Confusion.of(torch.zeros(3, 5, 4))
    with pytest.raises(PliantError, match="stack the logits"):
        confusion(torch.zeros(3, 4))


@given(seed=st.integers(0, 999))
def test_auroc_counts_pairs(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(5, (12,), generator=g).float()
    positive = torch.rand(12, generator=g) < 0.5
    positive[:2] = torch.tensor([True, False])
    pairs = [float(a > b) + 0.5 * float(a == b) for a in scores[positive] for b in scores[~positive]]
    assert auroc(scores, positive) == pytest.approx(sum(pairs) / len(pairs))


@pytest.mark.parametrize("scores", [torch.tensor([0.0, float("nan")]), torch.zeros(3)])
def test_auroc_refuses_what_has_no_answer(scores: torch.Tensor) -> None:
    with pytest.raises(PliantError, match="at least one of each"):
        auroc(scores, torch.tensor([True, False]))
    with pytest.raises(PliantError, match="0 positive"):
        auroc(torch.zeros(2), torch.zeros(2))


def test_logits_of_all_exits_come_from_whole_traces_only() -> None:
    model = pliant.create_model("sdn", backbone="resnet14", num_classes=4, at=(0.3, 0.6)).eval()
    x = torch.randn(4, 3, 16, 16)
    everywhere = pliant.bind(model, {"*": rules.Threshold(float("-inf"))})
    with torch.no_grad():
        gathered = exit_logits([pliant.record(everywhere)(x)[1]])
        masked = exit_logits([pliant.record(pliant.masked(model))(part)[1] for part in x.split(2)])
        assert gathered.shape == (3, 4, 4)
        torch.testing.assert_close(gathered, masked, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gathered[-1], pliant.plain(model)(x))
        early = pliant.record(pliant.bind(model, {"*": rules.Given(_trace([1.0, 0.0, 0.0, 1.0]))}))(x)[1]
    for traces in ([], [early]):
        with pytest.raises(PliantError, match="every exit's logits for every row"):
            exit_logits(traces)


def _trace(values: list[float]) -> pliant.Trace:
    visits = {f"sites.{k}": (pliant.Decision(torch.tensor(values)),) for k in range(2)}
    return pliant.Trace(visits, (), (), len(values))
