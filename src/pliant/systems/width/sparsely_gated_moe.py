"""The sparsely-gated mixture of experts between two LSTM layers of a language model."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from pliant.core.site import Site
from pliant.execute.experts import Experts
from pliant.rules.experts import TopKSoftmax
from pliant.scores.experts import NoisyRouter
from pliant.systems.language import Added, NextSymbol, Recurrent, feed_forward


def mixture(width: int, hidden: int, *, experts: int, k: int) -> Experts:
    """Expert networks of one hidden layer under noisy top-k gates, which start equal.

    >>> mixture(4, 8, experts=3, k=2).site.rule
    TopKSoftmax(k=2, dims=1)
    """
    site = Site(NoisyRouter(width, experts), TopKSoftmax(k), shape=(experts,))
    return Experts([feed_forward(width, hidden) for _ in range(experts)], site)


def sparsely_gated_moe(
    num_classes: int = 64, *, words: int | None = None, width: int = 64, hidden: int = 64, experts: int = 16, k: int = 2,
    dropout: float = 0.1,
) -> nn.Sequential:  # fmt: skip
    r"""A language model whose capacity lies in experts of which every symbol runs :math:`k`.

    .. math:: G(x) = \mathrm{softmax}(\mathrm{top}_k(x W_g + \varepsilon\,\mathrm{softplus}(x W_n))), \qquad
              y = x + \sigma\Big(\sum_{e:\, G_e > 0} G_e(x)\, E_e(x)\Big)

    Train with the task's loss, ``pliant.losses.Importance()`` and ``Load(k)``, each at weight 0.1: else a few experts get it all.

    Shape:
        symbols :math:`(R, T)`, integers; logits of the next one at every step :math:`(R, \text{num\_classes}, T)`.

    Args:
        num_classes: size of the alphabet that is predicted.
        words: symbols that are read; default, as many.
        width: of vectors and LSTM states.
        hidden: units of each expert.
        experts: how many there are.
        k: how many a symbol runs; 4 in the paper's flat form.
        dropout: behind each layer.

    Returns:
        The network; its one site is ``mixture.part.site``.

    Raises:
        PliantError: where :math:`k` is negative; at the call, where there are fewer experts.

    >>> import torch
    >>> sparsely_gated_moe(9, width=8, hidden=4, experts=3)(torch.ones(2, 5, dtype=torch.int64)).shape
    torch.Size([2, 9, 5])

    References:
        Survey section 2.1.2 (2), Fig. 5 (b); Shazeer et al., Sparsely-Gated Mixture-of-Experts, ICLR 2017.

    Differs from the paper: a layer norm before the logits; the mixture alone has a shortcut, the LSTM layers have none; the
    hierarchical form (a mixture of mixtures) is two of these executors, one inside the other, and not built here.
    """
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        embed=nn.Embedding(words or num_classes, width),
        first=Recurrent(width, width, dropout=dropout),
        mixture=Added(mixture(width, hidden, experts=experts, k=k), dropout=dropout),
        second=Recurrent(width, width, dropout=dropout),
        head=NextSymbol(width, num_classes),
    )
    return nn.Sequential(parts)
