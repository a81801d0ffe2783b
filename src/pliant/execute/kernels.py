"""Soft decisions: numbers of each row adapt an operation's kernels, taps, channels or activation. Nothing is skipped.

These systems buy accuracy per FLOP: a row's numbers cost the same whatever they are, so the masked and the gathered form are one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.core.errors import PliantError
from pliant.core.executor import Executor
from pliant.core.site import Outcome, Site
from pliant.execute.regions import Look
from pliant.execute.skip import Carried
from pliant.functional.dynamic_conv import Geometry, conv_each, filter_each, mixed_conv2d


class Operation(nn.Module, ABC):
    """What numbers adapt. A value of ones is the static operation: what ``Always`` and the plain form run.

    ``maps`` is how many numbers each position has, where the decision has the map's size; None leaves its shape to the site.
    """

    maps: int | None = None

    @abstractmethod
    def forward(self, x: Tensor, value: Tensor) -> Tensor:
        """The operation on ``x``, adapted by ``value``, rows first."""

    @abstractmethod
    def static(self, x: Tensor) -> Tensor:
        """The same at ones."""


class Adapted(Executor):
    r"""Numbers decided for each row adapt an operation: :math:`y = f(x, v(x))`; the plain form is :math:`f(x, 1)`.

    Shape:
        ``x``: what the operation takes, seen by the site too, or a :class:`Look`: then the site reads ``x.seen``, and the
        answer is :class:`Carried` with the scorer's memory. ``given``: the numbers; a loop passes the number of its ``visit``.

    Args:
        site: decides, by a soft rule (:class:`pliant.rules.Sigmoid`, ``Softmax``, ``Regressed``) or any other.
        operation: an :class:`Operation`.

    >>> import pliant
    >>> site = pliant.Site(pliant.scores.Excitation(4), pliant.rules.Sigmoid(), shape=(4,))
    >>> attended = Adapted(site, Scaled())
    >>> attended(torch.ones(2, 4, 3, 3), given=torch.full((2, 4), 0.5)).mean()
    tensor(0.5000)

    References:
        Survey section 2.2; Yang et al., CondConv, NeurIPS 2019; Hu et al., Squeeze-and-Excitation Networks, CVPR 2018.
    """

    def __init__(self, site: Site, operation: Operation) -> None:
        super().__init__()
        self.site = site
        self.operation = operation
        self.maps = operation.maps

    def plain(self, x: Any) -> Any:
        """The static operation."""
        return Carried(self.operation.static(x.image), x.carry) if isinstance(x, Look) else self.operation.static(x)

    def masked(self, x: Any, given: Tensor | Outcome | None = None, visit: int | None = None) -> Any:
        """The same as gathered: other numbers cost the same."""
        return self.gathered(x, given=given, visit=visit)

    def gathered(self, x: Any, given: Tensor | Outcome | None = None, visit: int | None = None) -> Any:
        """Decide, then run by the numbers."""
        look = x if isinstance(x, Look) else Look(x, x)
        shape = None if self.maps is None else (self.maps, *look.image.shape[2:])
        decision = self.site(look.seen, given=given, carry=look.carry, visit=visit, shape=shape)
        y = self.operation(look.image, decision.value)
        return Carried(y, decision.carry) if isinstance(x, Look) else y


class Steps(Operation):
    """A chain under one decision: operations in it take the value, other modules don't see it.

    >>> Steps([Scaled(), nn.ReLU(), Scaled()])(torch.ones(1, 2, 1, 1), torch.tensor([[0.5, -1.0]])).flatten()
    tensor([0.2500, -0.0000])
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.chain = nn.ModuleList(modules)

    def forward(self, x: Tensor, value: Tensor) -> Tensor:
        """One after the other."""
        for module in self.chain:
            x = module(x, value) if isinstance(module, Operation) else module(x)
        return x

    def static(self, x: Tensor) -> Tensor:
        """The same at ones."""
        for module in self.chain:
            x = module.static(x) if isinstance(module, Operation) else module(x)
        return x


