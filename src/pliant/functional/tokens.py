"""Tokens: take some of each row's, and merge those that go into the most similar ones that stay."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def take(x: Tensor, index: Tensor) -> Tensor:
    r"""Of each row its tokens ``index``: :math:`y_{ij} = x_{i,\,\mathrm{index}_{ij}}`.

    Shape:
        ``x`` :math:`(R, T, ...)`; ``index`` :math:`(R, n)`, int64; returns :math:`(R, n, ...)`.

    >>> take(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([[2, 0], [1, 1]]))
    tensor([[3., 1.],
            [5., 5.]])
    """
    return x.gather(1, index.reshape(*index.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))


def merge(kept: Tensor, gone: Tensor, sizes: tuple[Tensor, Tensor], *, prefix: int) -> tuple[Tensor, Tensor]:
    r"""Each token that goes joins the most similar one that stays; what stays is the mean of all that it stands for.

    .. math:: j(i) = \arg\max_j \cos(g_i, k_j), \qquad k_j' = \frac{z_j k_j + \sum_{j(i) = j} z_i g_i}{z_j + \sum_{j(i) = j} z_i}

    A token that nobody joins stays bit by bit what it was, and so does one that only tokens of size 0 join.

    Shape:
        ``kept`` :math:`(R, n, D)`, ``gone`` :math:`(R, m, D)`; sizes :math:`(R, n)` and :math:`(R, m)`: how many tokens each
        stands for, 0 for padding. Returns the new ``kept`` and its sizes.

    Args:
        kept: tokens that stay; there must be one behind the first ``prefix``.
        gone: tokens that go.
        sizes: of both.
        prefix: so many of the first that stay are joined by nobody.

    >>> kept, gone = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[[0.0, 4.0]]])
    >>> merge(kept, gone, (torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0]])), prefix=0)
    (tensor([[[1., 0.],
             [0., 2.]]]), tensor([[1., 3.]]))

    References:
        Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023.
    """
    cosines = F.normalize(gone, dim=-1) @ F.normalize(kept[:, prefix:], dim=-1).mT
    joined = cosines.argmax(-1) + prefix
    whole = sizes[0].scatter_add(1, joined, sizes[1])
    weighted = gone * sizes[1].unsqueeze(-1)
    total = (kept * sizes[0].unsqueeze(-1)).scatter_add(1, joined.unsqueeze(-1).expand_as(weighted), weighted)
    alone = (whole == sizes[0]).unsqueeze(-1)
    return torch.where(alone, kept, total / torch.where(alone, 1.0, whole.unsqueeze(-1))), whole
