"""Experts of somebody else's feed-forward layer against a loop that anyone can read: one token, one neuron at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pliant
from pliant import Decision, Trace, rules
from pliant.cost import expected_flops
from pliant.retrofit import experts

WIDTH, HIDDEN, EXPERTS = 4, 6, 3


class Gated(nn.Module):
    """Two first layers, as in a Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))

    def hidden(self, x: Tensor, i: int) -> Tensor:
        return F.silu(self.gate.weight[i] @ x + self.gate.bias[i]) * (self.up.weight[i] @ x + self.up.bias[i])


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))

    def hidden(self, x: Tensor, i: int) -> Tensor:
        return F.gelu(self.up.weight[i] @ x)


class Pixels(nn.Module):
    """Convolutions of size 1."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(WIDTH, HIDDEN, 1, bias=False), nn.Conv2d(HIDDEN, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x.movedim(-1, 1)))).movedim(1, -1)

    def hidden(self, x: Tensor, i: int) -> Tensor:
        return F.gelu(self.up.weight[i].flatten() @ x)


def loop(layer: Any, order: Tensor, x: Tensor, value: Tensor) -> Tensor:
    """A token's answer is the last layer's bias and what the neurons of its experts add."""
    y = torch.zeros_like(x)
    for at in torch.cartesian_prod(*[torch.arange(n) for n in x.shape[:-1]]).reshape(-1, x.ndim - 1).tolist():
        total = layer.down.bias.clone()
        for e in range(EXPERTS):
            for i in order[e].tolist():
                total += value[*at, e] * layer.hidden(x[*at], i) * layer.down.weight.flatten(1)[:, i]
        y[*at] = total
    return y


@pytest.mark.parametrize("kind", [Plain, Gated, Pixels])
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_both_forms_are_the_loop_and_bill_what_ran(kind: type[Any], data: Any) -> None:
    torch.manual_seed(0)
    layer = kind().eval()
    places = [data.draw(st.integers(1, 3)) for _ in range(2 if kind is Pixels else data.draw(st.integers(0, 2)))]
    shape = (data.draw(st.sampled_from([0, 1, 2, 5])), *places)
    model = experts(nn.Sequential(layer).eval(), ["0"], experts=EXPERTS, top=1, example=torch.randn(2, *places, WIDTH))
    size = EXPERTS * torch.Size(shape).numel()
    number = st.sampled_from(data.draw(st.sampled_from([(0.0, 1.0), (0.0,), (1.0,), (0.0, 0.5, 1.0)])))
    value = torch.tensor(data.draw(st.lists(number, min_size=size, max_size=size))).reshape(*shape, EXPERTS)
    x = torch.randn(*shape, WIDTH)
    decided = Decision(value, weight=bool(((value > 0) & (value < 1)).any()))
    model = pliant.bind(model, {"*": rules.Given(Trace({"experts.0.site": (decided,)}, (), (), shape[0]))})
    with torch.no_grad():
        y = model(x)
        torch.testing.assert_close(y, loop(layer, model.experts[0].order, x, value))
        torch.testing.assert_close(pliant.masked(model)(x), y)
        if bool((value == 1).all()):
            assert torch.equal(y, layer(x))
        if shape[0] == 0:  # nobody, and nothing to bill
            return
        with FlopCounterMode(display=False) as counter:
            _, trace = pliant.record(model)(x)
    assert int(trace.flops.sum()) == counter.get_total_flops()
    each = 2 * WIDTH * HIDDEN // EXPERTS * (3 if kind is Gated else 2)
    assert trace.flops.tolist() == (each * (value != 0).flatten(1).sum(1)).tolist()
    if not decided.weight:
        assert expected_flops(trace).tolist() == trace.flops.tolist()
