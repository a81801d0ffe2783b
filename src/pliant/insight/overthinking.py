"""Over-thinking: what a multi-exit network knew early, and lost or repeated later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pliant.core.errors import PliantError
from pliant.core.trace import Trace


@dataclass(frozen=True)
class Overthinking:
    """Shares of all samples, in [0, 1].

    Args:
        accuracy: right at each exit, first to last.
        cumulative: right at that exit or an earlier one; the last entry bounds every exit rule from above.
        wasteful: right at an earlier exit and at the last one: the rest of the computation was for nothing.
        destructive: right at an earlier exit and wrong at the last one: the rest did harm.
        explained: the destructive share of the last exit's errors; NaN where it makes none.
    """

    accuracy: tuple[float, ...]
    cumulative: tuple[float, ...]
    wasteful: float
    destructive: float
    explained: float


def overthinking(predicted: Tensor, labels: Tensor) -> Overthinking:
    r"""How much a network over-thinks, from the predictions of all its exits.

    .. math::
        \text{wasteful} = \frac1N \sum_n [\exists k < E : \hat y_{kn} = y_n]\,[\hat y_{En} = y_n], \qquad
        \text{destructive} = \frac1N \sum_n [\exists k < E : \hat y_{kn} = y_n]\,[\hat y_{En} \ne y_n]

    Shape:
        E exits, N samples: ``predicted`` :math:`(E, N)`, ``labels`` :math:`(N,)`, both integer.

    Args:
        predicted: class of every sample at every exit, whether or not it would have left before; the last is the network's.
        labels: true classes.

    Returns:
        Accuracies per exit and the two rates.

    Raises:
        PliantError: for fewer than two exits, no samples, or shapes that don't fit.

    >>> found = overthinking(torch.tensor([[0, 1, 1, 0], [0, 0, 1, 0]]), torch.tensor([0, 1, 1, 1]))
    >>> found.accuracy, found.cumulative
    ((0.75, 0.5), (0.75, 0.75))
    >>> found.wasteful, found.destructive, found.explained
    (0.5, 0.25, 0.5)

    References:
        Survey section 6 (1); Kaya, Hong, Dumitras, Shallow-Deep Networks, ICML 2019, section 4.
    """
    if predicted.ndim != 2 or len(predicted) < 2 or labels.shape != predicted.shape[1:] or not labels.numel():
        raise PliantError(
            got=f"predictions of shape {tuple(predicted.shape)} for labels of shape {tuple(labels.shape)}",
            expected="(E, N) and (N,), with two exits and one sample at least",
            do="stack the predictions of all exits, the last exit last",
        )
    right = predicted == labels
    ever = right.cummax(0).values
    final, before = right[-1], ever[-2]
    wrong, samples = int((~final).sum()), labels.numel()
    lost = int((before & ~final).sum())
    return Overthinking(
        accuracy=tuple(n / samples for n in right.sum(1).tolist()),
        cumulative=tuple(n / samples for n in ever.sum(1).tolist()),
        wasteful=int((before & final).sum()) / samples,
        destructive=lost / samples,
        explained=lost / wrong if wrong else float("nan"),
    )


def confusion(logits: Tensor) -> Tensor:
    r"""How far a sample's exits disagree with the last one, before normalising.

    .. math:: c_n = \sum_{k < E} \lVert p_{kn} - p_{En} \rVert_1, \qquad p = \mathrm{softmax}(z)

    Shape:
        ``logits`` :math:`(E, N, C)`; scores :math:`(N,)` in :math:`[0, 2 (E - 1)]`.

    Args:
        logits: of all exits, the last exit last; see :func:`exit_logits`.

    Returns:
        Raw confusion of every sample; :class:`Confusion` makes it comparable between networks.

    Raises:
        PliantError: where ``logits`` isn't (E, N, C).

    >>> confusion(torch.tensor([[[9.0, -9.0]], [[-9.0, 9.0]], [[9.0, -9.0]]]))
    tensor([2.])

    References:
        Survey section 6 (1); Kaya, Hong, Dumitras, Shallow-Deep Networks, ICML 2019, section 4.3.
    """
    if logits.ndim != 3 or not len(logits):
        raise PliantError(
            got=f"logits of shape {tuple(logits.shape)}", expected="(E, N, C)", do="stack the logits of all exits"
        )
    p = logits.softmax(-1)
    return (p - p[-1]).abs().sum((0, 2))


@dataclass(frozen=True)
class Confusion:
    r"""Normalised confusion, :math:`(c - \mu) / \sigma`: how unusual a sample's disagreement is.

    High scores flag likely errors.

    Shape:
        ``logits`` :math:`(E, N, C)`; scores :math:`(N,)`, in standard deviations.

    Args:
        mean: :math:`\mu` of the raw scores of a reference set (the paper: the training set).
        std: :math:`\sigma` of the same, over N, positive.

    Returns:
        Called with logits: scores.

    Raises:
        PliantError: where ``std`` isn't positive.

    >>> logits = torch.tensor([[[1.0, 0.0], [2.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    >>> score = Confusion.of(logits)
    >>> score(logits).round(decimals=4)
    tensor([-1.,  1.])

    References:
        Survey section 6 (1); Kaya, Hong, Dumitras, Shallow-Deep Networks, ICML 2019, section 4.3.
    """

    mean: float
    std: float

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise PliantError(
                got=f"a standard deviation of {self.std}",
                expected="a positive one",
                do="take the statistics of samples on which the exits disagree unequally",
            )

    @classmethod
    def of(cls, logits: Tensor) -> Confusion:
        """The score normalised by the statistics of a reference set's ``logits``, (E, N, C)."""
        raw = confusion(logits).double()
        return cls(float(raw.mean()), float(raw.std(correction=0)))

    def __call__(self, logits: Tensor) -> Tensor:
        """Scores of ``logits``, (E, N, C)."""
        return (confusion(logits) - self.mean) / self.std


def exit_logits(traces: Sequence[Trace]) -> Tensor:
    r"""The logits of all exits for all rows, from calls in which every row went on to the end.

    Such calls are ``record(bind(model, {"*": Threshold(float("-inf"))}))(x)``, or any call of ``masked(model)``.

    Shape:
        Returns :math:`(E, N, C)`, N over all traces.

    Args:
        traces: one per batch, of one model.

    Returns:
        Detached logits.

    Raises:
        PliantError: where there are no traces, no exits, or rows left early.

    >>> import pliant
    >>> model = pliant.create_model("msdnet", num_classes=4, exits=3, base=1, step=1, channels=4).eval()
    >>> _, trace = pliant.record(pliant.masked(model))(torch.zeros(2, 3, 32, 32))
    >>> exit_logits([trace]).shape
    torch.Size([3, 2, 4])

    References:
        Kaya, Hong, Dumitras, Shallow-Deep Networks, ICML 2019: its diagnostics look at all exits, whoever left before.
    """
    if not traces or any(not t.exits or any(len(e.logits) != t.batch for e in t.exits) for t in traces):
        raise PliantError(
            got=f"{len(traces)} traces, some without exits or with rows that left early",
            expected="every exit's logits for every row",
            do='record pliant.masked(model), or pliant.bind(model, {"*": Threshold(float("-inf"))})',
        )
    return torch.cat([torch.stack([e.logits.detach() for e in t.exits]) for t in traces], 1)


def auroc(scores: Tensor, positive: Tensor) -> float:
    r"""Probability that a positive sample scores above a negative one, ties counting half.

    .. math:: P(s_+ > s_-) + \tfrac12 P(s_+ = s_-)

    Shape:
        both :math:`(N,)`.

    Args:
        scores: higher for more likely positive, in any units; no NaN.
        positive: bool, e.g. which samples the network got wrong.

    Returns:
        A number in [0, 1]; 0.5 is chance.

    Raises:
        PliantError: for NaN scores, or where either class is missing.

    >>> auroc(torch.tensor([0.9, 0.4, 0.4, 0.1]), torch.tensor([True, True, False, False]))
    0.875

    References:
        Mann and Whitney, 1947.
    """
    positive = positive.bool()
    ups, downs = int(positive.sum()), int((~positive).sum())
    if not ups or not downs or scores.shape != positive.shape or scores.isnan().any():
        raise PliantError(
            got=f"{ups} positive and {downs} negative samples for scores of shape {tuple(scores.shape)}",
            expected="at least one of each, one score each and no NaN",
            do="use a set on which the network makes both kinds of answers",
        )
    below = scores[~positive].sort().values
    own = scores[positive].contiguous()
    less, upto = torch.searchsorted(below, own), torch.searchsorted(below, own, right=True)
    return float((less + upto).sum()) / (2 * ups * downs)
