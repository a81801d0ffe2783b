"""Fused recurrent layers cost what a loop of counted products costs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import pliant


@contextmanager
def counted() -> Iterator[FlopCounterMode]:
    with FlopCounterMode(display=False) as counter:
        yield counter


def gates(layer: Any, weights: str, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The two products of a step, by the operator that every counter knows."""
    w, u = getattr(layer, f"weight_ih_{weights}"), getattr(layer, f"weight_hh_{weights}")
    return F.linear(x, w, getattr(layer, f"bias_ih_{weights}")), F.linear(h, u, getattr(layer, f"bias_hh_{weights}"))


def lstm(layer: Any, weights: str, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    a, b = gates(layer, weights, x, h)
    i, f, g, o = (a + b).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru(layer: Any, weights: str, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    (ar, az, an), (br, bz, bn) = (t.chunk(3, 1) for t in gates(layer, weights, x, h))
    z = (az + bz).sigmoid()
    return (1 - z) * (an + (ar + br).sigmoid() * bn).tanh() + z * h, c


def rnn(layer: Any, weights: str, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    a, b = gates(layer, weights, x, h)
    return (a + b).tanh(), c


CELLS: dict[type[nn.RNNBase], Callable[..., tuple[Tensor, Tensor]]] = {nn.LSTM: lstm, nn.GRU: gru, nn.RNN: rnn}


def loop(layer: nn.RNNBase, x: Tensor, h0: Tensor, c0: Tensor) -> Tensor:
    """All layers and directions of (rows, T, I), step by step."""
    ways = 2 if layer.bidirectional else 1
    for n in range(layer.num_layers):
        outs = []
        for way in range(ways):
            h, c = h0[n * ways + way], c0[n * ways + way]
            states = []
            for x_t in x.unbind(1)[:: -1 if way else 1]:
                h, c = CELLS[type(layer)](layer, f"l{n}" + ("_reverse" if way else ""), x_t, h, c)
                states.append(h)
            outs.append(torch.stack(states[:: -1 if way else 1], 1))
        x = torch.cat(outs, 2)
    return x


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("layers", "both"), [(1, False), (2, True)])
@pytest.mark.parametrize("kind", list(CELLS))
def test_a_layer_costs_what_its_loop_costs(
    kind: Callable[..., Any], layers: int, both: bool, grad: bool, training: bool
) -> None:
    layer = kind(3, 4, layers, batch_first=True, bidirectional=both).train(training)
    x = torch.randn(2, 5, 3)
    state = torch.zeros(layers * (1 + both), 2, 4)
    with torch.set_grad_enabled(grad), counted() as naive:
        expected = loop(layer, x, state, state)
    with torch.set_grad_enabled(grad), counted() as fused:
        y, _ = layer(x)
    torch.testing.assert_close(y, expected)
    assert fused.get_total_flops() == naive.get_total_flops() > 0
    # The same on fake tensors, which is how a model is priced, and row by row.
    _, trace = pliant.record(layer)(x)
    assert trace.flops.tolist() == [naive.get_total_flops() // 2] * 2


def test_the_backward_pass_of_the_fused_layer() -> None:
    layer = nn.LSTM(3, 4, batch_first=True)
    x, h, c = torch.randn(2, 5, 3, requires_grad=True), *torch.zeros(2, 1, 2, 4, requires_grad=True)
    with counted() as naive:
        loop(layer, x, h, c).sum().backward()
    with counted() as fused:
        layer(x, (h, c))[0].sum().backward()
    assert fused.get_total_flops() == naive.get_total_flops()


@pytest.mark.parametrize("kind", list(CELLS))
def test_packed_texts_cost_their_own_lengths(kind: Callable[..., Any]) -> None:
    layer = kind(3, 4)
    packed = pack_padded_sequence(torch.randn(5, 3, 3), torch.tensor([5, 4, 2]))
    with counted() as one:
        layer(torch.randn(1, 1, 3))
    with counted() as all_:
        layer(packed)
    assert all_.get_total_flops() == 11 * one.get_total_flops()


def test_layers_that_are_not_fused_are_counted_by_their_products() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch on its own slow path for projections
        for layer, flops in (
            (nn.LSTM(3, 4).double(), 16 * (3 + 4)),
            (nn.LSTM(3, 4, proj_size=2), 16 * (3 + 2) + 4 * 2),
        ):
            x = torch.randn(5, 2, 3, dtype=next(layer.parameters()).dtype)
            with counted() as counter:
                layer(x)
            assert counter.get_total_flops() == 2 * 10 * flops
    for layer, gates_ in ((nn.LSTMCell(3, 4), 4), (nn.GRUCell(3, 4), 3), (nn.RNNCell(3, 4), 1)):
        with counted() as counter:
            layer(torch.randn(2, 3))
        assert counter.get_total_flops() == 2 * 2 * gates_ * 4 * (3 + 4)


def test_an_int8_product_costs_what_a_float_one_does():
    a, b = torch.ones(32, 16, dtype=torch.int8), torch.ones(16, 8, dtype=torch.int8)
    with counted() as whole:
        assert int(torch._int_mm(a, b)[0, 0]) == 16
    with counted() as known:
        torch.mm(a.float(), b.float())
    assert whole.get_total_flops() == known.get_total_flops() == 2 * 32 * 16 * 8
