"""Trees against a walk from the root that anyone can read: outputs, gradients, and the nodes that were reached."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import pliant
from pliant import Decision, PliantError, Trace, rules
from pliant.cost import expected_flops
from pliant.execute import Trees
from pliant.rules import SmoothStep

INPUTS, OUTPUTS = 3, 2


def step(t: Tensor, width: float) -> Tensor:
    """The smooth step of one number, by its definition."""
    if t <= -width / 2:
        return t * 0
    if t >= width / 2:
        return t * 0 + 1
    return -2 / width**3 * t**3 + 3 / (2 * width) * t + 0.5


def walk(net: Trees, row: Tensor, width: float, level: int, node: int) -> tuple[Tensor, int]:
    """What a row gets from the subtree at a node, and how many leaves it reached there; closed children aren't visited."""
    if level == len(net.nodes):
        return net.leaves[node], 1
    left = step(net.nodes[level].weight[node] @ row, width)
    y, reached = torch.zeros(OUTPUTS, dtype=row.dtype), 0
    for child, p in ((2 * node, left), (2 * node + 1, 1 - left)):
        if p > 0:
            below, count = walk(net, row, width, level + 1, child)
            y, reached = y + p * below, reached + count
    return y, reached


def forest(depth: int, trees: int = 2, width: float = 1.0, scale: float = 1.0, above: float = 1.0) -> Trees:
    torch.manual_seed(0)
    net = (
        Trees(INPUTS, OUTPUTS, trees=trees, rules=[SmoothStep(width) for _ in range(depth)], dense_above=above)
        .double()
        .eval()
    )
    for p in net.parameters():
        torch.nn.init.normal_(p, std=scale)
    return net


def by_hand(net: Trees, x: Tensor, width: float) -> tuple[Tensor, list[int]]:
    rows = [[walk(net, row, width, 0, tree) for tree in range(net.trees)] for row in x]
    ys = [sum(y for y, _ in row) for row in rows]
    return torch.stack(ys) if ys else torch.zeros(0, OUTPUTS).double(), [sum(n for _, n in row) for row in rows]


@settings(max_examples=20, deadline=None)
@given(
    depth=st.integers(1, 4), trees=st.integers(1, 3), rows=st.sampled_from([0, 1, 2, 5]),
    width=st.sampled_from([0.125, 1.0, 8.0]), above=st.sampled_from([0.0, 0.3, 1.0]),
)  # fmt: skip
def test_both_forms_are_the_walk(depth: int, trees: int, rows: int, width: float, above: float) -> None:
    net, x = (
        forest(depth, trees, width, above=above),
        torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(1)).double(),
    )
    want, leaves = by_hand(net, x, width)
    for form in (pliant.masked, pliant.gathered):
        torch.testing.assert_close(form(net)(x), want, rtol=1e-9, atol=1e-12)
    with FlopCounterMode(display=False) as counter:
        _, trace = pliant.record(net)(x)
    assert int(trace.flops.sum()) == counter.get_total_flops()
    assert trace.notes[-1].units is not None
    assert trace.notes[-1].units.tolist() == leaves


@settings(max_examples=20, deadline=None)
@given(data=st.data(), rows=st.sampled_from([0, 1, 3]), above=st.sampled_from([0.3, 1.0]))
def test_forced_sides(data: st.DataObject, rows: int, above: float) -> None:
    """Any set of open sides: the account is exact, both forms agree, and so do their expected costs."""
    net, visits = forest(3, above=above), {}
    for level in range(3):
        size = rows * 2 * 2**level * 2
        bits = data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=size, max_size=size))
        visits[f"sites.{level}"] = (Decision(torch.tensor(bits).double().reshape(rows, 2 * 2**level, 2)),)
    bound = pliant.bind(net, {"*": rules.Given(Trace(visits, (), (), rows))})
    x = torch.randn(rows, INPUTS).double()
    with FlopCounterMode(display=False) as counter:
        y, trace = pliant.record(bound)(x)
    assert int(trace.flops.sum()) == counter.get_total_flops()
    ref, dense = pliant.record(pliant.masked(bound))(x)
    torch.testing.assert_close(y, ref)
    assert expected_flops(trace).tolist() == expected_flops(dense).tolist()
    if above == 1:
        assert expected_flops(trace).tolist() == trace.flops.tolist()


def test_sparse_gradients_are_those_of_the_dense_formula() -> None:
    net, x = forest(4, width=1.0), torch.randn(6, INPUTS).double()
    found: list[Any] = []
    for form in (pliant.masked, pliant.gathered):
        at = x.clone().requires_grad_()
        y = form(net).train()(at)
        loss = (y * torch.linspace(1, 2, y.numel()).double().reshape(y.shape)).sum()
        found.append(torch.autograd.grad(loss, [at, *net.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_gradients_by_finite_differences() -> None:
    net = forest(2, trees=1, width=4.0, scale=0.5)
    names = [name for name, _ in net.named_parameters()]

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        return torch.func.functional_call(pliant.gathered(net), dict(zip(names, tensors, strict=True)), (x,))

    x = torch.randn(3, INPUTS).double().requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *(p.detach().clone().requires_grad_() for p in net.parameters())))


def test_unreached_nodes_show_as_saved_in_the_trace() -> None:
    net = forest(2, trees=1, width=0.01, scale=10.0)
    _, trace = pliant.record(net)(torch.randn(1, INPUTS).double())
    assert trace["sites.0"][0].value.sum() == 1
    assert trace["sites.1"][0].value.shape == (1, 2, 2)
    assert trace["sites.1"][0].value.sum() == 1  # only the child that was reached has sides


@pytest.mark.parametrize("width", [0.3, 1.0, 7.0])
def test_the_smooth_step(width: float) -> None:
    t = torch.linspace(-width, width, 101).double().requires_grad_()
    out = SmoothStep(width)(t)
    torch.testing.assert_close(out.value, torch.stack([step(v, width) for v in t]).detach())
    torch.testing.assert_close(out.value + SmoothStep(width)(-t).value, torch.ones(101).double())
    (slope,) = torch.autograd.grad(out.value.sum(), t)
    outside = t.detach().abs() >= width / 2
    assert not slope[outside].any()
    assert (slope[~outside] > 0).all()
    assert bool(SmoothStep(width)(torch.tensor([float("nan")])).value.isnan())


def test_refusals() -> None:
    with pytest.raises(PliantError, match="0 trees of 1 levels"):
        Trees(2, 2, trees=0, rules=[SmoothStep()])
    with pytest.raises(PliantError, match="width 0"):
        SmoothStep(0.0)
