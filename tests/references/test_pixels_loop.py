"""Branches by positions against a loop anyone can read: one row, one position, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pliant
from pliant import PliantError, Site, estimators, rules, scores
from pliant.execute import Pixels
from pliant.functional.sparse_conv import dilate

C = 4


def norm(channels: int) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(channels)
    for t in (made.weight, made.bias, made.running_mean):
        nn.init.normal_(t)
    return made


def conv(a: int, b: int, k: int, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(a, b, k, padding=more.get("dilation", 1) * (k // 2), **more)


BRANCHES: dict[str, Callable[[], list[nn.Module]]] = {
    "basic": lambda: [conv(C, 6, 3), norm(6), nn.ReLU(), conv(6, C, 3), norm(C)],
    "bottleneck": lambda: [
        conv(C, 3, 1, bias=False), norm(3), nn.ReLU(), conv(3, 3, 3), norm(3), nn.ReLU(), conv(3, C, 1), norm(C),
    ],
    "inverted": lambda: [conv(C, 8, 1), nn.ReLU6(), conv(8, 8, 3, groups=8), norm(8), nn.ReLU6(), conv(8, C, 1)],
    "preactivation": lambda: [norm(C), nn.LeakyReLU(), conv(C, C, 3), norm(C), nn.LeakyReLU(), conv(C, C, 3)],
    "groups, dilated, 5x5": lambda: [conv(C, 8, 3, groups=2), nn.SiLU(), conv(8, C, 3, dilation=2), conv(C, C, 5)],
    "one": lambda: [conv(C, C, 1)],
}  # fmt: skip
STRIDED: dict[str, Callable[[], list[nn.Module]]] = {
    "basic, stride 2": lambda: [conv(C, 6, 3, stride=2), norm(6), nn.ReLU(), conv(6, C, 3), norm(C)],
    "bottleneck, stride 2": lambda: [conv(C, 3, 1), nn.ReLU(), conv(3, 3, 3, stride=2), norm(3), conv(3, C, 1)],
    "one, stride 2": lambda: [conv(C, C, 1, stride=2)],
}
ALL = BRANCHES | STRIDED


def built(name: str, rule: pliant.Rule | None = None) -> Pixels:
    torch.manual_seed(0)
    stride = 2 if name in STRIDED else 1
    head = scores.SqueezeMaskHead(C, stride=stride, bias=0.0)
    nn.init.normal_(head.conv.weight)
    site = Site(head, rules.Threshold(0.0) if rule is None else rule)
    shortcut = nn.Conv2d(C, C, 1, stride=2) if stride == 2 else None
    return Pixels(nn.Sequential(*ALL[name]()), site, shortcut=shortcut).eval()


def alone(layers: list[nn.Module], x: Tensor, i: int, j: int) -> tuple[Tensor, set[tuple[int, int, int]]]:
    """The last layer's output (channels,) at one position of one row's map (C, H, W), and the (layer, i, j) it takes."""
    if not layers:
        return x[:, i, j], set()
    *before, layer = layers
    if not isinstance(layer, nn.Conv2d):
        y, ran = alone(before, x, i, j)
        return layer.eval()(y[None, :, None, None])[0, :, 0, 0], ran
    (k, _), s, d = layer.kernel_size, layer.stride[0], layer.dilation[0]
    height, width = x.shape[1:]
    for earlier in before:
        if isinstance(earlier, nn.Conv2d):
            height, width = -(-height // earlier.stride[0]), -(-width // earlier.stride[0])
    ran = {(len(before), i, j)}
    channels = layer.in_channels
    patch = torch.zeros(channels, k, k)
    for a in range(k):
        for b in range(k):
            y, z = i * s + (a - k // 2) * d, j * s + (b - k // 2) * d
            if 0 <= y < height and 0 <= z < width:
                patch[:, a, b], more = alone(before, x, y, z)
                ran |= more
    return F.conv2d(patch[None], layer.weight, layer.bias, groups=layer.groups)[0, :, 0, 0], ran


def by_hand(block: Pixels, x: Tensor, mask: Tensor) -> tuple[Tensor, list[int]]:
    """Answers and FLOPs per row."""
    layers = list(block.branch)
    y, flops = block.shortcut(x).clone(), []
    for r in range(len(x)):
        ran: set[tuple[int, int, int]] = set()
        for i, j in mask[r, 0].nonzero().tolist():
            out, more = alone(layers, x[r], i, j)
            y[r, :, i, j] += out
            ran |= more
        flops.append(sum(2 * layers[n].weight.numel() for n, _, _ in ran))  # pyright: ignore
    return y, flops


@st.composite
def masks(draw: st.DrawFn, stride: int) -> tuple[Tensor, Tensor]:
    batch, height, width = draw(st.sampled_from([0, 1, 2, 3])), draw(st.integers(1, 5)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    p = draw(st.sampled_from([0.0, 0.2, 0.5, 1.0]))
    size = (batch, 1, -(-height // stride), -(-width // stride))
    mask = (torch.rand(size, generator=generator) < p).float()
    return torch.randn(batch, C, height, width, generator=generator), mask


@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
@torch.no_grad()
def test_both_forms_are_the_loop_over_positions(name: str, data: st.DataObject) -> None:
    block = built(name)
    x, mask = data.draw(masks(block.stride))
    wanted, flops = by_hand(block, x, mask)
    shortcut = 0 if block.stride == 1 else 2 * C * C * mask[:1].numel()
    for form in (pliant.masked, pliant.gathered):
        with FlopCounterMode(display=False) as counter:
            y, trace = pliant.record(form(block))(x, given=mask)
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
        assert int(trace.flops.sum()) == counter.get_total_flops()
        assert pliant.cost.expected_flops(trace).tolist() == [f + shortcut for f in flops]
    assert trace.flops.tolist() == [f + shortcut for f in flops]
    torch.testing.assert_close(block(x, given=mask), y, rtol=0, atol=0)  # not recorded, the same bits


@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
def test_training_is_the_same_in_both_forms(name: str, data: st.DataObject) -> None:
    """Answers, gradients and running statistics: batch norm sees what is executed and nothing else."""
    ran = []
    x, mask = data.draw(masks(2 if name in STRIDED else 1))
    assume(x[:, :1].numel() > 1)  # PyTorch's own batch norm, in front of the first convolution, refuses one position
    for form in (pliant.masked, pliant.gathered):
        block = built(name, estimators.StraightThrough(rules.Threshold(0.0))).train()
        value = mask.clone().requires_grad_()
        y = form(block)(x, given=value)
        loss = (y * torch.linspace(0.5, 1.5, y.numel()).reshape(y.shape)).sum()
        parameters = list(block.branch.parameters())
        loss = loss + 0 * parameters[0].sum()  # where nothing runs, nothing has a gradient
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        ran.append([y, *block.branch.buffers()])
        ran[-1] += [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
    for a, b in zip(*ran, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_with_everything_on_training_is_pytorchs_batch_norm() -> None:
    x, mask = torch.randn(3, C, 4, 4), torch.ones(3, 1, 4, 4)
    one, other = built("basic").train(), built("basic").train()
    torch.testing.assert_close(one(x, given=mask), other.plain(x), rtol=1e-4, atol=1e-4)
    for a, b in zip(one.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_too_few_positions_leave_the_statistics_alone() -> None:
    block = built("basic").train()
    before = [b.clone() for b in block.branch.buffers()]
    y = block(torch.randn(2, C, 4, 4), given=torch.zeros(2, 1, 4, 4))
    assert y.isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(before, block.branch.buffers(), strict=True))


@given(seed=st.integers(0, 99), stride=st.sampled_from([1, 2]), kernel=st.sampled_from([1, 3, 5]))
def test_the_expected_dilation_is_the_mean_of_dilated_draws(seed: int, stride: int, kernel: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(1, 1, 3, 3, generator=generator)
    size = (2 * 3 - 1, 2 * 3) if stride == 2 else (3, 3)
    draws = (torch.rand(20_000, 1, 3, 3, generator=generator) < p).float()
    found = dilate(draws, kernel, size, stride=stride)
    assert set(found.unique().tolist()) <= {0.0, 1.0}
    torch.testing.assert_close(found.mean(0), dilate(p, kernel, size, stride=stride)[0], rtol=0, atol=0.02)


@torch.no_grad()
def test_the_cost_a_sampled_mask_expects_is_the_mean_of_what_runs() -> None:
    block = built("bottleneck", estimators.GumbelSample(rules.Threshold(0.0)))
    x = torch.randn(1, C, 4, 4).expand(400, -1, -1, -1)
    _, trace = pliant.record(pliant.gathered(block))(x)
    expected = pliant.cost.expected_flops(trace)
    assert float(expected.std()) < 1e-3 * float(expected.mean())
    error = float(trace.flops.double().std()) / 20
    assert abs(float(trace.flops.double().mean() - expected.mean())) < 5 * error


def test_above_a_share_everything_is_computed_and_booked() -> None:
    block = built("basic")
    block.dense_above = 0.4
    x = torch.randn(2, C, 4, 4)
    for share, dense in ((0.25, False), (0.5, True)):
        mask = (torch.arange(32).reshape(2, 1, 4, 4) < 32 * share).float()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            y, trace = pliant.record(block)(x, given=mask)
        assert int(trace.flops.sum()) == counter.get_total_flops()
        assert torch.equal(trace.flops, trace.dense_flops) == dense
        torch.testing.assert_close(y, pliant.masked(block)(x, given=mask), rtol=1e-5, atol=1e-5)


def test_soft_weights_multiply_in_both_forms() -> None:
    block, x = built("inverted", rules.ReluTanh()), torch.randn(3, C, 5, 5)
    y, trace = pliant.record(block)(x)
    assert 0 < float((trace.dense("site") > 0).float().mean()) < 1
    torch.testing.assert_close(y, pliant.masked(block)(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["basic", "inverted", "bottleneck, stride 2"])
def test_the_house_checks(name: str) -> None:
    block = built(name, estimators.Gumbel(rules.Threshold(0.0)))
    assert pliant.check(block, torch.randn(4, C, 6, 6))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: [nn.Conv2d(C, C, 3)], "padded by half its kernel"),
        (lambda: [nn.Conv2d(C, C, (1, 3), padding=(0, 1))], "square"),
        (lambda: [nn.MaxPool2d(2), nn.Conv2d(C, C, 1)], "a MaxPool2d as layer '0'"),
        (lambda: [nn.BatchNorm2d(C, track_running_stats=False)], "running statistics"),
        (lambda: [nn.ReLU()], "without a convolution"),
    ],
)
def test_what_cannot_run_by_positions_is_refused(make: Callable[[], list[nn.Module]], says: str) -> None:
    with pytest.raises(PliantError, match=says):
        Pixels(nn.Sequential(*make()), Site(scores.MaskHead(C), rules.Threshold(0.0)))


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(PliantError, match=r"expected \(2, 1, 4, 4\)"):
        built("basic")(torch.randn(2, C, 4, 4), given=torch.ones(2, 1, 3, 3))
    with pytest.raises(PliantError, match="dense_above"):
        Pixels(nn.Sequential(conv(C, C, 3)), Site(scores.MaskHead(C), rules.Threshold(0.0)), dense_above=2.0)
