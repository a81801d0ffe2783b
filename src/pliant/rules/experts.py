"""Rules that choose experts: the k best gates share 1, or the best one alone with its probability."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pliant.core.errors import PliantError
from pliant.core.site import Outcome, Rule
from pliant.functional.dispatch import within_capacity
from pliant.rules.topk import TopK


class TopKSoftmax(TopK):
    r"""Gates of the k best experts, a softmax over their scores; the others are exactly 0.

    .. math:: v_i = \frac{e^{s_i}}{\sum_{j \in K} e^{s_j}}\ (i \in K), \qquad K = \text{the } k \text{ largest of } s

    Shape:
        scores :math:`(R, ..., E)`; the value has the same shape, with :math:`k` weights that sum to 1.

    Args:
        k: how many experts run.

    Raises:
        PliantError: as for :class:`TopK`.

    >>> TopKSoftmax(2)(torch.tensor([[0.0, 1.0, 1.0]])).value
    tensor([[0.0000, 0.5000, 0.5000]])

    References:
        Survey section 2.1.2 (2); Shazeer et al., Sparsely-Gated Mixture-of-Experts, ICLR 2017.
    """

    def __init__(self, k: int) -> None:
        super().__init__(k)

    def forward(self, scores: Tensor) -> Outcome:
        """Weights of ``scores``."""
        kept = super().forward(scores).value != 0
        value = scores.masked_fill(~kept, -math.inf).softmax(-1)
        return Outcome(value if self.count(scores.shape[-1]) else torch.zeros_like(scores), weight=True)


class Switch(Rule):
    r"""Each token's best expert alone, weighed by its probability, as long as that expert has room.

    .. math:: v_{te} = p_{te} \cdot 1[e = \arg\max p_t] \cdot 1[\text{at most } C \text{ tokens before and with } t \text{ chose } e],
        \qquad C = \lceil c\,T / E \rceil

    The factor :math:`p` gives the router its gradient. A token beyond the capacity is taken by nobody.

    Shape:
        scores :math:`(R, T, E)`; the value has the same shape.

    Args:
        capacity: :math:`c`, the capacity factor while training; each expert has its room in every row anew.
        serving: the factor in evaluation; infinity drops nobody.

    Raises:
        PliantError: where a factor isn't above 0, or the scores have no tokens.

    >>> rule = Switch(capacity=1.0)
    >>> rule.train()(torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])).value
    tensor([[[0.7311, 0.0000],
             [0.0000, 0.0000]]])

    References:
        Survey section 2.1.2 (2); Fedus et al., Switch Transformers, JMLR 2022.

    Differs from the paper: capacity is counted within a row, in token order, and not over the batch, so that a row's answer
    doesn't hang on its neighbours.
    """

    def __init__(self, *, capacity: float = 1.25, serving: float = 2.0) -> None:
        super().__init__()
        if not capacity > 0 or not serving > 0:
            raise PliantError(
                got=f"capacity={capacity}, serving={serving}", expected="factors above 0", do="pass e.g. 1.25 and 2"
            )
        self.capacity, self.serving = capacity, serving

    def extra_repr(self) -> str:
        """The factors."""
        return f"capacity={self.capacity}, serving={self.serving}"

    def forward(self, scores: Tensor) -> Outcome:
        """One gate for each token, or none."""
        if scores.ndim != 3:
            raise PliantError(
                got=f"scores of shape {tuple(scores.shape)}", expected="(rows, tokens, experts)",
                do="use TopKSoftmax where there are no tokens",
            )  # fmt: skip
        tokens, experts = scores.shape[1:]
        p = scores.softmax(-1)
        best = torch.zeros_like(p).scatter(-1, p.argmax(-1, keepdim=True), 1.0)
        factor = self.capacity if self.training else self.serving
        if factor * tokens / experts < tokens:
            best = within_capacity(best != 0, math.ceil(factor * tokens / experts)).to(p.dtype)
        return Outcome(torch.where(best != 0, p, torch.zeros_like(p)), weight=True)
