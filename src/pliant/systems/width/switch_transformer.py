"""Switch Transformer: in every other layer each token runs one expert, as long as that has room."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from pliant.core.site import Site
from pliant.execute.experts import Experts
from pliant.rules.experts import Switch
from pliant.scores.experts import Router
from pliant.systems.language import CausalLayer, NextSymbol, Symbols, feed_forward


def switch(width: int, hidden: int, *, experts: int, capacity: float, jitter: float, dropout: float) -> Experts:
    """Expert networks under a router that sends each token to one, weights drawn at a tenth of the usual scale.

    >>> switch(4, 8, experts=2, capacity=1.25, jitter=0.0, dropout=0.1).site.rule
    Switch(capacity=1.25, serving=2.0)
    """
    networks = [feed_forward(width, hidden, dropout=dropout) for _ in range(experts)]
    for layer in (m for network in networks for m in network if isinstance(m, nn.Linear)):
        nn.init.trunc_normal_(layer.weight, std=(0.1 / layer.in_features) ** 0.5)
        nn.init.zeros_(layer.bias)
    return Experts(networks, Site(Router(width, experts, jitter=jitter), Switch(capacity=capacity), shape=(experts,)))


def switch_transformer(
    num_classes: int = 64, *, words: int | None = None, layers: int = 4, width: int = 64, heads: int = 4, experts: int = 8,
    length: int = 128, capacity: float = 1.25, jitter: float = 0.01, dropout: float = 0.1,
) -> nn.Sequential:  # fmt: skip
    r"""A language model with experts in every other layer; of each token's only one runs.

    .. math:: p = \mathrm{softmax}(x W_r), \quad y = x + p_i(x)\, E_i(x), \quad i = \arg\max p

    Train with the task's loss and ``pliant.losses.SwitchBalance()`` at weight 0.01. A token that its expert has no room for
    (more than ``capacity`` times its share, twice in evaluation) passes by.

    Shape:
        symbols :math:`(R, T)`, integers; logits of the next one at every step :math:`(R, \text{num\_classes}, T)`.

    Args:
        num_classes: size of the alphabet that is predicted.
        words: symbols that are read; default, as many.
        layers: of the transformer; the second, fourth ... have experts.
        width: of the hidden states; feed-forward parts and experts have four times as many units.
        heads: of attention.
        experts: in each layer that has them.
        length: the longest text.
        capacity: factor while training.
        jitter: of the router's input while training.
        dropout: on what is added, and inside feed-forward parts.

    Returns:
        The network; its sites are ``layers.1.feed.site`` and so on.

    Raises:
        PliantError: where a factor isn't above 0, or the width can't be shared among the heads.

    >>> import torch
    >>> switch_transformer(9, layers=2, width=8, heads=2, experts=3)(torch.ones(2, 5, dtype=torch.int64)).shape
    torch.Size([2, 9, 5])

    References:
        Survey section 2.1.2 (2); Fedus et al., Switch Transformers, JMLR 2022.

    Differs from the paper: a decoder of characters with layers normalised before, in place of T5; an expert's room is counted in
    each text anew, so that no answer hangs on its neighbours in the batch; routers and experts alone start at a tenth of the usual
    scale, experts have no dropout rate of their own, and the balance of several layers is averaged.
    """

    def feed(index: int) -> nn.Module:
        if index % 2 == 0:
            return feed_forward(width, 4 * width, dropout=dropout)
        return switch(width, 4 * width, experts=experts, capacity=capacity, jitter=jitter, dropout=dropout)

    chain = [CausalLayer(width, heads=heads, feed=feed(index), dropout=dropout) for index in range(layers)]
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        embed=Symbols(words or num_classes, width, length=length),
        layers=nn.Sequential(*chain),
        head=NextSymbol(width, num_classes),
    )
    return nn.Sequential(parts)
