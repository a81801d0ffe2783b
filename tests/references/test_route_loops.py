"""Routes against a loop over rows, nodes and edges that anyone can read; and the account of what ran."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pliant
from pliant import Decision, PliantError, Site, Trace, rules
from pliant.core.site import Outcome, Rule
from pliant.cost import expected_flops
from pliant.execute import Node, Routes
from pliant.scores import RouteGate

WIDTH = 3
FORMS: dict[str, Callable[[nn.Module], Any]] = {"masked": pliant.masked, "gathered": pliant.gathered}


class Counted(nn.Linear):
    """A layer that remembers on how many rows it ran; only for these tests."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.ran: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.ran.append(len(x))
        return super().forward(x)


def layer(keep: bool = True, trunk: bool = True, rule: Rule | None = None) -> Routes:
    """Two nodes with edges to three targets; two edges of the second lead to the same one."""
    torch.manual_seed(0)

    def node(targets: list[int], kept: int | None) -> Node:
        site = Site(nn.Linear(WIDTH, len(targets)), rules.ReluTanh() if rule is None else rule, shape=(len(targets),))
        body = nn.Sequential(Counted(), nn.Tanh()) if trunk else None
        return Node(site, [(target, Counted()) for target in targets], body, kept)

    return Routes([node([0, 1], 0 if keep else None), node([1, 2, 1], 1 if keep else None)]).eval()


def alone(net: Routes, x: list[Tensor], gates: list[Tensor]) -> list[Tensor]:
    """Every row by itself: each open edge adds its weighted output, a node without open edges passes its input on."""
    out = [torch.zeros(len(x[0]), WIDTH) for _ in range(3)]
    for r in range(len(x[0])):
        edge = 0
        for s, targets in enumerate(net.targets):
            weights = gates[s][r]
            for k, target in enumerate(targets):
                if weights[k] > 0:
                    out[target][r] += weights[k] * net.edges[edge](net.trunks[s](x[s][r : r + 1]))[0]
                edge += 1
            if not (weights > 0).any() and net.kept[s] is not None:
                out[net.kept[s]][r] += x[s][r]
    return out


def forced(net: Routes, gates: list[Tensor], weight: bool) -> Any:
    visits = {f"sites.{s}": (Decision(value, weight=weight),) for s, value in enumerate(gates)}
    return pliant.bind(net, {"*": rules.Given(Trace(visits, (), (), len(gates[0])))})


@st.composite
def gates(draw: st.DrawFn, levels: tuple[float, ...] = (0.0, 1.0)) -> list[Tensor]:
    count = draw(st.sampled_from([0, 1, 2, 5]))
    every = st.lists(st.sampled_from(levels), min_size=5 * count, max_size=5 * count)
    flat = draw(st.one_of(every, st.just([0.0] * 5 * count), st.just([1.0] * 5 * count)))
    whole = torch.tensor(flat).reshape(count, 5)
    return [whole[:, :2], whole[:, 2:]]


