"""Parts that run by halves: their units are priced, counted and expected exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pliant
from pliant.core import tape
from pliant.core.executor import Executor
from pliant.core.site import Site
from pliant.cost import expected_flops
from pliant.rules import Always, Never, Threshold


class Columns(Executor):
    """Hidden units chosen for each row: the smallest executor whose parts have units, in two parts."""

    def __init__(self, rule: Any) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 4), nn.Linear(4, 2)
        self.site = Site(nn.Linear(3, 4), rule, shape=(4,))

    def plain(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())

    def masked(self, x: Tensor, given: Any = None) -> Tensor:
        decision = self.site(x, given=given)
        wanted = (decision.value if decision.soft is None else decision.soft).sum(1)
        with tape.part(self.site, decision.visit, "1/up", wanted=wanted, of=4):
            hidden = self.up(x).relu()
        with tape.part(self.site, decision.visit, "1/down", wanted=wanted, of=4):
            return self.down(hidden * decision.value)

    def gathered(self, x: Tensor, given: Any = None) -> Tensor:
        decision = self.site(x, given=given)
        units = decision.value.sum(1).long()
        with tape.part(self.site, decision.visit, "1/up", units=units, of=4):
            hidden = [row @ self.up.weight[v > 0].T for row, v in zip(x[:, None], decision.value, strict=True)]
        with tape.part(self.site, decision.visit, "1/down", units=units, of=4):
            rows = [
                (h + self.up.bias[v > 0]).relu() @ self.down.weight[:, v > 0].T
                for h, v in zip(hidden, decision.value, strict=True)
            ]
        return torch.cat(rows) + self.down.bias


def counted(model: nn.Module, x: Tensor, value: Tensor) -> tuple[Tensor, Any, int]:
    with FlopCounterMode(display=False) as counter:
        y, trace = pliant.record(model)(x, given=value)
    return y, trace, counter.get_total_flops()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=5))
def test_units_that_ran_are_what_is_booked_and_masked_agrees(pattern: list[list[bool]]) -> None:
    model = Columns(Threshold(0.0)).eval()
    x, value = torch.randn(len(pattern), 3), torch.tensor(pattern).float()
    y, trace, flops = counted(model, x, value)
    assert int(trace.flops.sum()) == flops
    assert trace.flops.tolist() == [2 * (3 + 2) * sum(row) for row in pattern]
    ref, all_ran, flops = counted(pliant.masked(model), x, value)
    assert int(all_ran.flops.sum()) == flops
    torch.testing.assert_close(y, ref)
    assert expected_flops(trace).tolist() == expected_flops(all_ran).tolist() == trace.flops.tolist()


def test_dense_is_every_unit_and_expected_cost_has_the_gradient_of_the_soft_value() -> None:
    model = Columns(pliant.estimators.StraightThrough(Threshold(0.0))).train()
    _, trace = pliant.record(model)(torch.randn(5, 3))
    assert trace.dense_flops.tolist() == [2 * 3 * 4 + 2 * 5 * 4] * 5
    soft = trace["site"][0].soft
    assert soft is not None
    torch.testing.assert_close(expected_flops(trace).float(), 24 + 10 * soft.sum(1))
    expected_flops(trace).sum().backward()
    assert model.site.scorer.weight.grad is not None
    assert model.site.scorer.weight.grad.any()
    for rule, most in ((Always(), 40), (Never(), 0)):
        assert pliant.record(pliant.bind(model, {"*": rule}).eval())(torch.zeros(1, 3))[1].flops.tolist() == [most]


def test_units_of_unequal_cost_are_refused() -> None:
    class Crooked(Columns):
        def masked(self, x: Tensor, given: Any = None) -> Tensor:
            with tape.part(self.site, 0, "1", of=7):
                return self.up(x)[:, :2]

    with pytest.raises(pliant.PliantError, match="units of equal cost"):
        _ = pliant.record(Crooked(Always()).eval())(torch.zeros(2, 3))[1].flops


def test_a_trace_of_units_travels_as_a_tree() -> None:
    from torch.utils import _pytree as pytree

    _, trace = pliant.record(Columns(pliant.estimators.StraightThrough(Threshold(0.0))).train())(torch.randn(2, 3))
    leaves, spec = pytree.tree_flatten(trace)
    again = pytree.tree_unflatten(leaves, spec)
    assert [n.choice for n in again.notes] == ["score", "1/up", "1/down"]
    assert again.notes[1].wanted is trace.notes[1].wanted
