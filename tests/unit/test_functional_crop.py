"""Crops: what is in the box, gradients by the box, and the ends."""

from __future__ import annotations

import pytest
import torch

from pliant.functional import box_mask, overlap, square, zoom

WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0]])


def test_the_whole_box_gives_the_image():
    x = torch.randn(2, 3, 7, 5)
    torch.testing.assert_close(zoom(x, WHOLE.expand(2, 4), 7, 5), x)
    torch.testing.assert_close(box_mask(WHOLE, 7, 5, sharpness=50.0), torch.ones(1, 1, 7, 5))


def test_a_box_on_pixel_borders_gives_just_these_pixels():
    x = torch.randn(1, 2, 8, 8)
    box = torch.tensor([[0.25, 0.5, 0.75, 1.0]])
    torch.testing.assert_close(zoom(x, box, 4, 4), x[:, :, 4:, 2:6])
    wanted = torch.zeros(1, 1, 8, 8)
    wanted[:, :, 4:, 2:6] = 1
    torch.testing.assert_close(box_mask(box, 8, 8, sharpness=50.0), wanted)


def test_the_mask_is_the_paper_s_formula():
    box = torch.tensor([[0.21, 0.4, 0.66, 0.93]])

    def h(v: float) -> float:
        return torch.sigmoid(torch.tensor(10.0 * v)).item()

    mask = box_mask(box, 6, 9)[0, 0]
    for i in range(6):
        for j in range(9):
            y, x = i + 0.5, j + 0.5
            wanted = (h(x - 0.21 * 9) - h(x - 0.66 * 9)) * (h(y - 0.4 * 6) - h(y - 0.93 * 6))
            assert mask[i, j].item() == pytest.approx(wanted, abs=1e-5)


def test_gradients_by_the_box_are_those_of_finite_differences():
    x = torch.randn(2, 1, 9, 9, dtype=torch.float64)
    boxes = torch.tensor([[0.21, 0.33, 0.62, 0.71], [0.13, 0.11, 0.57, 0.83]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda b: zoom(x, b, 4, 3), boxes, eps=1e-7)
    assert torch.autograd.gradcheck(lambda b: box_mask(b, 9, 9, sharpness=2.0), boxes)


def test_a_box_moves_to_what_is_bright():
    """From beside it, by the gradient alone, through mask and zoom."""
    places = (torch.arange(16) + 0.5) / 16
    across, down = ((-((places - at) ** 2) / 0.02).exp() for at in (0.7, 0.4))
    image = (down[:, None] * across)[None, None]
    wanted = square(torch.tensor([[0.7, 0.4]]), torch.tensor([[0.2]]))
    centre, half = torch.tensor([[0.5, 0.6]], requires_grad=True), torch.tensor([[0.2]])
    before = overlap(square(centre, half), wanted).item()
    for _ in range(100):
        box = square(centre, half)
        bright = zoom(image * box_mask(box, 16, 16), box, 8, 8).mean()
        (grad,) = torch.autograd.grad(bright, centre)
        centre = (centre + 0.01 * grad / grad.norm()).detach().requires_grad_()
    assert before < 0.2
    assert overlap(square(centre, half), wanted).item() > 0.8


def test_no_rows_and_boxes_beyond_the_border():
    none = torch.zeros(0, 4)
    assert zoom(torch.zeros(0, 2, 6, 6), none, 3, 3).shape == (0, 2, 3, 3)
    assert box_mask(none, 6, 6).shape == (0, 1, 6, 6)
    outside = zoom(torch.ones(1, 1, 4, 4), torch.tensor([[1.5, 0.0, 2.0, 1.0]]), 2, 2)
    assert not outside.any()


def test_overlap():
    a = square(torch.tensor([[0.5, 0.5]] * 3), torch.full((3, 1), 0.25))
    b = square(torch.tensor([[0.5, 0.5], [2.0, 0.5], [0.5, 0.5]]), torch.tensor([[0.25], [0.25], [0.125]]))
    torch.testing.assert_close(overlap(a, b), torch.tensor([1.0, 0.0, 0.25]))
