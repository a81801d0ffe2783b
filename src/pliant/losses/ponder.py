"""Ponder: what a loop of units costs by its halting decisions, differentiable through the remainder."""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.core.decision import Decision
from pliant.core.errors import PliantError
from pliant.core.trace import Trace
from pliant.execute.loop import Halted


def _per_row(trace: Trace, value: Tensor, decision: Decision) -> Tensor:
    """``value`` over the whole batch, 0 where a row never came; positions of a row are averaged."""
    if decision.reached is not None:
        value = torch.where(decision.reached.reshape(-1, *[1] * (value.ndim - 1)), value, 0.0)
    value = value.flatten(1).mean(1) if value.ndim > 1 else value
    return value if decision.rows is None else value.new_zeros(trace.batch).index_add(0, decision.rows, value)


def _halting(trace: Trace) -> list[tuple[Decision, Halted]]:
    found = [(d, d.carry) for site in trace for d in trace[site] if isinstance(d.carry, Halted)]
    if not found:
        raise PliantError(
            got="a trace without halting decisions",
            expected="one of a model with pliant.execute.Halting of at least two units",
            do="record such a model; " + ("it visited " + ", ".join(map(repr, trace)) if len(trace) else "this one decided nothing"),
        )  # fmt: skip
    return found


def steps(trace: Trace) -> Tensor:
    r"""How many units each row ran, :math:`N`, summed over the halting loops of the recorded call.

    Shape:
        Returns :math:`(R,)`, floating point; a mean over positions where they halt each for itself.

    Args:
        trace: of a model with :class:`pliant.execute.Halting`.

    Returns:
        Units per row.

    Raises:
        PliantError: where nothing halted in the trace.

    >>> carry = Halted(torch.tensor([0.25, 1.0]), torch.ones(2))
    >>> steps(Trace({"loop.sites.0": (Decision(torch.tensor([1.0, 0.0]), carry=carry),)}, (), (), 2))
    tensor([2., 1.])
    """
    found = [_per_row(trace, c.first + d.value.detach(), d) for d, c in _halting(trace)]
    return torch.stack(found).sum(0)


def ponder(trace: Trace) -> Tensor:
    r"""ACT's ponder cost of each row, :math:`\rho = N + R` with :math:`R = 1 - \sum_{n < N} h_n`, summed over its loops.

    :math:`N` is a constant to the gradient: :math:`\partial \rho / \partial h_n = -1` for :math:`n < N` and 0 at :math:`N`.

    Shape:
        Returns :math:`(R,)`, in units.

    Args:
        trace: of a model with :class:`pliant.execute.Halting`.

    Returns:
        The cost per row.

    Raises:
        PliantError: where nothing halted in the trace.

    >>> carry = Halted(torch.tensor([0.25, 1.0]), torch.ones(2))
    >>> ponder(Trace({"loop.sites.0": (Decision(torch.tensor([1.0, 0.0]), carry=carry),)}, (), (), 2))
    tensor([2.7500, 2.0000])

    References:
        Survey sections 2.1.1 (2a) and 5.1.1; Graves, Adaptive Computation Time, 2016.
    """
    # Each loop has N + R = 2 + the sum over the units that were gone on from of 1 - h, so it adds up over decisions.
    found = [
        _per_row(trace, 2 * c.first + torch.where(d.value.detach() > 0, 1 - c.weight, 0.0), d)
        for d, c in _halting(trace)
    ]
    return torch.stack(found).sum(0)


class Ponder:
    """The mean ponder cost of a batch, as a term of a loss; its weight is the paper's tau (1e-4 to 1e-1).

    >>> carry = Halted(torch.tensor([0.25, 1.0]), torch.ones(2))
    >>> trace = Trace({"loop.sites.0": (Decision(torch.tensor([1.0, 0.0]), carry=carry),)}, (), (), 2)
    >>> Ponder()(torch.zeros(2, 4), trace, torch.zeros(2), 0.0)
    tensor(2.3750)

    References:
        Survey section 5.1.1; Graves, Adaptive Computation Time, 2016; Figurnov et al., CVPR 2017.
    """

    def __call__(self, y: Tensor, trace: Trace, target: Tensor, progress: float) -> Tensor:
        """The mean over rows, in units."""
        return ponder(trace).mean()
