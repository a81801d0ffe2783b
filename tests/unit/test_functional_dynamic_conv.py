"""Kernels that differ from row to row, against a loop over rows that anyone can read."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pliant.functional import dynamic_conv
from pliant.functional.dynamic_conv import (
    Geometry,
    conv_each,
    conv_then_mix,
    filter_each,
    mix_kernels,
    mix_then_conv,
    mixed_conv2d,
)

GEOMETRIES = {
    "1x1": ((1, 1), Geometry()),
    "3x3": ((3, 3), Geometry(padding=1)),
    "strided": ((3, 3), Geometry(stride=2, padding=1)),
    "grouped": ((3, 3), Geometry(padding=1, groups=2)),
    "depthwise": ((3, 3), Geometry(padding=1, groups=4)),
    "dilated": ((3, 3), Geometry(padding=2, dilation=2)),
    "oblong": ((1, 3), Geometry(stride=(2, 1), padding=(0, 1))),
    "unpadded": ((2, 2), Geometry()),
}
E = 3


def row_by_row(x: Tensor, weights: Tensor, experts: Tensor, bias: Tensor, geometry: Geometry) -> Tensor:
    """What is meant: for each row, the weighted sum of its convolutions with all experts."""
    rows = []
    for image, weight in zip(x, weights, strict=True):
        each = [w * F.conv2d(image, kernel, b, *geometry) for w, kernel, b in zip(weight, experts, bias, strict=True)]
        rows.append(sum(each))
    return torch.stack(rows)


def some(rows: int, kernel: tuple[int, int], geometry: Geometry, size: tuple[int, int] = (6, 5)):
    x = torch.randn(rows, 4, *size, dtype=torch.float64)
    experts = torch.randn(E, 8, 4 // geometry.groups, *kernel, dtype=torch.float64)
    weights, bias = torch.randn(rows, E, dtype=torch.float64), torch.randn(E, 8, dtype=torch.float64)
    return x, weights, experts, bias


@pytest.mark.parametrize("rows", [1, 2, 7, 8])
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("way", [mix_then_conv, conv_then_mix, mixed_conv2d])
def test_every_way_is_the_loop(way, name: str, rows: int) -> None:
    kernel, geometry = GEOMETRIES[name]
    x, weights, experts, bias = some(rows, kernel, geometry)
    wanted = row_by_row(x, weights, experts, bias, geometry)
    assert torch.allclose(way(x, weights, experts, bias, geometry=geometry), wanted, atol=1e-10)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("way", [mix_then_conv, conv_then_mix, mixed_conv2d])
def test_no_rows(way, name: str) -> None:
    kernel, geometry = GEOMETRIES[name]
    x, weights, experts, bias = some(0, kernel, geometry)
    wanted = F.conv2d(x.new_zeros(1, 4, 6, 5), experts[0], None, *geometry).shape[1:]
    assert way(x, weights, experts, bias, geometry=geometry).shape == (0, *wanted)


@given(st.sampled_from(list(GEOMETRIES)), st.integers(1, 9), st.integers(1, 3), st.data())
def test_in_chunks_and_by_one_product(name: str, rows: int, few: int, data: st.DataObject) -> None:
    """However the rows are cut, and in the form that is exported, the numbers are the same; so are the gradients."""
    kernel, geometry = GEOMETRIES[name]
    torch.manual_seed(data.draw(st.integers(0, 99)))
    x, weights, experts, bias = some(rows, kernel, geometry)
    inputs = [t.requires_grad_() for t in (x, weights, experts, bias)]
    wanted = row_by_row(*inputs, geometry)
    kernels, biases = mix_kernels(weights, experts), mix_kernels(weights, bias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_conv, "FEWEST", few)
        patch.setattr(dynamic_conv, "CHUNK", 0)
        got = [mix_then_conv(*inputs, geometry=geometry)]
    got.append(dynamic_conv._by_product(x, kernels, geometry) + biases[..., None, None])
    got.append(conv_then_mix(*inputs, geometry=geometry))
    out = torch.randn_like(wanted)
    grads = torch.autograd.grad(wanted, inputs, out)
    for y in got:
        assert torch.allclose(y, wanted, atol=1e-10)
        for a, b in zip(torch.autograd.grad(y, inputs, out, retain_graph=True), grads, strict=True):
            assert torch.allclose(a, b, atol=1e-9)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_single_precision_is_near(name: str) -> None:
    kernel, geometry = GEOMETRIES[name]
    for rows in (1, 8):
        inputs = [t.float() for t in some(rows, kernel, geometry)]
        a, b = (way(*inputs, geometry=geometry) for way in (mix_then_conv, conv_then_mix))
        assert torch.allclose(a, b, atol=1e-4)


def test_weights_of_one_choose_an_expert() -> None:
    x, _, experts, bias = some(4, (3, 3), Geometry(padding=1))
    weights = F.one_hot(torch.tensor([2, 0, 1, 1]), E).double()
    y = mixed_conv2d(x, weights, experts, bias, geometry=Geometry(padding=1))
    for row, expert in enumerate([2, 0, 1, 1]):
        assert torch.allclose(y[row], F.conv2d(x[row], experts[expert], bias[expert], padding=1))


def test_the_way_hangs_on_the_map_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for way in ("conv_then_mix", "mix_then_conv"):
        monkeypatch.setattr(dynamic_conv, way, lambda *_, way=way, **__: taken.append(way))
    for size, rows in ((1, 1), (1, 64), (2, 1), (3, 1), (3, 64)):
        mixed_conv2d(torch.zeros(rows, 1, size, size), torch.zeros(rows, 2), torch.zeros(2, 1, 1, 1, 1))
    assert taken == ["conv_then_mix"] * 3 + ["mix_then_conv"] * 2


def test_generated_kernels_with_biases() -> None:
    x, kernels, bias = torch.randn(3, 2, 5, 5), torch.randn(3, 4, 2, 3, 3), torch.randn(3, 4)
    y = conv_each(x, kernels, bias)
    for row in range(3):
        assert torch.allclose(y[row], F.conv2d(x[row], kernels[row], bias[row]), atol=1e-5)


@given(st.integers(0, 3), st.sampled_from([1, 2]), st.sampled_from([(3, 3), (1, 5), (9, 9)]), st.booleans())
def test_taps_of_every_position(rows: int, channels: int, size: tuple[int, int], shared: bool) -> None:
    x = torch.randn(rows, channels, 4, 5)
    filters = torch.randn(rows, 1 if shared else channels, size[0] * size[1], 4, 5)
    y = filter_each(x, filters, size)
    down, right = size[0] // 2, size[1] // 2
    wanted = torch.zeros(rows, channels, 4, 5)
    for r in range(rows):
        for c in range(channels):
            for i in range(4):
                for j in range(5):
                    for k in range(size[0] * size[1]):
                        a, b = i + k // size[1] - down, j + k % size[1] - right
                        if 0 <= a < 4 and 0 <= b < 5:
                            wanted[r, c, i, j] += filters[r, 0 if shared else c, k, i, j] * x[r, c, a, b]
    assert torch.allclose(y, wanted, atol=1e-4)


def test_the_same_taps_everywhere_are_a_convolution() -> None:
    x, kernels = torch.randn(3, 1, 7, 7), torch.randn(3, 1, 1, 5, 5)
    everywhere = kernels.flatten(3).reshape(3, 1, 25, 1, 1).expand(3, 1, 25, 7, 7)
    wanted = conv_each(x, kernels, geometry=Geometry(padding=2))
    assert torch.allclose(filter_each(x, everywhere, (5, 5)), wanted, atol=1e-5)


def test_soft_taps_keep_what_lies_away_from_the_border() -> None:
    """A tap reads from where it stands: what is given back sums to what was there if all positions have the same taps."""
    x = torch.zeros(1, 1, 9, 9)
    x[..., 3:6, 3:6] = torch.rand(3, 3)
    taps = torch.softmax(torch.randn(1, 1, 25, 1, 1), 2).expand(1, 1, 25, 9, 9)
    assert torch.allclose(filter_each(x, taps, (5, 5)).sum(), x.sum(), atol=1e-5)
    flat = torch.softmax(torch.randn(1, 1, 25, 9, 9), 2)
    assert torch.allclose(filter_each(torch.ones(1, 1, 9, 9), flat, (5, 5))[..., 2:-2, 2:-2], torch.ones(5, 5))
