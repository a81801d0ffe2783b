"""Mass: how much each part of a layer is going to say, foretold from what the layer reads."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pliant.core.site import Score


class Mass(Score):
    r"""A linear forecast of how much each expert will add: :math:`s = W x + b`, token by token.

    ``pliant.retrofit.fit_routers`` fits it by least squares to what the experts do add.

    Shape:
        ``x`` :math:`(R, ..., D)`; scores :math:`(R, ..., E)`.

    Args:
        like: what is read; its last size, dtype and device are taken.
        outputs: :math:`E`.

    >>> import torch
    >>> Mass(torch.zeros(2, 5, 8), 4)(torch.zeros(2, 5, 8)).shape
    torch.Size([2, 5, 4])

    References:
        Survey section 2.1.2 (2); Zhang et al., MoEfication, ACL Findings 2022.

    Differs from the paper: linear, so it can be fitted in closed form.
    """

    def __init__(self, like: Tensor, outputs: int) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.linear = nn.Linear(self.read(like).shape[-1], outputs, **place)
        nn.init.normal_(self.linear.weight, std=1e-3)
        nn.init.zeros_(self.linear.bias)

    def read(self, x: Tensor) -> Tensor:
        """What the linear map reads of ``x``."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Forecasts."""
        return self.linear(self.read(x))


class ChannelMass(Mass):
    r"""A linear forecast of how much each channel of a convolution will say: :math:`s = W\,\mathrm{mean}_{hw}|x| + b`.

    Shape:
        maps :math:`(R, C, H, W)`; scores :math:`(R, O)`.

    Args:
        like: maps; their channels, dtype and device are taken.
        outputs: :math:`O`, channels or groups of them.

    >>> import torch
    >>> ChannelMass(torch.zeros(2, 8, 4, 4), 6)(torch.zeros(2, 8, 4, 4)).shape
    torch.Size([2, 6])

    References:
        Survey section 2.1.2 (3b); Gao et al., Dynamic Channel Pruning: Feature Boosting and Suppression, ICLR 2019.

    Differs from the paper: it chooses channels and doesn't scale them.
    """

    def read(self, x: Tensor) -> Tensor:
        """Means of absolute values, channel by channel."""
        return x.abs().mean((2, 3))
