"""Laws of scores, rules and row bookkeeping, over many inputs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pliant
from nets import CLASSES, WIDTH, built
from pliant import Decision, Trace, rules, scores
from pliant.execute import rows

LOGITS = st.integers(0, 9999).flatmap(
    lambda seed: st.tuples(st.just(seed), st.integers(0, 6), st.integers(2, 12), st.floats(0.01, 60))
)


def logits(case: tuple[int, int, int, float]) -> torch.Tensor:
    seed, batch, classes, scale = case
    return scale * torch.randn(batch, classes, generator=torch.Generator().manual_seed(seed))


@given(case=LOGITS)
def test_confidences_stay_in_their_range(case: tuple[int, int, int, float]) -> None:
    z = logits(case)
    for score, top in ((scores.MaxProbability(), 1 - 1 / z.shape[1]), (scores.Entropy(), 1.0), (scores.Margin(), 1.0)):
        found = score(z)
        assert found.shape == (len(z),)
        assert (found >= -1e-6).all()
        assert (found <= top + 1e-6).all()


@given(case=LOGITS, shift=st.floats(-50, 50))
def test_confidences_ignore_a_common_shift_and_the_order_of_classes(
    case: tuple[int, int, int, float], shift: float
) -> None:
    z = logits(case)
    for score in (scores.MaxProbability(), scores.Entropy(), scores.Margin()):
        torch.testing.assert_close(score(z + shift), score(z), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(score(z.flip(1)), score(z), rtol=1e-4, atol=1e-6)


@given(case=LOGITS, patience=st.integers(1, 4), exits=st.integers(1, 8))
def test_patience_counts_as_a_loop_does(case: tuple[int, int, int, float], patience: int, exits: int) -> None:
    seed, batch, classes, _ = case
    z = torch.randn(exits, batch, classes, generator=torch.Generator().manual_seed(seed))
    score, carry = scores.Patience(patience), None
    count, last = [0] * batch, [-1] * batch
    for k in range(exits):
        found, carry = score.step(z[k], carry)
        for i in range(batch):
            label = int(z[k, i].argmax())
            count[i] = count[i] + 1 if label == last[i] else 0
            last[i] = label
            assert math.isclose(float(found[i]), 1 - min(count[i], patience) / patience, abs_tol=1e-6)


@given(
    values=st.lists(st.floats(-5, 5, width=32), min_size=0, max_size=20),
    thresholds=st.tuples(st.floats(-6, 6), st.floats(-6, 6)),
)
def test_a_higher_threshold_spends_on_fewer_rows(values: list[float], thresholds: tuple[float, float]) -> None:
    s = torch.tensor(values)
    low, high = (rules.Threshold(t)(s).value for t in sorted(thresholds))
    assert (high <= low).all()


@given(thresholds=st.tuples(st.floats(0, 0.8), st.floats(0, 0.8)), seed=st.integers(0, 99))
def test_raising_a_threshold_never_raises_the_cost(thresholds: tuple[float, float], seed: int) -> None:
    """At exits it holds for all rows and sites at once: who left early can't be charged for what comes later."""
    x = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(seed))
    model = built("exits")
    costs = [pliant.record(pliant.bind(model, {"*": rules.Threshold(t)}))(x)[1].flops for t in sorted(thresholds)]
    assert (costs[1] <= costs[0]).all()


@given(
    batch=st.integers(0, 8), seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.int64, torch.bool])
)
def test_select_and_scatter_are_inverse(batch: int, seed: int, dtype: torch.dtype) -> None:
    source = torch.Generator().manual_seed(seed)
    state = [torch.randint(0, 2, (batch, 3), generator=source).to(dtype), (torch.arange(batch), None)]
    index = torch.randperm(batch, generator=source)[: batch // 2]
    kept = [t.clone() for t in (state[0], state[1][0])]
    back = rows.scatter(state, index, rows.select(state, index))
    assert torch.equal(back[0], state[0])
    assert torch.equal(back[1][0], state[1][0])
    assert back[1][1] is None
    into = rows.scatter(torch.zeros_like(state[0]), index, rows.select(state[0], index))
    mask = torch.zeros(batch, dtype=torch.bool).index_fill(0, index, True)
    assert torch.equal(into[mask], state[0][mask])
    assert not into[~mask].any()
    assert torch.equal(kept[0], state[0])
    assert torch.equal(kept[1], state[1][0])


@given(batch=st.integers(1, 9), seed=st.integers(0, 99), trailing=st.sampled_from([(), (3,), (1, 2, 2)]))
def test_dense_puts_rows_back(batch: int, seed: int, trailing: tuple[int, ...]) -> None:
    source = torch.Generator().manual_seed(seed)
    index = torch.randperm(batch, generator=source)[: int(torch.randint(0, batch + 1, (), generator=source))]
    value = torch.rand(len(index), *trailing, generator=source)
    dense = Trace({"site": (Decision(value, rows=index),)}, (), (), batch).dense("site")
    assert dense.shape == (batch, *trailing)
    assert torch.equal(dense[index], value)
    assert float(dense.double().sum()) == pytest.approx(float(value.double().sum()))


@given(case=LOGITS)
def test_every_exit_agrees_with_its_own_threshold(case: tuple[int, int, int, float]) -> None:
    """A row leaves at the first exit whose score isn't above the threshold, and takes that exit's logits."""
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(case[0]))
    model = pliant.bind(built("exits"), {"*": rules.Threshold(0.6)})
    y = model(x)
    _, trace = pliant.record(pliant.masked(pliant.bind(model, {"*": rules.Threshold(float("-inf"))})))(x)
    for i in range(5):
        k = next((k for k in range(2) if trace[f"sites.{k}"][0].scores[i] <= 0.6), 2)
        torch.testing.assert_close(y[i], trace.exits[k].logits[i], rtol=1e-5, atol=1e-6)
    assert y.shape == (5, CLASSES)