def inputs(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(count, WIDTH, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("keep", "trunk"), [(True, True), (False, False), (True, False)])
@settings(max_examples=25, deadline=None)
@given(values=gates())
def test_routes_with_gates_given(form: str, keep: bool, trunk: bool, values: list[Tensor]) -> None:
    net, x = layer(keep, trunk), inputs(len(values[0]))
    got = FORMS[form](forced(net, values, weight=False))(x)
    torch.testing.assert_close(got, alone(net, x, values), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25, deadline=None)
@given(values=gates((0.0, 0.3, 1.0)))
def test_routes_with_weights(form: str, values: list[Tensor]) -> None:
    net, x = layer(), inputs(len(values[0]))
    got = FORMS[form](forced(net, values, weight=True))(x)
    torch.testing.assert_close(got, alone(net, x, values), rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(values=gates())
def test_what_is_booked_is_what_ran(values: list[Tensor]) -> None:
    net, x = layer(), inputs(len(values[0]))
    with FlopCounterMode(display=False) as counter:
        _, trace = pliant.record(forced(net, values, weight=False))(x)
    assert int(trace.flops.sum()) == counter.get_total_flops()
    each = 2 * WIDTH * WIDTH
    wanted = sum(v.sum(1) + (v > 0).any(1) for v in values) * each
    assert trace.flops.tolist() == wanted.tolist()
    _, dense = pliant.record(pliant.masked(forced(net, values, weight=False)))(x)
    assert expected_flops(trace).tolist() == expected_flops(dense).tolist() == wanted.tolist()


def test_an_edge_runs_on_exactly_its_rows_and_not_at_all_without_any() -> None:
    net, x = layer(keep=True), inputs(4)
    values = [torch.tensor([[1.0, 0], [1, 0], [0, 0], [1, 0]]), torch.tensor([[0.0, 1, 0]] * 2 + [[0, 0, 0]] * 2)]
    model = forced(net, values, weight=False)
    for edge in model.edges:
        edge.ran.clear()
    model(x)
    assert [edge.ran for edge in model.edges] == [[3], [], [], [2], []]
    assert [trunk[0].ran for trunk in model.trunks] == [[3], [2]]


def test_a_target_that_nobody_reaches_is_zero_and_its_edge_sees_no_row() -> None:
    net, x = layer(keep=False), inputs(2)
    model = forced(net, [torch.zeros(2, 2), torch.zeros(2, 3)], weight=False)
    assert all(torch.equal(y, torch.zeros(2, WIDTH)) for y in model(x))
    assert all(sum(edge.ran) == 0 for edge in model.edges)


def test_gradients_of_both_forms_are_the_same() -> None:
    """For gates whose derivative at 0 is 0, and for max(0, tanh), whose derivative where it's closed is."""
    x = inputs(7)
    grads = []
    for form in FORMS.values():
        net = layer()
        sum((y * (k + 1)).sum() for k, y in enumerate(form(net).train()(x))).backward()
        grads.append([torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()])
    assert any(g.any() for g in grads[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_expected_cost_of_independent_gates_and_of_weights() -> None:
    class Likely(Rule):
        reads_scores = False

        def __init__(self, weight: bool) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, scores: Tensor) -> Outcome:
            soft = torch.full_like(scores, 0.5)
            return Outcome(soft if self.weight else torch.ones_like(scores), soft=soft, weight=self.weight)

    each = 2 * WIDTH * WIDTH
    for weight, trunks in ((False, 0.75 + 0.875), (True, 0.5 + 0.5)):
        _, trace = pliant.record(pliant.masked(layer(rule=Likely(weight))))(inputs(1))
        assert expected_flops(trace).tolist() == [each * (2.5 + trunks)]


def test_refusals() -> None:
    site = Site(nn.Identity(), rules.Always(), shape=(1,))
    with pytest.raises(PliantError, match=r"gates of shape \(1,\) for 2 edges"):
        Routes([Node(site, [(0, nn.Identity()), (0, nn.Identity())])])
    with pytest.raises(PliantError, match=r"targets \[1\]"):
        Routes([Node(site, [(1, nn.Identity())])])
    with pytest.raises(PliantError, match="0 ways"):
        RouteGate(4, 0)
    with pytest.raises(PliantError, match="expected positive counts"):
        pliant.create_model("dynamic_routing_seg", stride=3)
    with pytest.raises(PliantError, match="0 branches"):
        pliant.create_model("supernet_routing", branches=0)
    with pytest.raises(PliantError, match="router 'best'"):
        pliant.create_model("supernet_routing", router="best")


def test_the_small_gate_sees_a_smaller_map() -> None:
    gate = RouteGate(4, 2, shrink=4).eval()
    with FlopCounterMode(display=False) as counter:
        assert gate(torch.zeros(1, 4, 8, 8)).shape == (1, 2)
        assert gate(torch.zeros(1, 4, 2, 2)).shape == (1, 2)
    assert counter.get_total_flops() == 2 * (4 * 4 * 2 + 2 * 2) + 2 * (4 * 2 + 2 * 2)


def test_cells_of_an_image_that_closes_everything_are_not_called() -> None:
    model = pliant.create_model("dynamic_routing_seg", num_classes=3, layers=3, scales=2, channels=4, stride=2).eval()
    x = torch.randn(2, 3, 16, 16)
    never, always = (pliant.record(pliant.bind(model, {"*": rule}))(x)[1] for rule in (rules.Never(), rules.Always()))
    assert {note.choice for note in never.notes} == set()
    assert (never.flops < always.flops).all()
    assert {note.choice for note in always.notes} == {"1/trunk", "1/0", "1/1"}
