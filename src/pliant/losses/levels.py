"""Levels: what forms of a block cost when the price isn't FLOPs, such as bit-widths."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from pliant.core.errors import PliantError
from pliant.core.trace import Trace
from pliant.functional.levels import level_weights


def level_shares(trace: Trace, costs: Sequence[float], sites: str = "*") -> tuple[Tensor, Tensor]:
    """The mean cost of the levels that ran, and the expected one by soft values, over the sites that match; (R,) each.

    >>> from pliant.core.decision import Decision
    >>> trace = Trace({"a": (Decision(torch.tensor([[1.0, 0.0], [1.0, 1.0]])),)}, (), (), 2)
    >>> level_shares(trace, (0.0, 0.25, 1.0))[0]
    tensor([0.2500, 1.0000])
    """
    found = [d for site in trace if fnmatchcase(site, sites) for d in trace[site]]
    if not found or any(d.value.shape[1:] != (len(costs) - 1,) for d in found):
        raise PliantError(
            got=f"{len(found)} decisions that match {sites!r}" + (f", of shape {tuple(found[0].value.shape)}" if found else ""),
            expected=f"levels of {len(costs)} forms, (R, {len(costs) - 1})", do="give a cost for each form of a block",
        )  # fmt: skip
    price = found[0].value.new_tensor(list(costs))
    hard = torch.stack([(level_weights(d.value.detach()) * price).sum(1) for d in found]).mean(0)
    soft = torch.stack([(level_weights(d.value if d.soft is None else d.soft) * price).sum(1) for d in found]).mean(0)
    return hard, soft


class LevelTarget:
    r"""Pull what levels cost towards a target: :math:`\pm E[c]`, the sign that of what ran in this batch minus the target.

    Args:
        costs: of each form, cheapest first, as shares of the costliest.
        target: share in [0, 1].
        sites: pattern on the paths of the sites that count.

    Raises:
        PliantError: where the target is outside [0, 1], or no recorded site has these levels.

    >>> from pliant.core.decision import Decision
    >>> trace = Trace({"a": (Decision(torch.tensor([[1.0, 0.0], [1.0, 1.0]])),)}, (), (), 2)
    >>> [LevelTarget((0.0, 0.25, 1.0), t)(torch.zeros(2, 4), trace, torch.zeros(2), 0.0).item() for t in (0.5, 0.7)]
    [0.625, -0.625]

    References:
        Survey sections 2.1.1 (2b) and 5.2.1 (2); Shen et al., Fractional Skipping, AAAI 2020.
    """

    def __init__(self, costs: Sequence[float], target: float, *, sites: str = "*") -> None:
        if not 0 <= target <= 1:
            raise PliantError(got=f"target {target}", expected="within [0, 1]", do="pass a share of the costliest form")
        self.costs, self.target, self.sites = tuple(costs), target, sites

    def __call__(self, y: Tensor, trace: Trace, target: Tensor, progress: float) -> Tensor:
        """The signed expected cost, no unit."""
        hard, soft = level_shares(trace, self.costs, self.sites)
        return soft.mean() if float(hard.mean()) > self.target else -soft.mean()
