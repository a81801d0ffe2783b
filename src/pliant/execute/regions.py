"""Region: look at one part of each image, or at the whole one transformed, and run a network on what is seen there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pliant.core.errors import PliantError
from pliant.core.executor import Executor
from pliant.core.site import Outcome, Site
from pliant.execute.skip import Carried
from pliant.functional.crop import zoom
from pliant.functional.warp import affine, cells, projective, read, spline, spline_basis


class Look(NamedTuple):
    """An image to look at, what the place is decided from, and the scorer's memory of the looks before."""

    image: Tensor
    seen: Any
    carry: Any = None


class Frame(nn.Module, ABC):
    """How the numbers of a decision become what is seen; ``places`` of them for each row."""

    places: int

    @abstractmethod
    def forward(self, x: Tensor, value: Tensor) -> Tensor:
        """What of images ``x`` (R, C, H, W) is seen at ``value`` (R, places)."""


class Window(Frame):
    r"""A square of :math:`n` pixels at full resolution, its corner :math:`v` in shares of the way: 0 top or left, 1 bottom or right.

    Shape:
        images :math:`(R, C, H, W)` with :math:`H, W \ge n`; values :math:`(R, 2)` as (x, y); crops :math:`(R, C, n, n)`.

    Args:
        size: :math:`n`.

    Raises:
        PliantError: where an image is smaller than the window.

    >>> x = torch.arange(16.0).reshape(1, 1, 4, 4)
    >>> Window(2)(x, torch.tensor([[1.0, 0.5]])).squeeze()
    tensor([[ 6.,  7.],
            [10., 11.]])

    References:
        Survey section 3.2.2; Wang et al., Glance and Focus, NeurIPS 2020.
    """

    places = 2

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def extra_repr(self) -> str:
        """The side."""
        return f"size={self.size}"

    def forward(self, x: Tensor, value: Tensor) -> Tensor:
        """The crops; differentiable by image and place."""
        height, width = x.shape[-2:]
        if min(height, width) < self.size:
            raise PliantError(
                got=f"images of {height} by {width}", expected=f"at least {self.size} by {self.size}",
                do="pass larger images, or build the model with a smaller window",
            )  # fmt: skip
        share = torch.tensor([self.size / width, self.size / height], device=value.device, dtype=value.dtype)
        corner = value * (1 - share)
        return zoom(x, torch.cat([corner, corner + share], 1), self.size, self.size)


class Warp(Frame):
    """A transform of the image, resampled on ``size`` by ``size`` cells (None: as many as there were).

    A value is 1 more than how far its number is from the identity's, so that ones leave the image as it is.
    """

    def __init__(self, size: int | None = None) -> None:
        super().__init__()
        self.size = size

    def extra_repr(self) -> str:
        """The side of the output."""
        return f"size={self.size}"

    def forward(self, x: Tensor, value: Tensor) -> Tensor:
        """The transformed images."""
        height, width = x.shape[-2:] if self.size is None else (self.size, self.size)
        places = cells(height, width, value)
        return read(x, self.sources(places, value - 1), height, width)

    @abstractmethod
    def sources(self, places: Tensor, change: Tensor) -> Tensor:
        """Where the output's ``places`` (P, 2) are read from, (R, P, 2), at this ``change`` from the identity."""


class Attention(Warp):
    r"""Scale and shift: :math:`\theta = [[s, 0, t_x], [0, s, t_y]]`, decided as :math:`(s, t_x + 1, t_y + 1)`.

    >>> Attention(1)(torch.arange(4.0).reshape(1, 1, 2, 2), torch.tensor([[1.0, 1.5, 0.5]])).squeeze()
    tensor(1.)

    References:
        Survey section 3.2.1; Jaderberg et al., NIPS 2015.
    """

    places = 3

    def sources(self, places: Tensor, change: Tensor) -> Tensor:
        """Scaled and shifted."""
        scale, shift = change[:, None, :1] + 1, change[:, None, 1:]
        return scale * places + shift


class Affine(Warp):
    r"""Any affine transform, decided as :math:`\theta - I + 1`, six numbers row by row.

    >>> x = torch.arange(4.0).reshape(1, 1, 2, 2)
    >>> Affine()(x, torch.ones(1, 6)).squeeze()
    tensor([[0., 1.],
            [2., 3.]])

    References:
        Survey section 3.2.1; Jaderberg et al., NIPS 2015.
    """

    places = 6

    def sources(self, places: Tensor, change: Tensor) -> Tensor:
        """Through a 2x3 matrix."""
        return affine(places, change.unflatten(1, (2, 3)) + torch.eye(2, 3, device=change.device, dtype=change.dtype))


