"""Samples, reassembly and refinement against loops over single points."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pliant
from pliant import PliantError, Site, losses, rules, scores
from pliant.execute import Reassemble, Refine
from pliant.functional.resample import reassemble, sample, sample_at
from pliant.functional.sparse_conv import places
from pliant.systems.spatial.carafe import _carafe
from pliant.systems.spatial.pointrend import OnPoints, PointHead, pointrend

C, K = 3, 2


def bilinear(x: Tensor, px: float, py: float) -> Tensor:
    """One sample of one map (C, H, W) at (px, py) in shares of the sides."""
    height, width = x.shape[1:]
    z, y = (min(max(p * n - 0.5, 0.0), n - 1.0) for p, n in ((px, width), (py, height)))
    z0, y0 = math.floor(z), math.floor(y)
    z1, y1 = min(z0 + 1, width - 1), min(y0 + 1, height - 1)
    top = x[:, y0, z0] * (1 - (z - z0)) + x[:, y0, z1] * (z - z0)
    low = x[:, y1, z0] * (1 - (z - z0)) + x[:, y1, z1] * (z - z0)
    return top * (1 - (y - y0)) + low * (y - y0)


SIDES = st.integers(1, 5)


@given(batch=st.integers(0, 3), height=SIDES, width=SIDES, seed=st.integers(0, 99))
def test_samples_are_bilinear_ones(batch: int, height: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, points = torch.randn(batch, C, height, width, generator=generator), torch.rand(batch, 7, 2, generator=generator)
    found = sample(x, points)
    assert found.shape == (batch, 7, C)
    for r in range(batch):
        for n, (px, py) in enumerate(points[r].tolist()):
            torch.testing.assert_close(found[r, n], bilinear(x[r], px, py), rtol=1e-4, atol=1e-5)


@given(batch=st.integers(0, 3), height=SIDES, width=SIDES, to=st.tuples(SIDES, SIDES), seed=st.integers(0, 99))
def test_samples_at_cells_are_those_at_their_centres(
    batch: int, height: int, width: int, to: tuple[int, int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, mask = torch.randn(batch, C, height, width, generator=generator), torch.rand(batch, 1, *to, generator=generator)
    at = places((mask > 0.5).float())
    for row, place in zip(sample_at(x, at), at.index.tolist(), strict=True):
        r, i, j = place // (to[0] * to[1]), place // to[1] % to[0], place % to[1]
        torch.testing.assert_close(row, bilinear(x[r], (j + 0.5) / to[1], (i + 0.5) / to[0]), rtol=1e-4, atol=1e-5)


@given(batch=st.integers(0, 2), height=SIDES, width=SIDES, ratio=st.integers(1, 3), side=st.sampled_from([1, 3, 5]))
def test_reassembly_is_a_sum_over_neighbours(batch: int, height: int, width: int, ratio: int, side: int) -> None:
    x, kernels = torch.randn(batch, C, height, width), torch.randn(batch, side * side, ratio * height, ratio * width)
    found, half = reassemble(x, kernels, side), side // 2
    wanted = torch.zeros(batch, C, ratio * height, ratio * width)
    for i in range(ratio * height):
        for j in range(ratio * width):
            for n in range(side * side):
                y, z = i // ratio + n // side - half, j // ratio + n % side - half
                if 0 <= y < height and 0 <= z < width:
                    wanted[:, :, i, j] += kernels[:, n, i, j, None] * x[:, :, y, z]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", [pliant.masked, pliant.gathered])
@given(batch=st.integers(0, 2), height=SIDES, width=SIDES, ratio=st.integers(1, 2), seed=st.integers(0, 99))
def test_each_target_is_the_mean_of_its_sources_neighbours(
    form: Any, batch: int, height: int, width: int, ratio: int, seed: int
) -> None:
    """By decisions drawn at random, some of which give a target nothing."""
    generator = torch.Generator().manual_seed(seed)
    up = Reassemble(Site(scores.KernelPredictor(C, ratio=ratio, side=3), rules.Softmax()), ratio=ratio, side=3)
    x = torch.randn(batch, C, height, width, generator=generator)
    value = torch.rand(batch, 9, ratio * height, ratio * width, generator=generator).sub(0.5).relu()
    found = form(up)(x, given=value)
    for r in range(batch):
        for i in range(ratio * height):
            for j in range(ratio * width):
                total, weight = torch.zeros(C), 0.0
                for n in range(9):
                    y, z = i // ratio + n // 3 - 1, j // ratio + n % 3 - 1
                    weight += float(value[r, n, i, j])
                    if 0 <= y < height and 0 <= z < width:
                        total += value[r, n, i, j] * x[r, :, y, z]
                wanted = total / weight if weight else total
                torch.testing.assert_close(found[r, :, i, j], wanted, rtol=1e-4, atol=1e-5)


def test_carafe_starts_as_a_box_average_and_its_weights_share_one() -> None:
    up, x = _carafe(4), torch.randn(2, 4, 6, 5)
    y, trace = pliant.record(up)(x)
    box = F.interpolate(F.avg_pool2d(x, 5, 1, 2), scale_factor=2, mode="nearest")
    assert float((y - box).detach().abs().max()) < 1e-2
    torch.testing.assert_close(pliant.plain(up)(x), box, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trace.dense("site").sum(1), torch.ones(2, 12, 10))
    assert not pliant.bind(up, {"*": rules.Never()})(x).any()


def built(rule: pliant.Rule) -> Refine:
    torch.manual_seed(0)
    head = PointHead(C, K, hidden=4)
    nn.init.normal_(head.out.weight)
    return Refine(head, [Site(scores.PointUncertainty(), rule) for _ in range(2)]).eval()


def by_hand(refine: Refine, fine: Tensor, coarse: Tensor, masks: list[Tensor]) -> Tensor:
    z = coarse
    for mask in masks:
        z = F.interpolate(z, scale_factor=2, mode="bilinear").clone()
        for r, _, i, j in mask.nonzero().tolist():
            px, py = (j + 0.5) / z.shape[3], (i + 0.5) / z.shape[2]
            read = [bilinear(t[r], px, py)[None] for t in (fine, coarse)]
            z[r, :, i, j] = refine.head(*read)[0]
    return z


@given(batch=st.integers(0, 3), height=SIDES, width=SIDES, p=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 99))
@torch.no_grad()
def test_refinement_is_the_loop_over_points(batch: int, height: int, width: int, p: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    fine = torch.randn(batch, C, 3 * height, 2 * width, generator=generator)
    coarse = torch.randn(batch, K, height, width, generator=generator)
    refine = built(rules.Random(p, generator))
    _, trace = pliant.record(refine)((fine, coarse))
    frozen = pliant.bind(refine, {"*": rules.Given(trace)})
    wanted = by_hand(refine, fine, coarse, [trace.dense(f"sites.{t}") for t in range(2)])
    for form in (pliant.masked, pliant.gathered):
        with FlopCounterMode(display=False) as counter:
            y, trace = pliant.record(form(frozen))((fine, coarse))
        assert int(trace.flops.sum()) == counter.get_total_flops()
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pliant.cost.expected_flops(trace), trace.flops.double())


def test_all_points_are_the_head_on_the_whole_grid_and_k_points_cost_k() -> None:
    x = torch.randn(2, C, 8, 8), torch.randn(2, K, 2, 2)
    refine = built(rules.TopK(share=1.0, dims=3))
    torch.testing.assert_close(refine(x), pliant.plain(refine)(x), rtol=1e-4, atol=1e-5)
    _, trace = pliant.record(built(rules.TopK(5, dims=3)))(x)
    price = 2 * (4 * (C + K) + 2 * 4 * (4 + K) + K * (4 + K))
    assert trace.flops.tolist() == [2 * 5 * price] * 2
    assert trace.dense_flops.tolist() == [(16 + 64) * price] * 2


def test_uncertainty_is_small_where_one_class_wins() -> None:
    z = torch.tensor([[4.0, 1.0], [2.0, 2.0], [0.0, -9.0]]).T.reshape(1, 2, 1, 3)
    assert scores.PointUncertainty()(z).flatten().tolist() == [-3.0, 0.0, -9.0]
    assert scores.PointUncertainty()(z[:, :1]).flatten().tolist() == [-4.0, -2.0, 0.0]


def test_training_on_points_learns_and_prefers_the_uncertain() -> None:
    torch.manual_seed(0)
    model = pointrend(2, 1, width=4, hidden=8)
    x = torch.zeros(4, 1, 16, 16)
    x[:, :, :, 5:] = 1
    target = (x[:, 0] > 0).long()
    on_points = OnPoints(model, points=40).train()
    optimizer = torch.optim.Adam(on_points.parameters(), lr=0.02)
    first = last = 0.0
    for step in range(40):
        y = on_points(x + 0.1 * torch.randn_like(x))
        loss = losses.PointLoss()(y, pliant.Trace({}, (), (), 4), target, 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = (loss.item() if step == 0 else first), loss.item()
    assert last < 0.5 * first
    coarse = torch.stack([torch.linspace(-1, 1, 8).expand(8, 8), torch.zeros(8, 8)])[None]
    points = OnPoints(model, points=200).choose(coarse)
    assert ((points[0, :150, 0] - 0.5).abs() < 0.15).float().mean() > 0.9
    assert ((points[0, 150:, 0] - 0.5).abs() < 0.15).float().mean() < 0.5
    with pytest.raises(PliantError, match="points=0"):
        OnPoints(model, points=0)
    with pytest.raises(PliantError, match="a tuple of features"):
        built(rules.Always())(torch.zeros(1, 2, 3, 3))
    with pytest.raises(PliantError, match="no site"):
        Refine(PointHead(C, K), [])
