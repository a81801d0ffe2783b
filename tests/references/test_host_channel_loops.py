"""Channels of somebody else's convolutions against a loop that anyone can read: one row, one channel at a time."""

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
from pliant.functional.channels import alike, conv_picked, pack, pick, unpack
from pliant.retrofit import channels

INPUTS, WIDTH, SIZE = 3, 4, 5


def conv(*sizes: Any, **more: Any) -> Any:
    return nn.Conv2d(*sizes, **more)


def norm(count: int) -> Any:
    made: Any = nn.BatchNorm2d(count)
    for t in (made.weight.data, made.bias.data, made.running_mean):
        t.normal_()
    return made


def normed(layer: Any, c: int, x: Tensor) -> Tensor:
    return (x - layer.running_mean[c]) / (layer.running_var[c] + layer.eps).sqrt() * layer.weight[c] + layer.bias[c]


class Pair(nn.Module):
    """Two convolutions."""

    widths = (WIDTH,)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = conv(INPUTS, WIDTH, 3, padding=1, stride=2), norm(WIDTH)
        self.b = conv(WIDTH, INPUTS, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.max_pool2d(self.norm(self.a(x)).relu(), 2, 1))

    def loop(self, x: Tensor, values: list[Tensor]) -> Tensor:
        y = torch.zeros_like(self.b(torch.zeros(1, WIDTH, 2, 2)))[0] + self.b.bias[:, None, None]
        for c in range(WIDTH):
            h = F.conv2d(x[None], self.a.weight[c][None], self.a.bias[c][None], 2, 1)
            h = F.max_pool2d(normed(self.norm, c, h).relu(), 2, 1)
            y = y + values[0][c] * F.conv2d(h, self.b.weight[:, c][:, None], None, 1, 1)[0]
        return y


class Three(nn.Module):
    """A bottleneck."""

    widths = (WIDTH, 6)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            conv(INPUTS, WIDTH, 1),
            conv(WIDTH, 6, 3),
            conv(6, INPUTS, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).sigmoid())

    def loop(self, x: Tensor, values: list[Tensor]) -> Tensor:
        y = torch.zeros(INPUTS, SIZE - 2, SIZE - 2)
        for j in range(6):
            h = torch.zeros(SIZE - 2, SIZE - 2) + self.b.bias[j]
            for i in range(WIDTH):
                a = F.conv2d(x[None], self.a.weight[i][None], self.a.bias[i][None]).relu()
                h = h + values[0][i] * F.conv2d(a, self.b.weight[j, i][None, None])[0, 0]
            y = y + values[1][j] * h.sigmoid() * self.c.weight[:, j]
        return y


