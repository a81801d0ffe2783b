"""Inline subnetwork collaboration: an exit also reads what the exit before it said."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pliant.core.errors import PliantError
from pliant.execute.exits import Exits
from pliant.execute.heads import Linked


class InlineHead(Linked):
    r"""A head with one more input, the logits of the exit before it.

    .. math:: f_k = W h_k(x) + b + V\, \mathrm{relu}(\mathrm{norm}(U f_{k-1} + c))

    with :math:`h_k` the pooled features that the head's linear layer :math:`W, b` reads. :math:`V` starts at 0, so that the
    head begins as the one it was made of.

    Shape:
        features: what the head takes, rows first; ``before`` and the logits: :math:`(R, C)`.

    Args:
        head: a classifier whose last layer is its attribute ``linear``; it's taken over, not copied.

    Returns:
        Logits.

    Raises:
        PliantError: where the head has no such layer.

    >>> import torch
    >>> from pliant.execute.heads import PooledClassifier
    >>> InlineHead(PooledClassifier(8, 10))(torch.zeros(2, 8, 4, 4), torch.zeros(2, 10)).shape
    torch.Size([2, 10])

    References:
        Survey section 5.2.1 (1); Li et al., Improved Techniques for Training Adaptive Deep Networks, ICCV 2019.

    Differs from the paper: its one linear layer on the concatenation stands here as two that are added, which is the same
    function and leaves the first one to be trained before; the second starts at 0 rather than at random.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        linear = getattr(head, "linear", None)
        if isinstance(head, Linked) or not isinstance(linear, nn.Linear):
            raise PliantError(
                got=f"a {type(head).__name__}",
                expected="a head that reads its stage alone, whose last layer is its attribute 'linear'",
                do="use PooledClassifier, or a head with such a layer",
            )
        width, classes = linear.in_features, linear.out_features
        self.features = head
        self.features.linear = nn.Identity()
        self.linear = linear
        self.transfer = nn.Sequential(nn.Linear(classes, width), nn.BatchNorm1d(width), nn.ReLU())
        self.inline = nn.Linear(width, classes, bias=False)
        nn.init.zeros_(self.inline.weight)

    def forward(self, x: Any, before: Tensor) -> Tensor:
        """Logits from own features and earlier logits."""
        return self.linear(self.features(x)) + self.inline(self.transfer(before))


def collaborative(model: Exits) -> Exits:
    r"""A chain of the same stages, sites and first head, in which every later head reads the logits of the one before it.

    The previous exit has always run already, so the only cost is that of two small linear layers per exit.

    Args:
        model: a chain of exits; its parts are taken over, not copied, and its later heads are changed.

    Returns:
        The new chain, which answers as the old one did until it's trained.

    Raises:
        PliantError: where a later head's last layer isn't its attribute ``linear``, or it's linked already.

    >>> import pliant
    >>> chain = pliant.create_model("msdnet", num_classes=4, exits=3, base=1, step=1, channels=4)
    >>> [type(head).__name__ for head in collaborative(chain).heads]
    ['Classifier', 'InlineHead', 'InlineHead']

    References:
        Survey section 5.2.1 (1); Li et al., ICCV 2019.
    """
    first, *later = model.heads
    sites: list[Any] = list(model.sites)
    made = Exits(list(model.stages), [first, *map(InlineHead, later)], sites, answer=model.answer, view=model.view)
    made.form = model.form
    return made.train(model.training)
