"""PABEE: a text leaves the encoder once several classifiers in a row have said the same."""

from __future__ import annotations

from pliant.core.site import Site
from pliant.execute.exits import Exits
from pliant.rules.threshold import Threshold
from pliant.scores.confidence import Patience
from pliant.systems.encoder import Pooler, classifier, encoder


def pabee(
    num_classes: int = 2, words: int = 20_000, *, layers: int = 6, width: int = 64, heads: int = 4, length: int = 64,
    dropout: float = 0.1, patience: int = 3,
) -> Exits:  # fmt: skip
    r"""A text encoder with a classifier after each layer, on one shared pooler; a row leaves after :math:`t` agreements.

    .. math:: c_k = (c_{k-1} + 1) \cdot 1[\hat y_k = \hat y_{k-1}], \quad \text{leave at the first } k \text{ with } c_k = t

    Train all together with ``pliant.losses.MultiExit(by_depth(layers))``: the loss of classifier :math:`k` weighs :math:`k`. Another
    patience is bound at run time, ``pliant.bind(model, {"*": Patience(2)})``; with ``layers - 1`` or more everything runs. For
    regression build it with one class and bind ``Steady(patience, tau=...)``.

    Shape:
        word numbers :math:`(R, T)`, 0 for padding; logits :math:`(R, C)`.

    Args:
        num_classes: :math:`C`.
        words: size of the vocabulary.
        layers: of the transformer, and classifiers.
        width: of the hidden states.
        heads: of attention.
        length: the longest text, in words.
        dropout: in layers and before classifiers.
        patience: :math:`t`, at least 1; the earliest exit is after layer :math:`t + 1`.

    Returns:
        The chain; its sites are ``sites.k``.

    Raises:
        PliantError: where ``patience`` is below 1.

    >>> model = pabee(words=10, layers=4, width=8)
    >>> model.heads[0][0] is model.heads[3][0], len(model.sites)
    (True, 3)

    References:
        Survey sections 2.1.1 (1b) and 5.1.1; Zhou et al., BERT Loses Patience, NeurIPS 2020.

    Differs from the paper: a small encoder normalised before each sum and trained from scratch; each row of a batch has its own
    counter, where the released code serves one text at a time.
    """
    parts = encoder(num_classes, words, layers=layers, width=width, heads=heads, length=length, dropout=dropout)
    pooler = Pooler(width)
    ramps = [classifier(width, num_classes, pooler=pooler, dropout=dropout) for _ in parts.blocks]
    sites = [Site(Patience(patience), Threshold(0.0)) for _ in ramps[1:]]
    return Exits(parts.stages(range(1, layers)), ramps, sites)
