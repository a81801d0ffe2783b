"""DeeBERT: an off-ramp after each transformer layer, trained on a frozen trunk, taken where entropy is low."""

from __future__ import annotations

from torch import nn

from pliant.core.site import Site
from pliant.execute.exits import Exits
from pliant.losses import MultiExit, Total
from pliant.rules.threshold import Threshold
from pliant.scores.confidence import Entropy
from pliant.systems.encoder import classifier, encoder
from pliant.train.phases import Phase


def deebert(
    num_classes: int = 2, words: int = 20_000, *, layers: int = 6, width: int = 64, heads: int = 4, length: int = 64,
    dropout: float = 0.1, threshold: float = 0.1,
) -> Exits:  # fmt: skip
    r"""A text encoder with an off-ramp (pooler, dropout, linear) after each layer; a row leaves where :math:`H(p_k) \le t`.

    Train with :func:`two_stages`. For a BERT of your own, ``pliant.retrofit.exits`` attaches the same from outside.

    Shape:
        word numbers :math:`(R, T)`, 0 for padding; logits :math:`(R, C)`.

    Args:
        num_classes: :math:`C`.
        words: size of the vocabulary.
        layers: of the transformer, and off-ramps.
        width: of the hidden states.
        heads: of attention.
        length: the longest text, in words.
        dropout: in layers and off-ramps.
        threshold: normalised entropy in [0, 1] at or below which a row leaves, the same at all; ``tune`` sets them.

    Returns:
        The chain; its sites are ``sites.k``, its off-ramps ``heads.k``, the last of which is the classifier.

    >>> model = deebert(words=10, layers=3, width=8)
    >>> len(model.sites), model.heads[0][0] is model.heads[2][0]
    (2, False)

    References:
        Survey sections 2.1.1 (1b) and 5.1.1; Xin et al., DeeBERT, ACL 2020.

    Differs from the paper: a small encoder normalised before each sum and trained from scratch, so each pooler normalises
    the token that it reads; entropy is divided by log C (multiply a threshold by log C to compare), and one that is just the
    threshold leaves, where the paper's must be below it; for classes, not for regression; whole batches are served,
    where the released code leaves its loop by an exception and serves one text at a time.
    """
    parts = encoder(num_classes, words, layers=layers, width=width, heads=heads, length=length, dropout=dropout)
    ramps: list[nn.Module] = [classifier(width, num_classes, dropout=dropout) for _ in parts.blocks[1:]]
    sites = [Site(Entropy(), Threshold(threshold)) for _ in ramps]
    return Exits(parts.stages(range(1, layers)), [*ramps, parts.head], sites)


def ramps_from_last(model: Exits) -> None:
    """Start every off-ramp's pooler as the trained classifier's: what stage 2 begins with."""
    trained = model.heads[-1].get_submodule("0").state_dict()
    for ramp in model.heads[:-1]:
        ramp.get_submodule("0").load_state_dict(trained)


def two_stages(model: Exits, *, epochs: int = 3, lr: float = 2e-5) -> tuple[list[Phase], list[Phase]]:
    """DeeBERT's training: the trunk with its last classifier; then, after :func:`ramps_from_last`, the off-ramps alone.

    Args:
        model: the chain.
        epochs: of each stage; 3 for BERT, 10 for RoBERTa.
        lr: of Adam; 2e-5 where the trunk was pre-trained.

    Returns:
        The phases of both stages, for ``pliant.train.fit`` in turn.

    >>> first, second = two_stages(deebert(words=10, layers=3, width=8))
    >>> first[0].name, second[0].train
    ('fine-tune', ('heads.*', '!heads.2.*'))
    """
    last = len(model.heads) - 1
    ramps = Total({"ramps": (1.0, MultiExit([1.0] * last + [0.0]))})
    trunk = Total({"task": (1.0, MultiExit([0.0] * last + [1.0]))})
    ours = tuple(f"!heads.{k}.*" for k in range(last))
    return (
        [Phase("fine-tune", epochs, optimizer="adamw", lr=lr, train=("*", *ours), loss=trunk)],
        [Phase("ramps", epochs, optimizer="adamw", lr=lr, train=("heads.*", f"!heads.{last}.*"), loss=ramps)],
    )
