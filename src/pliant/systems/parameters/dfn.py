"""Dynamic filter network: the next frame is the last one under filters that a network makes for every pixel."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.core.errors import PliantError
from pliant.core.site import Score, Site
from pliant.execute.kernels import Adapted, Filtered
from pliant.execute.regions import Look
from pliant.rules.soft import Softmax


def _convs(*widths: int) -> list[nn.Module]:
    """3x3 convolutions, rectified."""
    return [m for a, b in pairwise(widths) for m in (nn.Conv2d(a, b, 3, padding=1), nn.LeakyReLU(0.1))]


class FilterNet(Score):
    """Filters of every pixel from a frame and a map that remembers the frames before: encoder, memory, decoder."""

    def __init__(self, taps: int, widths: Sequence[int]) -> None:
        super().__init__()
        narrow, wide, memory = widths
        half = nn.Conv2d(narrow, narrow, 3, stride=2, padding=1)
        self.encoder = nn.Sequential(
            *_convs(1, narrow), half, nn.LeakyReLU(0.1), *_convs(narrow, wide, wide), *_convs(wide, memory)
        )
        self.memory = nn.Sequential(*_convs(memory, memory, memory))
        self.decoder = nn.Sequential(*_convs(memory, wide, wide))
        self.refine = nn.Sequential(*_convs(wide, wide, wide), nn.Conv2d(wide, memory, 1), nn.LeakyReLU(0.1))
        self.taps = nn.Conv2d(memory, taps, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the taps of a first frame."""
        return self.step(x, None)[0]

    def step(self, x: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits after the frames that ``carry`` remembers."""
        seen = self.encoder(x)
        hidden = seen if carry is None else seen + self.memory(carry)
        up = F.interpolate(self.decoder(hidden), size=x.shape[2:])
        return self.taps(self.refine(up)), hidden


class Predictor(nn.Module):
    """Filters frame after frame; what it made of the last one is the first that it predicts, and is fed back."""

    def __init__(self, filter: Adapted, frames: int) -> None:
        super().__init__()
        self.filter = filter
        self.frames = frames

    def forward(self, x: Tensor) -> Tensor:
        """The frames (R, frames, H, W) that follow those of ``x`` (R, T, H, W)."""
        seen, carry, made = x.shape[1], None, []
        for t in range(seen + self.frames - 1):
            frame = x[:, t : t + 1] if t < seen else made[-1]
            y, carry = self.filter(Look(frame, frame, carry), visit=t)
            made.append(y)
        return torch.cat(made[seen - 1 :], 1)


def dfn(
    num_classes: int = 10, in_chans: int = 10, *, kernel: int = 9, widths: Sequence[int] = (32, 64, 128)
) -> nn.Module:
    r"""Predicts frames: each pixel of the next one is a weighted mean of the last one's pixels near it.

    .. math:: y_p = \sum_k v_{kp}\, x_{p + p_k}, \qquad v = \mathrm{softmax}_k(\mathrm{net}(x, h))

    so that a filter is a soft displacement. The network has a memory :math:`h` of the frames before; its predictions are fed
    back. ``Always``, and the plain form, sums each pixel's neighbourhood.

    Shape:
        frames :math:`(R, \text{in\_chans}, H, W)`, oldest first; the next ones :math:`(R, \text{num\_classes}, H, W)`.

    Args:
        num_classes: frames that are predicted.
        in_chans: frames that are seen.
        kernel: side of the filters, odd.
        widths: channels of encoder and decoder, and of the memory.

    Returns:
        The predictor; its site is visited once for each frame but the last.

    Raises:
        PliantError: where the kernel is even, or no frame is seen or predicted.

    >>> dfn(2, 3, kernel=3, widths=(2, 4, 8))(torch.rand(5, 3, 8, 8)).shape
    torch.Size([5, 2, 8, 8])

    References:
        Survey section 2.2.2 (1); De Brabandere, Jia, Tuytelaars, Van Gool, Dynamic Filter Networks, NeurIPS 2016.

    Differs from the paper: neither a refining network behind the filter nor a dynamic bias. Filters for a whole image are
    :class:`pliant.execute.GeneratedConv2d`.
    """
    if kernel % 2 == 0 or num_classes < 1 or in_chans < 1:
        raise PliantError(
            got=f"kernel={kernel}, {in_chans} frames to {num_classes}", expected="an odd kernel, at least one frame",
            do="pass e.g. kernel=9",
        )  # fmt: skip
    site = Site(FilterNet(kernel**2, widths), Softmax())
    return Predictor(Adapted(site, Filtered(kernel)), num_classes)
