"""TopK, ReluTanh and Halting: laws over many scores, and what they make run."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pliant
from nets import WIDTH, built
from pliant import PliantError, Site, rules
from pliant.execute import Residual

VALUES = st.sampled_from([0.0, 1.0, -1.0, 2.5, float("nan"), float("inf"), float("-inf")])


def ranked(row: list[float], k: int) -> list[float]:
    """The k best by hand: NaN first, then the highest, the lower index among equals."""
    order = sorted(range(len(row)), key=lambda i: (row[i] == row[i], -row[i] if row[i] == row[i] else 0.0, i))
    return [1.0 if i in order[:k] else 0.0 for i in range(len(row))]


@given(data=st.data(), batch=st.integers(0, 4), n=st.integers(1, 7))
def test_topk_ranks_as_a_loop_does(data: st.DataObject, batch: int, n: int) -> None:
    rows = [data.draw(st.lists(VALUES, min_size=n, max_size=n)) for _ in range(batch)]
    k = data.draw(st.integers(0, n))
    scores = torch.tensor(rows).reshape(batch, n)
    value = rules.TopK(k)(scores).value
    assert value.dtype == scores.dtype
    assert value.tolist() == [ranked(row, k) for row in rows]
    assert (value.sum(1) == k).all()


@given(share=st.floats(0, 1), side=st.integers(1, 5), batch=st.integers(0, 3))
def test_a_share_of_a_map_is_exact_and_the_same_for_every_row(share: float, side: int, batch: int) -> None:
    rule = rules.TopK(share=share, dims=3)
    value = rule(torch.randn(batch, 1, side, side)).value
    assert value.shape == (batch, 1, side, side)
    assert (value.flatten(1).sum(1) == rule.count(side * side)).all()
    assert abs(rule.count(side * side) - share * side * side) <= 0.5 + 1e-9


def test_topk_decides_for_each_row_alone() -> None:
    scores = torch.randn(5, 3, 8)
    whole = rules.TopK(3)(scores).value
    assert torch.equal(whole, torch.cat([rules.TopK(3)(row).value for row in scores.split(1)]))
    assert (whole.sum(-1) == 3).all()  # dims=1: within each of the three groups


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: rules.TopK(), "exactly one"),
        (lambda: rules.TopK(1, share=0.5), "exactly one"),
        (lambda: rules.TopK(-1), "at least 0"),
        (lambda: rules.TopK(0.5), "whole number"),
        (lambda: rules.TopK(share=1.5), r"\[0, 1\]"),
        (lambda: rules.TopK(1, dims=0), "at least 1"),
        (lambda: rules.TopK(1)(torch.zeros(4)), "within a row"),
        (lambda: rules.TopK(5)(torch.zeros(2, 4)), "at most 4"),
        (lambda: rules.Halting(1.0), "below 1"),
        (lambda: rules.Halting(-0.1), "at least 0"),
    ],
)
def test_mistakes_are_told(make, says: str) -> None:
    with pytest.raises(PliantError, match=says):
        make()


@given(values=st.lists(VALUES, max_size=8))
def test_relu_tanh_is_a_weight_with_exact_zeros(values: list[float]) -> None:
    scores = torch.tensor(values, dtype=torch.float32).requires_grad_()
    out = rules.ReluTanh()(scores)
    assert out.soft is out.value
    assert ((out.value >= 0) & (out.value <= 1)).all()
    closed = scores <= 0
    assert (out.value[closed] == 0).all()
    assert (out.value[~closed] > 0).all()  # NaN spends
    out.value.sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    assert (scores.grad[closed] == 0).all()


class _Column(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


@given(closed=st.lists(st.booleans(), max_size=7))
def test_zero_weights_run_nothing_and_change_nothing(closed: list[bool]) -> None:
    x = torch.randn(len(closed), WIDTH)
    x[:, 0] = torch.where(torch.tensor(closed, dtype=torch.bool), -1.0, 0.7)
    block = Residual(nn.Linear(WIDTH, WIDTH), Site(_Column(), rules.ReluTanh())).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        y, trace = pliant.record(block)(x)
    open_rows = len(closed) - sum(closed)
    assert counter.get_total_flops() == int(trace.flops.sum()) == open_rows * 2 * WIDTH * WIDTH
    everything = pliant.masked(block)(x)
    torch.testing.assert_close(y, everything, rtol=1e-5, atol=1e-6)
    shut = torch.tensor(closed, dtype=torch.bool)
    assert torch.equal(y[shut], x[shut])
    assert torch.equal(everything[shut], x[shut])
    assert torch.equal(trace.dense("site") == 0, shut)


@pytest.mark.parametrize("name", ["skip", "either", "residual", "skip_in_skip"])
def test_relu_tanh_agrees_in_both_forms_and_replays(name: str) -> None:
    model = pliant.bind(built(name), {"*": rules.ReluTanh()})
    for batch in (0, 1, 5):
        x = torch.randn(batch, WIDTH)
        y, trace = pliant.record(model)(x)
        torch.testing.assert_close(y, pliant.masked(model)(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(pliant.bind(model, {"*": rules.Given(trace)})(x), y, rtol=1e-5, atol=1e-6)


def test_rules_copy_and_save() -> None:
    halting = rules.Halting(0.05)
    twin = rules.Halting()
    twin.load_state_dict(halting.state_dict())
    scores = torch.rand(2, 6)
    for rule in (halting, twin, copy.deepcopy(halting)):
        assert torch.equal(rule(scores).value, (scores > torch.tensor(0.05)).float())
    assert torch.equal(copy.deepcopy(rules.TopK(2))(scores).value, rules.TopK(2)(scores).value)
    assert repr(rules.TopK(share=0.5, dims=3)) == "TopK(share=0.5, dims=3)"
