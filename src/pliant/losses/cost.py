"""Losses of what a recorded call spends."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from pliant.core.errors import PliantError
from pliant.core.trace import Trace
from pliant.cost.account import expected_flops


class TargetRate:
    r"""Target activation rate, :math:`\frac{1}{L} \sum_l (t_l - \overline{z}_l)^2`, the mean over the batch inside the square.

    The rate is that of the hard values (their gradient is the estimator's), so easy and hard rows may differ.

    Args:
        targets: one rate in [0, 1] for all sites, or from pattern on site paths to rate; sites that match none don't count.

    Raises:
        PliantError: where a rate is outside [0, 1], or no recorded site matches.

    >>> from pliant.core.decision import Decision
    >>> trace = Trace({"a": (Decision(torch.tensor([1.0, 0.0])),)}, (), (), 2)
    >>> TargetRate(0.7)(torch.zeros(2, 4), trace, torch.zeros(2), 0.0)
    tensor(0.0400)

    References:
        Survey section 5.2.1 (2); Veit and Belongie, ConvNet-AIG, ECCV 2018.
    """

    def __init__(self, targets: float | Mapping[str, float]) -> None:
        self.targets = dict(targets) if isinstance(targets, Mapping) else {"*": targets}
        for pattern, rate in self.targets.items():
            if not 0 <= rate <= 1:
                raise PliantError(
                    got=f"target rate {rate} for {pattern!r}", expected="within [0, 1]", do="pass a share"
                )

    def __call__(self, y: Tensor, trace: Trace, target: Tensor, progress: float) -> Tensor:
        """The mean over sites, no unit."""
        terms = []
        for site in trace:
            rate = next((rate for pattern, rate in self.targets.items() if fnmatchcase(site, pattern)), None)
            if rate is not None:
                values = torch.cat([d.value.flatten() for d in trace[site]])
                terms.append((rate - values.mean()) ** 2)
        if not terms:
            raise PliantError(
                got="targets for " + ", ".join(map(repr, self.targets)),
                expected="a pattern that matches one of " + ", ".join(map(repr, trace)),
                do="see pliant.sites(model) for the paths",
            )
        return torch.stack(terms).mean()


class FlopsBudget:
    r"""Expected-cost loss, :math:`(\overline{E[c]} / c_\text{dense} - \theta)^2`.

    Args:
        share: :math:`\theta`, the wanted share of the dense FLOPs, in (0, 1].

    Raises:
        PliantError: where ``share`` is outside (0, 1].

    >>> import pliant
    >>> model = pliant.create_model("msdnet", num_classes=4, exits=3, base=1, step=1, channels=4).eval()
    >>> _, trace = pliant.record(pliant.bind(model, {"*": pliant.rules.Always()}))(torch.zeros(1, 3, 32, 32))
    >>> FlopsBudget(0.5)(torch.zeros(1, 4), trace, torch.zeros(1), 0.0)
    tensor(0.2500)

    References:
        Survey section 5.2.1 (2); Verelst and Tuytelaars, Dynamic Convolutions, CVPR 2020.
    """

    def __init__(self, share: float) -> None:
        if not 0 < share <= 1:
            raise PliantError(got=f"share {share}", expected="within (0, 1]", do="pass the wanted share of dense FLOPs")
        self.share = share

    def __call__(self, y: Tensor, trace: Trace, target: Tensor, progress: float) -> Tensor:
        """The squared miss, no unit."""
        dense = trace.dense_flops.to(torch.float64).mean().item()
        return ((expected_flops(trace).mean() / dense - self.share) ** 2).float()
