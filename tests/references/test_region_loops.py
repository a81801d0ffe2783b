"""Regions against loops over pixels that anyone can read: bilinear reading, windows, and every transform."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pliant
from pliant import Decision, PliantError, Site, Trace, rules
from pliant.core.site import Outcome
from pliant.estimators import Gaussian
from pliant.execute import Affine, Attention, Look, Projective, Region, ThinPlate, Warp, Window
from pliant.execute.skip import Carried
from pliant.functional import cells, read, spline, spline_basis
from pliant.scores import PlacePolicy


def pixel(x: Tensor, u: float, v: float) -> Tensor:
    """Bilinear reading of one image (C, H, W) at (u, v), borders at -1 and 1, pixels as areas, 0 outside."""
    height, width = x.shape[1:]
    column, row = (u + 1) * width / 2 - 0.5, (v + 1) * height / 2 - 0.5
    total = torch.zeros(x.shape[0], dtype=x.dtype)
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < height and 0 <= j < width:
                total = total + (1 - abs(row - i)) * (1 - abs(column - j)) * x[:, i, j]
    return total


def by_hand(kind: str, x: Tensor, value: list[float], side: int) -> Tensor:
    """One image through one transform, cell by cell."""
    d = [v - 1 for v in value]
    out = torch.zeros(x.shape[0], side, side, dtype=x.dtype)
    for i in range(side):
        for j in range(side):
            a, b = (2 * j + 1) / side - 1, (2 * i + 1) / side - 1
            if kind == "attention":
                u, v = (1 + d[0]) * a + d[1], (1 + d[0]) * b + d[2]
            elif kind == "affine":
                u, v = (1 + d[0]) * a + d[1] * b + d[2], d[3] * a + (1 + d[4]) * b + d[5]
            else:
                w = d[6] * a + d[7] * b + 1
                u = ((1 + d[0]) * a + d[1] * b + d[2]) / w
                v = (d[3] * a + (1 + d[4]) * b + d[5]) / w
            out[:, i, j] = pixel(x, u, v)
    return out


FRAMES: dict[str, type[Warp]] = {"attention": Attention, "affine": Affine, "projective": Projective}
numbers = st.floats(-0.375, 0.375, width=32)


@pytest.mark.parametrize("kind", FRAMES)
@settings(max_examples=15, deadline=None)
@given(data=st.data(), side=st.sampled_from([1, 3, 5]))
def test_transforms_cell_by_cell(kind: str, data: st.DataObject, side: int) -> None:
    frame = FRAMES[kind](side)
    value = [1 + v for v in data.draw(st.lists(numbers, min_size=frame.places, max_size=frame.places))]
    x = torch.randn(1, 2, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    got = frame(x, torch.tensor([value]).double())
    torch.testing.assert_close(got[0], by_hand(kind, x[0], value, side), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("frame", [Attention(), Affine(), Projective(), ThinPlate()], ids=lambda f: type(f).__name__)
def test_ones_leave_the_image_as_it_is(frame: Warp) -> None:
    x = torch.randn(2, 3, 6, 9)
    torch.testing.assert_close(frame(x, torch.ones(2, frame.places)), x, rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(top=st.integers(0, 5), left=st.integers(0, 7))
def test_a_window_at_whole_pixels_is_a_slice(top: int, left: int) -> None:
    x = torch.randn(1, 2, 8, 10)
    got = Window(3)(x, torch.tensor([[left / 7, top / 5]]))
    torch.testing.assert_close(got, x[:, :, top : top + 3, left : left + 3], rtol=1e-4, atol=1e-5)


def test_a_quarter_turn_is_undone_by_its_inverse() -> None:
    x = torch.randn(1, 1, 7, 7)
    turn = torch.tensor([[0.0, -1, 0, 1, 0, 0]])
    back = torch.tensor([[0.0, 1, 0, -1, 0, 0]])
    identity = torch.tensor([[1.0, 0, 0, 0, 1, 0]])
    turned = Affine()(x, turn - identity + 1)
    torch.testing.assert_close(turned, x.rot90(1, (2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(Affine()(turned, back - identity + 1), x, rtol=1e-4, atol=1e-5)


def test_a_turn_by_any_angle_is_undone_where_the_image_is_smooth() -> None:
    places = cells(32, 32, torch.zeros(()))
    x = torch.exp(-6 * ((places[:, 0] - 0.2) ** 2 + (places[:, 1] + 0.1) ** 2)).reshape(1, 1, 32, 32)
    c, s = math.cos(0.6), math.sin(0.6)
    there, back = (torch.tensor([[c, -t, 0, t, c, 0]]) - torch.tensor([[1.0, 0, 0, 0, 1, 0]]) + 1 for t in (s, -s))
    again = Affine()(Affine()(x, there), back)
    assert float((again - x).abs()[..., 6:-6, 6:-6].max()) < 0.03  # two bilinear readings blur
    assert float((Affine()(x, there) - x).abs().max()) > 0.1


@pytest.mark.parametrize(
    "frame", [Attention(3), Affine(3), Projective(3), ThinPlate(3, side=2), Window(3)], ids=lambda f: type(f).__name__
)
def test_gradients_by_image_and_place(frame: nn.Module) -> None:
    torch.manual_seed(3)
    frame, count = frame.double(), frame.places  # pyright: ignore[reportAttributeAccessIssue]
    x = torch.randn(2, 1, 5, 6, dtype=torch.float64, requires_grad=True)
    value = (0.43 + 0.05 * torch.randn(2, count, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(frame, (x, value))


def test_a_spline_goes_through_its_knots_and_is_affine_where_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    knots = torch.rand(9, 2, generator=generator).double() * 2 - 1
    to = torch.randn(1, 9, 2, generator=generator).double()
    basis = spline_basis(knots)
    torch.testing.assert_close(spline(knots, knots, basis @ to), to)
    flat = (knots @ torch.tensor([[0.5, -1.0], [2.0, 0.3]]).double() + 0.7)[None]
    places = torch.rand(5, 2, generator=generator).double()
    want = places @ torch.tensor([[0.5, -1.0], [2.0, 0.3]]).double() + 0.7
    torch.testing.assert_close(spline(places, knots, basis @ flat)[0], want)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_a_region_is_each_row_by_itself(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, value = torch.randn(rows, 2, 6, 6, generator=generator), torch.rand(rows, 2, generator=generator)
    net = Region(Site(nn.Identity(), rules.Never(), shape=(2,)), Window(4), nn.Conv2d(2, 3, 4)).eval()
    alone = [net.network(net.frame(x[i : i + 1], value[i : i + 1])) for i in range(rows)]
    want = torch.cat(alone) if alone else torch.zeros(0, 3, 1, 1)
    replay = Trace({"site": (Decision(value, weight=True),)}, (), (), rows)
    for form in (pliant.masked, pliant.gathered):
        torch.testing.assert_close(form(net)(x, given=value), want)
        torch.testing.assert_close(form(pliant.bind(net, {"*": rules.Given(replay)}))(x), want)
        torch.testing.assert_close(form(net)(x, given=Outcome(value)), want)


def test_a_look_hands_the_memory_on_and_decides_by_what_was_seen() -> None:
    policy = PlacePolicy(3, 4, hidden=5)
    net = Region(Site(policy, Gaussian(), shape=(2,)), Window(2), nn.Flatten()).eval()
    image, seen = torch.randn(2, 1, 6, 6), torch.randn(2, 3, 4, 4)
    y, memory = net(Look(image, seen))
    assert isinstance(net(Look(image, seen)), Carried)
    scores, wanted = policy.step(seen, None)
    torch.testing.assert_close(memory, wanted)
    torch.testing.assert_close(y, Window(2)(image, scores.sigmoid()).flatten(1))
    assert not torch.equal(net(Look(image, seen, memory))[1], memory)
    assert pliant.plain(net)(Look(image, seen)).carry is None


def test_gaussian_places_have_the_log_density_of_the_draw() -> None:
    torch.manual_seed(0)
    scores = torch.tensor([[0.0, 8.0]]).expand(20_000, 2).clone().requires_grad_()
    out = Gaussian(std=0.2)(scores)
    assert out.log_prob is not None
    assert not out.value.requires_grad
    assert 0 <= float(out.value.min()) <= float(out.value.max()) == 1
    (gradient,) = torch.autograd.grad((out.log_prob * out.value).mean(0).sum(), scores)
    # d E[v] / d s = sigmoid' where nothing is clamped: 1/4 at 0
    assert abs(float(gradient[:, 0].sum()) - 0.25) < 0.02
    assert torch.equal(Gaussian().eval()(scores).value, scores.sigmoid())


def test_refusals() -> None:
    with pytest.raises(PliantError, match=r"a site of shape \(\) for a Window"):
        Region(Site(nn.Identity(), rules.Never()), Window(2), nn.Identity())
    with pytest.raises(PliantError, match="images of 4 by 8; expected at least 5 by 5"):
        Window(5)(torch.zeros(1, 1, 4, 8), torch.zeros(1, 2))
    with pytest.raises(PliantError, match="1 knots per side"):
        ThinPlate(side=1)
    with pytest.raises(PliantError, match="std 0"):
        Gaussian(std=0)
    with pytest.raises(PliantError, match="transform 'twist'"):
        pliant.create_model("stn", transform="twist")
    with pytest.raises(PliantError, match="0 parts"):
        pliant.create_model("stn", parts=0)
    with pytest.raises(PliantError, match="size 30"):
        pliant.create_model("gfnet", size=30)


def test_nothing_is_read_beyond_the_border_and_nan_stays_nan() -> None:
    x = torch.ones(1, 1, 2, 2)
    assert float(read(x, torch.tensor([[[5.0, 0.0]]]), 1, 1)) == 0
    assert bool(read(x, torch.tensor([[[float("nan"), 0.0]]]), 1, 1).isnan())
