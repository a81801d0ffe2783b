"""Saliency of a sequence's elements: how sure a light classifier is of each."""

from __future__ import annotations

from torch import Tensor, nn

from pliant.core.site import Score


class ElementSaliency(Score):
    r"""The largest class probability that a light network gives to each element: :math:`s_t = \max_c \mathrm{softmax}(g(x_t))_c`.

    Shape:
        ``x`` :math:`(R, T, ...)`; scores :math:`(R, T)`.

    Args:
        network: :math:`g`, from elements :math:`(N, ...)` to logits :math:`(N, C)`, a cheap one.

    >>> import torch
    >>> ElementSaliency(nn.Identity())(torch.tensor([[[0.0, 0.0], [9.0, 0.0]]])).round(decimals=2)
    tensor([[0.5000, 1.0000]])

    References:
        Survey section 4.2.2 (2); Korbar, Tran, Torresani, SCSampler, ICCV 2019.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def logits(self, x: Tensor) -> Tensor:
        """What the light network says of every element, (R, T, C): what it's trained by."""
        return self.network(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def forward(self, x: Tensor) -> Tensor:
        """Scores of every element of ``x``."""
        return self.logits(x).softmax(-1).amax(-1)