class MixedConv2d(Operation):
    r"""A convolution by a mixture of expert kernels: :math:`y_r = (\sum_e v_{re} W_e) * x_r + \sum_e v_{re} b_e`.

    Weights of 0 and 1 (``TopK``) choose experts, for the same FLOPs: one convolution, and mixing. At ones it's one static
    convolution by the sum of all experts.

    Shape:
        ``x`` :math:`(R, I, H, W)`, value :math:`(R, E)`; returns :math:`(R, O, H', W')`.

    Args:
        inputs: :math:`I`.
        outputs: :math:`O`.
        kernel: side.
        experts: :math:`E`.
        geometry: stride, padding, dilation, groups.
        bias: "experts" gives each a bias, "none" adds nothing.

    Raises:
        PliantError: where ``bias`` is something else, or there are no experts.

    >>> conv = MixedConv2d(4, 8, 3, experts=2, geometry=Geometry(padding=1))
    >>> conv(torch.zeros(2, 4, 5, 5), torch.ones(2, 2)).shape
    torch.Size([2, 8, 5, 5])

    References:
        Survey section 2.2.1 (1); Yang et al., CondConv, NeurIPS 2019.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *,
        experts: int = 8, geometry: Geometry = Geometry(), bias: str = "none",
    ) -> None:  # fmt: skip
        super().__init__()
        if experts < 1 or bias not in ("none", "experts"):
            raise PliantError(
                got=f"{experts} experts, bias={bias!r}", expected="at least 1, and 'none' or 'experts'",
                do="pass e.g. experts=8",
            )  # fmt: skip
        self.geometry = geometry
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs // geometry.groups, kernel, kernel))
        for expert in self.weight.unbind():  # each as a static kernel of its own
            nn.init.kaiming_normal_(expert.detach(), mode="fan_out", nonlinearity="relu")
        self.bias = nn.Parameter(torch.zeros(experts, outputs)) if bias == "experts" else None

    def extra_repr(self) -> str:
        """Sizes."""
        experts, outputs, inputs, kernel, _ = self.weight.shape
        return f"{inputs * self.geometry.groups}, {outputs}, {kernel}, experts={experts}, {self.geometry}"

    def forward(self, x: Tensor, value: Tensor) -> Tensor:
        """Convolved by each row's mixture."""
        return mixed_conv2d(x, value, self.weight, self.bias, geometry=self.geometry)

    def static(self, x: Tensor) -> Tensor:
        """One kernel, the sum of all experts."""
        bias = None if self.bias is None else self.bias.sum(0)
        return F.conv2d(x, self.weight.sum(0), bias, *self.geometry)


class GeneratedConv2d(Operation):
    r"""A convolution whose kernels are the decision: :math:`y_r = v_r * x_r`. At ones it sums each neighbourhood.

    Shape:
        ``x`` :math:`(R, I, H, W)`, value :math:`(R, O, I / g, k, k)`; returns :math:`(R, O, H', W')`.

    Args:
        geometry: stride, padding, dilation, groups.
        kernel: shape of a row's kernels, :math:`(O, I / g, k, k)`.

    >>> GeneratedConv2d((1, 1, 3, 3))(torch.ones(2, 1, 3, 3), torch.ones(2, 1, 1, 3, 3)).flatten()
    tensor([9., 9.])

    References:
        Survey section 2.2.2 (1); De Brabandere et al., Dynamic Filter Networks, NeurIPS 2016.
    """

    def __init__(self, kernel: tuple[int, int, int, int], *, geometry: Geometry = Geometry()) -> None:
        super().__init__()
        self.kernel = kernel
        self.geometry = geometry

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.kernel}, {self.geometry}"

    def forward(self, x: Tensor, value: Tensor) -> Tensor:
        """Convolved by each row's kernels."""
        return conv_each(x, value, geometry=self.geometry)

    def static(self, x: Tensor) -> Tensor:
        """Convolved by ones."""
        return F.conv2d(x, x.new_ones(self.kernel), None, *self.geometry)


class Filtered(Operation):
    r"""Taps of each position are the decision, alike for all channels: :math:`y_{cp} = \sum_k v_{kp}\, x_{c,\,p + p_k}`.

    With softmaxed taps each filter is a soft displacement of pixels. At ones it sums each neighbourhood.

    Shape:
        ``x`` :math:`(R, C, H, W)`, value :math:`(R, k^2, H, W)`; returns :math:`(R, C, H, W)`.

    Args:
        kernel: :math:`k`, odd.

    >>> Filtered(3).static(torch.ones(1, 1, 3, 3)).squeeze()[1]
    tensor([6., 9., 6.])

    References:
        Survey section 2.2.2 (1); De Brabandere et al., Dynamic Filter Networks, NeurIPS 2016.
    """

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.maps = kernel**2

    def extra_repr(self) -> str:
        """The side."""
        return str(self.kernel)

    def forward(self, x: Tensor, value: Tensor) -> Tensor:
        """Filtered by each position's taps."""
        return filter_each(x, value.unsqueeze(1), (self.kernel, self.kernel))

    def static(self, x: Tensor) -> Tensor:
        """Summed neighbourhoods."""
        return self(x, x.new_ones(()).expand(x.shape[0], self.kernel**2, *x.shape[2:]))