class Projective(Warp):
    r"""A homography with :math:`H_{33} = 1`, decided as :math:`H - I + 1`, eight numbers row by row.

    >>> x = torch.arange(4.0).reshape(1, 1, 2, 2)
    >>> Projective()(x, torch.ones(1, 8)).squeeze()
    tensor([[0., 1.],
            [2., 3.]])

    References:
        Survey section 3.2.1; Jaderberg et al., NIPS 2015.
    """

    places = 8

    def sources(self, places: Tensor, change: Tensor) -> Tensor:
        """Through a 3x3 matrix."""
        square = torch.cat([change, torch.zeros_like(change[:, :1])], 1).unflatten(1, (3, 3))
        return projective(places, square + torch.eye(3, device=change.device, dtype=change.dtype))


class ThinPlate(Warp):
    r"""A thin plate spline through ``side`` by ``side`` knots, decided as 1 plus each knot's shift in x and y.

    Args:
        size: of the output.
        side: knots per side; the paper has 4.

    Raises:
        PliantError: where there are fewer than 2 knots per side.

    >>> x = torch.arange(4.0).reshape(1, 1, 2, 2)
    >>> ThinPlate()(x, torch.ones(1, 32)).squeeze().round(decimals=3)
    tensor([[0., 1.],
            [2., 3.]])

    References:
        Survey section 3.2.1; Jaderberg et al., NIPS 2015.
    """

    knots: Tensor
    basis: Tensor

    def __init__(self, size: int | None = None, *, side: int = 4) -> None:
        super().__init__(size)
        if side < 2:
            raise PliantError(got=f"{side} knots per side", expected="at least 2", do="pass side=4 as the paper has it")
        self.places = 2 * side * side
        line = torch.linspace(-1, 1, side)
        knots = torch.cartesian_prod(line, line).flip(1)
        self.register_buffer("knots", knots)
        self.register_buffer("basis", spline_basis(knots))

    def sources(self, places: Tensor, change: Tensor) -> Tensor:
        """Through the spline of the shifted knots."""
        to = self.knots + change.unflatten(1, (-1, 2))
        return spline(places, self.knots, self.basis @ to)


class Region(Executor):
    r"""Decide for each row where to look, and run a network on what is seen: :math:`y = f(\mathrm{frame}(x, v))`.

    The value is the place or the transform itself, a number in place of a choice; wherever it lies, looking costs the same. So
    the masked and the gathered form are one, and ``Always``, which is also the plain form, looks at :math:`v = 1`: the window in
    the bottom right corner, the image that isn't transformed.

    Shape:
        ``x``: images :math:`(R, C, H, W)` that the site reads too, or a :class:`Look`: then the site reads ``x.seen``, and the
        answer is :class:`Carried` with the scorer's memory. ``given``: :math:`(R, P)`.

    Args:
        site: decides :math:`P` numbers for each row, with ``shape=(P,)``.
        frame: what is seen there.
        network: runs on it.

    Raises:
        PliantError: where the site's shape isn't the frame's.

    >>> import pliant
    >>> site = pliant.Site(nn.Identity(), pliant.rules.Never(), shape=(2,))
    >>> Region(site, Window(1), nn.Flatten())(torch.arange(4.0).reshape(1, 1, 2, 2))
    tensor([[0.]])

    References:
        Survey sections 3.2.1 and 3.2.2; Jaderberg et al., NIPS 2015; Mnih et al., NeurIPS 2014.
    """

    def __init__(self, site: Site, frame: Frame, network: nn.Module) -> None:
        super().__init__()
        if site.shape != (frame.places,):
            raise PliantError(
                got=f"a site of shape {site.shape} for a {type(frame).__name__}", expected=f"({frame.places},)",
                do="make the site with shape=(frame.places,)",
            )  # fmt: skip
        self.site = site
        self.frame = frame
        self.network = network

    def plain(self, x: Any) -> Any:
        """The network on what is seen at 1."""
        image = x.image if isinstance(x, Look) else x
        seen = self.network(self.frame(image, image.new_ones(image.shape[0], self.frame.places)))
        return Carried(seen, x.carry) if isinstance(x, Look) else seen

    def masked(self, x: Any, given: Tensor | Outcome | None = None) -> Any:
        """The same as gathered: there's nothing that another place would compute."""
        return self.gathered(x, given=given)

    def gathered(self, x: Any, given: Tensor | Outcome | None = None) -> Any:
        """Decide, look, run."""
        look = x if isinstance(x, Look) else Look(x, x)
        decision = self.site(look.seen, given=given, carry=look.carry)
        y = self.network(self.frame(look.image, decision.value))
        return Carried(y, decision.carry) if isinstance(x, Look) else y
