"""Distillation between the exits of one recorded call, and from a teacher outside of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.core.errors import PliantError
from pliant.core.trace import Exit, Trace
from pliant.losses.exits import Weights, weights_of
from pliant.losses.further import Further, Other, dense

Teachers = Callable[[Trace], Sequence[Exit | None]]
"""From a trace to the teacher of each exit; an exit without one learns from the labels alone."""
Trust = Callable[[Tensor, Tensor], Tensor]
"""From a teacher's logits and the labels to how much each row is taught, in [0, 1]."""


def kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Distillation loss of each row, :math:`T^2\,\mathrm{KL}(\mathrm{softmax}(t / T) \,\|\, \mathrm{softmax}(s / T))`.

    Shape:
        ``teacher`` and ``student``: :math:`(R, C)`; returns :math:`(R,)`, in nats.

    Args:
        teacher: logits; no gradient reaches them.
        student: logits.
        temperature: :math:`T > 0`.

    Returns:
        One loss per row, summed over classes: a mean over elements, as released code has it, is :math:`C` times smaller.

    >>> kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])).round(decimals=4)
    tensor([0.4338])

    References:
        Survey section 5.2.1 (3); Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015.
    """
    wanted = (teacher.detach() / temperature).log_softmax(-1)
    got = (student / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(got, wanted, reduction="none", log_target=True).sum(-1)


def last_exit(trace: Trace) -> list[Exit | None]:
    """The last exit teaches all others (one for all)."""
    return [*[trace.exits[-1]] * (len(trace.exits) - 1), None]


def next_exit(trace: Trace) -> list[Exit | None]:
    """Every exit is taught by the one behind it."""
    return [*trace.exits[1:], None]


def previous_exit(trace: Trace) -> list[Exit | None]:
    """Every exit is taught by the one before it."""
    return [None, *trace.exits[:-1]]


def everywhere(teacher: Tensor, target: Tensor) -> Tensor:
    """Every row is taught."""
    return torch.ones_like(teacher[:, 0])


def where_right(teacher: Tensor, target: Tensor) -> Tensor:
    """Only rows about which the teacher is right."""
    return (teacher.argmax(-1) == target).to(teacher.dtype)


class OneForAll:
    r"""One-for-all distillation: exits with a teacher learn from the labels and from it, the others from the labels.

    .. math:: L = \mathrm{CE}(z_K, y) + \sum_{k < K} w_k \big[ (1 - \gamma)\,\mathrm{CE}(z_k, y)
              + \gamma T^2\,\mathrm{KL}(p_K^T \,\|\, p_k^T) \big]

    Each exit's part is the mean over the rows that reached it; a row that its teacher never saw learns from its label.

    Args:
        gamma: :math:`\gamma` in [0, 1]; at 0 this is :class:`MultiExit` exactly.
        temperature: :math:`T > 0`.
        teachers: who teaches whom: :func:`last_exit`, :func:`next_exit` or :func:`previous_exit`; no gradient reaches a
            teacher.
        trust: which rows are taught: :func:`everywhere` or :func:`where_right`.
        weights: as in :class:`MultiExit`.

    Raises:
        PliantError: where gamma or the temperature is outside its range, or weights and exits don't fit.

    >>> trace = Trace({}, (Exit(torch.zeros(2, 4)), Exit(torch.zeros(2, 4))), (), 2)
    >>> OneForAll(gamma=0.5)(torch.zeros(2, 4), trace, torch.tensor([0, 1]), 0.0)
    tensor(2.0794)

    References:
        Survey section 5.2.1 (1); Li et al., Improved Techniques for Training Adaptive Deep Networks, ICCV 2019.

    Differs from the paper: the KL is summed over classes (its released code averages over them too). The teacher is the
    live last exit; the released code's frozen one is :class:`TaughtExits` with ``frozen(network)``.
    """

    def __init__(
        self, *, gamma: float = 0.9, temperature: float = 3.0, teachers: Teachers = last_exit, trust: Trust = everywhere,
        weights: Weights = None,
    ) -> None:  # fmt: skip
        check(gamma, temperature)
        self.gamma, self.temperature, self.teachers, self.trust, self.weights = (
            gamma, temperature, teachers, trust, weights,
        )  # fmt: skip

    def __call__(self, y: Tensor, trace: Trace, target: Tensor, progress: float) -> Tensor:
        """The sum over exits, in nats."""
        return self.taught(trace, self.teachers(trace), target, progress)

    def taught(self, trace: Trace, teachers: Sequence[Exit | None], target: Tensor, progress: float) -> Tensor:
        """The same with the teachers given."""
        weights = weights_of(self.weights, progress, trace)
        parts: list[Tensor] = []
        for student, teacher, weight in zip(trace.exits, teachers, weights, strict=True):
            if not len(student.logits):
                continue
            labels = target if student.rows is None else target[student.rows]
            loss = F.cross_entropy(student.logits, labels)
            if teacher is not None:
                loss = loss + self.gamma * self._instead(student, teacher, labels, trace.batch)
            parts.append(loss * weight)
        return torch.stack(parts).sum()

    def _instead(self, student: Exit, teacher: Exit, labels: Tensor, batch: int) -> Tensor:
        """The mean over rows of what the teacher asks for minus what the label does."""
        known, logits = _on_rows_of(student, teacher, batch)
        trusted = known * self.trust(logits, labels)
        label = F.cross_entropy(student.logits, labels, reduction="none")
        return (trusted * (kl(logits, student.logits, self.temperature) - label)).mean()


class TaughtExits(Further):
    r"""One-for-all distillation by another network: its prediction teaches every exit but the last.

    The formula is that of :class:`OneForAll`, with the other network's prediction for :math:`z_K` inside the KL.

    Args:
        other: the teacher, e.g. ``frozen(network)`` with the network of an earlier stage of training.
        gamma: as in OneForAll.
        temperature: as in OneForAll.
        trust: as in OneForAll.
        weights: as in OneForAll.

    Raises:
        PliantError: as OneForAll does.

    References:
        Survey section 5.2.1 (1); Li et al., ICCV 2019.
    """

    def __init__(
        self, other: Other, *, gamma: float = 0.9, temperature: float = 3.0, trust: Trust = everywhere, weights: Weights = None
    ) -> None:  # fmt: skip
        super().__init__(other)
        self.exits = OneForAll(gamma=gamma, temperature=temperature, trust=trust, weights=weights)

    def __call__(self, y: Tensor, trace: Trace, target: Tensor, progress: float, further: tuple[Any, Trace]) -> Tensor:
        """The sum over exits, in nats."""
        teachers = [*[Exit(further[0])] * (len(trace.exits) - 1), None]
        return self.exits.taught(trace, teachers, target, progress)


class SubnetworkDistillation(Further):
    r"""Distillation between the full and the partial network.

    .. math:: L = \lambda\, T^2\, \mathrm{KL}(p_\text{full}^T \,\|\, p_\text{partial}^T) + (1 - \lambda)\, \mathrm{CE}(y, \text{target})

    The teacher is another network, or the model itself with every site at 1, run in the same step without gradients. Gates learn
    from it through their estimators. This term teaches the teacher nothing: a model whose dense pass nothing else trains
    teaches rubbish; :class:`Sandwich` trains both.

    Args:
        other: the teacher: ``frozen(network)`` for one trained before, or :func:`dense`.
        share: :math:`\lambda` in [0, 1].
        temperature: :math:`T > 0`.

    Raises:
        PliantError: where share or temperature is outside its range.

    >>> term = SubnetworkDistillation(share=0.5)
    >>> term(torch.zeros(2, 4), None, torch.tensor([0, 1]), 0.0, (torch.zeros(2, 4), None))
    tensor(0.6931)

    References:
        Survey section 5.2.1 (3); Hua et al., Channel Gating Neural Networks, NeurIPS 2019.

    Differs from the paper: the teacher may be live; its batch norms then use the batch and leave the statistics alone.
    """

    def __init__(self, other: Other = dense, *, share: float = 0.5, temperature: float = 2.0) -> None:
        super().__init__(other)
        check(share, temperature)
        self.share, self.temperature = share, temperature

    def __call__(
        self, y: Tensor, trace: Trace | None, target: Tensor, progress: float, further: tuple[Any, Trace | None]
    ) -> Tensor:
        """The mean over rows, in nats."""
        taught = kl(further[0], y, self.temperature).mean()
        return self.share * taught + (1 - self.share) * F.cross_entropy(y, target)


class Sandwich(SubnetworkDistillation):
    r"""The full and the partial network trained in one step, each with the labels, the partial one by the full one too.

    .. math:: L = \mathrm{CE}(p_\text{full}, \text{target}) + \lambda\, T^2\, \mathrm{KL}(p_\text{full}^T \,\|\, p_\text{partial}^T) +
        (1 - \lambda)\, \mathrm{CE}(p_\text{partial}, \text{target})

    No gradient of the KL reaches the full network.

    Args:
        share: :math:`\lambda` in [0, 1].
        temperature: :math:`T > 0`.

    Raises:
        PliantError: where share or temperature is outside its range.

    >>> Sandwich(share=0.5)(torch.zeros(2, 4), None, torch.tensor([0, 1]), 0.0, (torch.zeros(2, 4), None))
    tensor(2.0794)

    References:
        Survey section 5.2.1 (3); Yu and Huang, Universally Slimmable Networks, ICCV 2019 (the sandwich rule).
    """

    learns = True

    def __init__(self, *, share: float = 0.5, temperature: float = 2.0) -> None:
        super().__init__(dense, share=share, temperature=temperature)

    def __call__(
        self, y: Tensor, trace: Trace | None, target: Tensor, progress: float, further: tuple[Any, Trace | None]
    ) -> Tensor:
        """The mean over rows, in nats."""
        return F.cross_entropy(further[0], target) + super().__call__(y, trace, target, progress, further)


def check(gamma: float, temperature: float) -> None:
    """Refuse a share outside [0, 1] and a temperature that isn't positive."""
    if not (0 <= gamma <= 1 and temperature > 0):
        raise PliantError(
            got=f"gamma {gamma} and temperature {temperature}",
            expected="gamma in [0, 1] and a temperature above 0",
            do="pass e.g. gamma=0.1, temperature=1.0",
        )


def _on_rows_of(student: Exit, teacher: Exit, batch: int) -> tuple[Tensor, Tensor]:
    """Which of the student's rows the teacher saw, and its logits for them (0 where it saw none)."""
    logits = teacher.logits.detach()
    if teacher.rows is None:
        known = logits.new_ones(batch)
    else:
        known = logits.new_zeros(batch).index_fill(0, teacher.rows, 1.0)
        logits = logits.new_zeros((batch, *logits.shape[1:])).index_copy(0, teacher.rows, logits)
    return (known, logits) if student.rows is None else (known[student.rows], logits[student.rows])
