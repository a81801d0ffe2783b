"""Deformable convolution against torchvision's operator, and against a loop over every tap."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pliant.functional import deform
from pliant.functional.deform import deform_conv2d
from pliant.functional.dynamic_conv import Geometry, output_size

CASES = {
    "3x3": ((3, 3), 1, Geometry(padding=1)),
    "strided": ((3, 3), 1, Geometry(stride=2, padding=1)),
    "dilated": ((3, 3), 1, Geometry(padding=2, dilation=2)),
    "grouped": ((3, 3), 1, Geometry(padding=1, groups=2)),
    "offset groups": ((3, 3), 2, Geometry(padding=1)),
    "both": ((3, 3), 2, Geometry(padding=1, groups=4)),
    "oblong": ((1, 3), 1, Geometry(stride=(2, 1), padding=(0, 1))),
}


def some(name: str, rows: int, size: tuple[int, int] = (7, 6), *, spread: float = 2.0):
    """Offsets that lead out of the map too."""
    kernel, groups, geometry = CASES[name]
    taps, out = kernel[0] * kernel[1], output_size(size, kernel, geometry)
    x, weight, bias = (
        torch.randn(rows, 4, *size),
        torch.randn(8, 4 // geometry.groups, *kernel),
        torch.randn(8),
    )
    return x, spread * torch.randn(rows, 2 * groups * taps, *out), weight, bias, torch.rand(rows, groups * taps, *out)


def theirs(x: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None, name: str) -> Tensor:
    ops = pytest.importorskip("torchvision.ops")
    stride, padding, dilation, _ = CASES[name][2]
    return ops.deform_conv2d(x, offsets, weight, bias, stride, padding, dilation, mask)


def at(image: Tensor, y: float, x: float) -> Tensor:
    """Bilinear sample of (C, H, W) with zeros beyond the border."""
    total = torch.zeros(image.shape[0])
    for i in (math.floor(y), math.floor(y) + 1):
        for j in (math.floor(x), math.floor(x) + 1):
            if 0 <= i < image.shape[1] and 0 <= j < image.shape[2]:
                total += (1 - abs(y - i)) * (1 - abs(x - j)) * image[:, i, j]
    return total


def test_a_loop_over_every_tap() -> None:
    x, offsets, weight, bias, mask = some("strided", 2)
    y = deform_conv2d(x, offsets, weight, bias, mask=mask, geometry=CASES["strided"][2])
    for r in range(2):
        for i in range(y.shape[2]):
            for j in range(y.shape[3]):
                wanted = bias.clone()
                for k in range(9):
                    dy, dx = offsets[r, 2 * k, i, j], offsets[r, 2 * k + 1, i, j]
                    seen = at(x[r], float(2 * i - 1 + k // 3 + dy), float(2 * j - 1 + k % 3 + dx))
                    wanted += mask[r, k, i, j] * weight[:, :, k // 3, k % 3] @ seen
                assert torch.allclose(y[r, :, i, j], wanted, atol=1e-3)


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("name", CASES)
def test_values_are_torchvisions(name: str, rows: int) -> None:
    x, offsets, weight, bias, mask = some(name, rows)
    for m in (mask, None):
        wanted = theirs(x, offsets, weight, bias, m, name)
        got = deform_conv2d(x, offsets, weight, bias, mask=m, geometry=CASES[name][2])
        with torch.no_grad():
            quick = deform_conv2d(x, offsets, weight, bias, mask=m, geometry=CASES[name][2])
        assert got.shape == quick.shape == wanted.shape
        assert torch.allclose(got, wanted, atol=1e-4)
        assert torch.allclose(quick, wanted, atol=1e-4)


@pytest.mark.parametrize("spread", [2.0, 0.0])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_torchvisions(name: str, spread: float) -> None:
    """At offsets of exactly 0 too, where bilinear reading has a kink: there the slope is the one to the right."""
    inputs = [t.double().requires_grad_() for t in some(name, 3, spread=spread)]
    x, offsets, weight, bias, mask = inputs
    wanted = theirs(x, offsets, weight, bias, mask, name)
    got = deform_conv2d(x, offsets, weight, bias, mask=mask, geometry=CASES[name][2])
    out = torch.randn_like(wanted)
    for a, b in zip(torch.autograd.grad(got, inputs, out), torch.autograd.grad(wanted, inputs, out), strict=True):
        assert torch.allclose(a, b, atol=1e-8)


def test_rows_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, offsets, weight, _, mask = some("both", 5)
    with torch.no_grad():
        for m in (mask, None):
            whole = deform_conv2d(x, offsets, weight, mask=m, geometry=CASES["both"][2])
            with monkeypatch.context() as patch:
                patch.setattr(deform, "CHUNK", 2 * 4 * 9 * 42)  # two rows at a time
                assert torch.allclose(
                    deform_conv2d(x, offsets, weight, mask=m, geometry=CASES["both"][2]), whole, atol=1e-5
                )


WIDE = {"3x3", "strided", "dilated", "oblong"}
"""Cases of one group: those that packed rows of many channels serve."""


def wide(name: str, rows: int, channels: int = 64, size: tuple[int, int] = (7, 6)):
    """As ``some``, with many channels and offsets far beyond the border."""
    kernel, _, geometry = CASES[name]
    taps, out = kernel[0] * kernel[1], output_size(size, kernel, geometry)
    x, weight = torch.randn(rows, channels, *size), torch.randn(24, channels, *kernel) / (taps * channels) ** 0.5
    return x, 4 * torch.randn(rows, 2 * taps, *out), weight, torch.randn(24), torch.rand(rows, taps, *out)


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("name", sorted(WIDE))
def test_packed_rows_of_many_channels_give_the_same(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, offsets, weight, bias, mask = wide(name, rows)
    offsets[:, :2] = offsets[:, :2].round()  # whole pixels too
    for m in (mask, None):
        wanted = deform_conv2d(x, offsets, weight, bias, mask=m, geometry=CASES[name][2])
        for chunk in (deform.PACKED, 2 * 64 * 9 * 42):
            monkeypatch.setattr(deform, "PACKED", chunk)
            with torch.no_grad():
                got = deform_conv2d(x, offsets, weight, bias, mask=m, geometry=CASES[name][2])
            assert got.is_contiguous()
            assert torch.allclose(got, wanted, atol=1e-4)


def test_packed_rows_read_nothing_beyond_the_border_and_pass_nan_on() -> None:
    x, offsets, weight, _, _ = wide("3x3", 2)
    far = torch.full_like(offsets, 1e30)
    far[1] = float("-inf")
    x[:, :, 0] = x[:, :, -1] = x[:, :, :, 0] = x[:, :, :, -1] = float("nan")  # pixels that a clamped place would read
    with torch.no_grad():
        y = deform_conv2d(x, far, weight, geometry=CASES["3x3"][2])
        assert torch.equal(y, torch.zeros_like(y))
        offsets[:] = 0
        offsets[1, 0, 3, 3] = float("nan")
        y = deform_conv2d(torch.ones_like(x), offsets, weight, geometry=CASES["3x3"][2])
    assert y[1, :, 3, 3].isnan().all()
    assert y.isnan().sum() == 24


def test_costs_a_static_convolution() -> None:
    x, offsets, weight, _, mask = some("grouped", 3)
    geometry = CASES["grouped"][2]
    counts = []
    for call in (lambda: F.conv2d(x, weight, None, *geometry), lambda: deform_conv2d(x, offsets, weight, mask=mask, geometry=geometry)):  # fmt: skip
        for grad in (False, True):
            with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad):
                call()
            counts.append(counter.get_total_flops())
    assert len(set(counts)) == 1


def test_packed_rows_cost_a_static_convolution() -> None:
    x, offsets, weight, _, mask = wide("strided", 3)
    geometry, counts = CASES["strided"][2], []
    for call in (lambda: F.conv2d(x, weight, None, *geometry), lambda: deform_conv2d(x, offsets, weight, mask=mask, geometry=geometry)):  # fmt: skip
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_an_offset_that_is_not_a_number_is_heard() -> None:
    x, offsets, weight, _, mask = some("3x3", 2)
    offsets[0] = float("nan")
    y = deform_conv2d(x, offsets, weight, mask=mask, geometry=Geometry(padding=1))
    assert y[0].isnan().all()
    assert y[1].isfinite().all()