class Squeezed(nn.Module):
    """An inverted residual with squeeze and excitation."""

    widths = (WIDTH,)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = conv(INPUTS, WIDTH, 1, bias=False), norm(WIDTH)
        self.deep = conv(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.less, self.more = conv(WIDTH, 2, 1), conv(2, WIDTH, 1)
        self.b = conv(WIDTH, INPUTS, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.deep(self.norm(self.a(x)).relu())
        return self.b(h * self.more(self.less(h.mean((2, 3), keepdim=True)).relu()).sigmoid())

    def loop(self, x: Tensor, values: list[Tensor]) -> Tensor:
        hidden, squeezed = [], self.less.bias.clone()
        for c in range(WIDTH):
            h = normed(self.norm, c, F.conv2d(x[None], self.a.weight[c][None])).relu()
            h = F.conv2d(h, self.deep.weight[c][None], self.deep.bias[c][None], 1, 1)[0, 0]
            hidden.append(h)
            squeezed = squeezed + values[0][c] * h.mean() * self.less.weight[:, c, 0, 0]
        y = torch.zeros_like(x) + self.b.bias[:, None, None]
        for c in range(WIDTH):
            weight = (self.more.weight[c, :, 0, 0] @ squeezed.relu() + self.more.bias[c]).sigmoid()
            y = y + values[0][c] * weight * hidden[c] * self.b.weight[:, c]
        return y


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("kind", [Pair, Three, Squeezed])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_both_forms_are_the_loop_and_bill_what_ran(kind: type[Any], groups: int | None, data: Any) -> None:
    torch.manual_seed(0)
    block = kind().eval()
    count = data.draw(st.sampled_from([0, 1, 2, 5]))
    model = channels(nn.Sequential(block).eval(), ["0"], groups=groups, example=torch.randn(2, INPUTS, SIZE, SIZE))
    number = st.sampled_from(data.draw(st.sampled_from([(0.0, 1.0), (0.0,), (1.0,), (0.0, 0.5, 1.0)])))
    values = [
        torch.tensor(data.draw(st.lists(number, min_size=count * n, max_size=count * n))).reshape(count, n)
        for n in (kind.widths if groups is None else [groups])
    ]
    weight = any(bool(((v > 0) & (v < 1)).any()) for v in values)
    visits = {f"channels.0.sites.{k}": (Decision(v, weight=weight),) for k, v in enumerate(values)}
    if groups is not None:
        values = [values[0][:, model.channels[0].get_buffer(f"group{k}")] for k in range(len(kind.widths))]
        assert [
            torch.bincount(model.channels[0].get_buffer(f"group{k}")).tolist() for k in range(len(kind.widths))
        ] == [[n // groups] * groups for n in kind.widths]
    model = pliant.bind(model, {"*": rules.Given(Trace(visits, (), (), count))})
    x = torch.randn(count, INPUTS, SIZE, SIZE)
    with torch.no_grad():
        y = model(x)
        torch.testing.assert_close(pliant.masked(model)(x), y)
        for r in range(count):
            torch.testing.assert_close(y[r], block.loop(x[r], [v[r] for v in values]).reshape(y[r].shape))
        if all(bool((v == 1).all()) for v in values):
            assert torch.equal(y, block(x))
        if count == 0:  # nobody, and nothing to bill
            return
        with FlopCounterMode(display=False) as counter:
            _, trace = pliant.record(model)(x)
    assert int(trace.flops.sum()) == counter.get_total_flops()
    if not weight:
        torch.testing.assert_close(expected_flops(trace), trace.flops.double())
    runs = [v.count_nonzero(1) for v in values]
    if kind is Pair:
        wanted = runs[0] * 2 * 9 * (INPUTS * 9 + INPUTS * 4)
    elif kind is Three:
        wanted = 2 * (runs[0] * INPUTS * 25 + runs[0] * runs[1] * 81 + runs[1] * INPUTS * 9)
    else:
        wanted = runs[0] * 2 * 25 * (2 * INPUTS + 9) + 2 * 2 * 2 * WIDTH
    assert trace.flops.tolist() == wanted.tolist()


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_picked_channels_are_those_of_the_whole(data: Any) -> None:
    torch.manual_seed(0)
    rows = data.draw(st.sampled_from([1, 2, 5]))
    masks = [
        torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows * n, max_size=rows * n))).reshape(rows, n)
        for n in (3, 4)
    ]
    sets = alike(torch.cat(masks, 1))
    reads, writes = (pick(mask, sets) for mask in masks)
    x, weight, bias = torch.randn(rows, 3, 4, 4), torch.randn(4, 3, 3, 3), torch.randn(4)
    whole = F.conv2d(x * masks[0][..., None, None], weight, bias)
    torch.testing.assert_close(unpack(pack(x, reads), reads, (rows, 3)), x * masks[0][..., None, None])
    torch.testing.assert_close(conv_picked(pack(x, reads), weight, bias, reads=reads), whole)
    torch.testing.assert_close(
        conv_picked(pack(x, reads), weight, bias, reads=reads, writes=writes), pack(whole, writes)
    )
    dense = F.conv2d(x, weight, bias)
    torch.testing.assert_close(conv_picked(x, weight, bias, writes=writes), pack(dense, writes))