class Scaled(Operation):
    r"""A network's features times the decision: :math:`y = v \cdot f(x)`. At ones it's the network.

    Without a network the decision is taken from what it scales (squeeze-and-excitation, SPANet's graph A); with one, from the
    network's input (graph B).

    Shape:
        features :math:`(R, C, ...)`, value :math:`(R, C)` for channels, :math:`(R, 1, H, W)` for positions.

    Args:
        network: :math:`f`; default, the identity.

    >>> Scaled()(torch.ones(1, 2, 1, 1), torch.tensor([[0.5, 2.0]])).flatten()
    tensor([0.5000, 2.0000])

    References:
        Survey section 2.2.3 (1), Eqs. 9-10; Hu et al., CVPR 2018; Guo et al., SPANet, ICME 2020.
    """

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        self.network = nn.Identity() if network is None else network

    def forward(self, x: Tensor, value: Tensor) -> Tensor:
        """Scaled features."""
        y = self.network(x)
        return y * value.reshape(*value.shape, *[1] * (y.ndim - value.ndim))

    def static(self, x: Tensor) -> Tensor:
        """The features."""
        return self.network(x)


class ScaledPlaces(Scaled):
    """A network's features times a weight of each position, (R, 1, H, W); the network keeps the map's size.

    >>> ScaledPlaces()(torch.ones(1, 2, 1, 2), torch.tensor([0.5, 2.0]).reshape(1, 1, 1, 2)).flatten()
    tensor([0.5000, 2.0000, 0.5000, 2.0000])
    """

    maps = 1


class DynamicReLU(Operation):
    r"""The highest of :math:`K` lines whose slopes and heights are decided: :math:`y_c = \max_k (a_c^k x_c + b_c^k)`.

    .. math:: a^k = [k = 1] + \lambda_a (v_a^k - 1), \qquad b^k = \lambda_b (v_b^k - 1)

    so that at ones it's the ReLU, exactly.

    Shape:
        ``x`` :math:`(R, C, ...)`, value :math:`(R, C, 2K)`, or :math:`(R, 1, 2K)` for all channels alike: slopes, then heights.

    Args:
        lines: :math:`K`.
        slope: :math:`\lambda_a`.
        height: :math:`\lambda_b`.

    >>> relu = DynamicReLU()
    >>> relu(torch.tensor([[-2.0, 3.0]]), torch.ones(1, 1, 4))
    tensor([[0., 3.]])
    >>> relu(torch.tensor([[-2.0, 3.0]]), torch.tensor([[[1.0, 1.5, 1.0, 1.0]]]))  # the second line has slope 0.5
    tensor([[-1., 3.]])

    References:
        Survey section 2.2.3 (3); Chen et al., Dynamic ReLU, ECCV 2020.
    """

    def __init__(self, lines: int = 2, *, slope: float = 1.0, height: float = 0.5) -> None:
        super().__init__()
        self.lines, self.slope, self.height = lines, slope, height

    def extra_repr(self) -> str:
        """Lines and their range."""
        return f"lines={self.lines}, slope={self.slope}, height={self.height}"

    def forward(self, x: Tensor, value: Tensor) -> Tensor:
        """The highest line."""
        change = (value - 1).reshape(*value.shape, *[1] * (x.ndim - 2))
        slopes, heights = (self.slope * change[:, :, : self.lines], self.height * change[:, :, self.lines :])
        y = x * (slopes[:, :, 0] + 1) + heights[:, :, 0]
        for line in range(1, self.lines):
            y = torch.maximum(y, x * slopes[:, :, line] + heights[:, :, line])
        return y

    def static(self, x: Tensor) -> Tensor:
        """The ReLU."""
        return x.relu()
