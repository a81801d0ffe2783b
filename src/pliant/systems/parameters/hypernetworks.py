"""HyperLSTM: a small LSTM scales the rows of a larger one's matrices at every step."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from pliant.core.site import Site
from pliant.execute.hyper import ScaledLSTM
from pliant.rules.place import Regressed
from pliant.scores.modulation import HyperCell


def hypernetworks(
    num_classes: int = 50,
    in_chans: int = 50,
    *,
    hidden: int = 128,
    hyper: int = 32,
    embedding: int = 8,
    dropout: float = 0.1,
) -> nn.Module:
    r"""A HyperLSTM over sequences, with a linear layer at every step: for a character model, both sizes are the alphabet's.

    .. math:: \mathrm{gate} = \mathrm{LN}(d_h(\hat h) \odot W_h h + d_x(\hat h) \odot W_x x + b(\hat h))

    where :math:`\hat h` is the small LSTM's state. Scales start at 0.1 and biases at 0. ``Always``, and the plain form, is the
    layer-norm LSTM. The static form, for kernels of a CNN, is :class:`pliant.execute.GrownConv2d`.

    Shape:
        sequences :math:`(R, \text{in\_chans}, T)`, characters one-hot; logits of every step :math:`(R, \text{num\_classes}, T)`.

    Args:
        num_classes: classes of a step.
        in_chans: numbers of a step.
        hidden: units of the LSTM.
        hyper: units of the small one, 128 in the paper.
        embedding: numbers that each scale vector is made from, 4 to 16 in the paper.
        dropout: of the candidates while training (recurrent dropout).

    Returns:
        The network; its site is visited once a step.

    >>> import torch
    >>> hypernetworks(5, 5, hidden=8, hyper=4, embedding=2)(torch.zeros(3, 5, 7)).shape
    torch.Size([3, 5, 7])

    References:
        Survey section 2.2.2 (1); Ha, Dai, Le, HyperNetworks, ICLR 2017.

    Differs from the paper: one layer; the small LSTM has no layer norm, and a quarter of the units unless told.
    """
    cell = HyperCell(in_chans + hidden, hidden, hidden=hyper, embedding=embedding)
    site = Site(cell, Regressed(), shape=(12, hidden))
    loop = ScaledLSTM(in_chans, hidden, site, dropout=dropout)
    return nn.Sequential(OrderedDict(loop=loop, head=nn.Conv1d(hidden, num_classes, 1)))
