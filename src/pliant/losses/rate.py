"""Losses of how often sites spend, whatever it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

import torch
import torch.distributed as dist
from torch import Tensor

from pliant.core.decision import Decision
from pliant.core.errors import PliantError
from pliant.core.trace import Trace
from pliant.losses.schedule import Schedule

Target = float | Schedule
"""A rate in [0, 1], or a function of progress that gives it."""
Miss = Callable[[Tensor], Tensor]
"""What a rate above (positive) or below (negative) its target costs."""


def squared(gap: Tensor) -> Tensor:
    """A miss to either side costs its square.

    >>> squared(torch.tensor([-0.5, 0.5]))
    tensor([0.2500, 0.2500])
    """
    return gap**2


def above(gap: Tensor) -> Tensor:
    """Only spending too much costs, its square.

    >>> above(torch.tensor([-0.5, 0.5]))
    tensor([0.0000, 0.2500])
    """
    return gap.relu() ** 2


def hard(decision: Decision) -> Tensor:
    """The values as they fell; their gradient is the estimator's."""
    return decision.value


def soft(decision: Decision) -> Tensor:
    """The soft values, or the hard ones where the rule has none."""
    return decision.value if decision.soft is None else decision.soft


def scored(decision: Decision) -> Tensor:
    """What the decision was taken from, such as saliencies; the values where nothing was asked."""
    return decision.value if decision.scores is None else decision.scores


def _matching(trace: Trace, patterns: Mapping[str, Target]) -> dict[str, Target]:
    """Each recorded site's target: that of the first pattern that it matches, if any."""
    found = {
        site: target
        for site in trace
        for target in [next((t for pattern, t in patterns.items() if fnmatchcase(site, pattern)), None)]
        if target is not None
    }
    if not found:
        raise PliantError(
            got="targets for " + ", ".join(map(repr, patterns)),
            expected="a pattern that matches one of " + ", ".join(map(repr, trace)),
            do="see pliant.sites(model) for the paths",
        )
    return found


def joint_means(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean of each (N,) tensor over all its rows, and over all processes that train together; none for one without rows.

    The gradient is the local mean's: averaged over processes by rows, as DDP training does, that's the joint mean's.
    """
    means = {name: v.mean() for name, v in values.items() if len(v)}
    if not values or not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return means
    sums = torch.stack([torch.stack([v.detach().sum(), v.new_tensor(float(len(v)))]) for v in values.values()])
    dist.all_reduce(sums)
    joint = dict(zip(values, sums[:, 0] / sums[:, 1], strict=True))
    return {name: mean + (joint[name] - mean).detach() for name, mean in means.items()}


def _rates(trace: Trace, sites: Mapping[str, Target], of: Callable[[Decision], Tensor]) -> dict[str, Tensor]:
    """The mean value of each site over all its visits."""
    return joint_means({site: torch.cat([of(d).flatten() for d in trace[site]]) for site in sites})


def _checked(targets: Mapping[str, Target]) -> dict[str, Target]:
    for pattern, rate in targets.items():
        if not callable(rate) and not 0 <= rate <= 1:
            raise PliantError(got=f"target rate {rate} for {pattern!r}", expected="within [0, 1]", do="pass a share")
    return dict(targets)


def _now(target: Target, progress: float) -> float:
    return target(progress) if callable(target) else target


class TargetRate:
    r"""Target activation rate, :math:`\frac{1}{L} \sum_l m(\overline{z}_l - t_l)`, the mean over the batch inside.

    The rate is that of the hard values (their gradient is the estimator's), so easy and hard rows may differ. Where
    several processes train together, the batch is the joint one.

    Args:
        targets: one rate in [0, 1] for all sites, or from pattern on site paths to rate (sites that match none don't
            count); a rate may be a function of progress, e.g. ``falling(0.5, over=0.3)``.
        miss: what a miss costs: :func:`squared`, or :func:`above` for one side only.

    Raises:
        PliantError: where a rate is outside [0, 1], or no recorded site matches.

    >>> trace = Trace({"a": (Decision(torch.tensor([1.0, 0.0])),)}, (), (), 2)
    >>> TargetRate(0.7)(torch.zeros(2, 4), trace, torch.zeros(2), 0.0)
    tensor(0.0400)
    >>> TargetRate(0.7, miss=above)(torch.zeros(2, 4), trace, torch.zeros(2), 0.0)
    tensor(0.)

    References:
        Survey section 5.2.1 (2); Veit and Belongie, ConvNet-AIG, ECCV 2018.

    Differs from the paper: the mean over sites, not the sum, so that the weight means the same at any depth.
    """

    def __init__(self, targets: Target | Mapping[str, Target], *, miss: Miss = squared) -> None:
        self.targets = _checked(targets if isinstance(targets, Mapping) else {"*": targets})
        self.miss = miss

    def __call__(self, y: Tensor, trace: Trace, target: Tensor, progress: float) -> Tensor:
        """The mean over sites, no unit."""
        sites = _matching(trace, self.targets)
        gaps = [rate - _now(sites[site], progress) for site, rate in _rates(trace, sites, hard).items()]
        return self.miss(torch.stack(gaps)).mean() if gaps else y.sum() * 0


class GlobalTargetRate:
    r"""One target for the mean rate of all sites, :math:`m\big(\frac{1}{L} \sum_l \overline{z}_l - t\big)`: who saves is free.

    Args:
        target: :math:`t` in [0, 1], or a function of progress.
        sites: pattern on the paths of the sites that count.
        miss: what a miss costs.

    Raises:
        PliantError: where the rate is outside [0, 1], or no recorded site matches.

    >>> decisions = {s: (Decision(torch.tensor(v)),) for s, v in {"a": [1.0, 1.0], "b": [0.0, 0.0]}.items()}
    >>> GlobalTargetRate(0.3)(torch.zeros(2, 4), Trace(decisions, (), (), 2), torch.zeros(2), 0.0)
    tensor(0.0400)

    References:
        Survey section 5.2.1 (2); Herrmann et al., Channel Selection Using Gumbel Softmax, ECCV 2020.
    """

    def __init__(self, target: Target, *, sites: str = "*", miss: Miss = squared) -> None:
        self.targets = _checked({sites: target})
        self.miss = miss

    def __call__(self, y: Tensor, trace: Trace, target: Tensor, progress: float) -> Tensor:
        """The miss of the mean, no unit."""
        sites = _matching(trace, self.targets)
        rates = list(_rates(trace, sites, hard).values())
        wanted = _now(next(iter(sites.values())), progress)
        return self.miss(torch.stack(rates).mean() - wanted) if rates else y.sum() * 0


class GateL1:
    r"""L1 penalty on gates or masks, normalised per site: :math:`\sum_l \|m_l\|_1 / \mathrm{numel}(m_l)`.

    There is no target: the term's weight alone sets the operating point. Wrap it as ``Scheduled(GateL1(), rising(0.2))``,
    else masks may collapse before the task is learned.

    Args:
        sites: pattern on the paths of the sites that count.
        of: which values: :func:`soft`, :func:`hard` or :func:`scored`.

    Raises:
        PliantError: where no recorded site matches.

    >>> trace = Trace({"a": (Decision(torch.tensor([[1.0, 0.0], [1.0, 1.0]])),)}, (), (), 2)
    >>> GateL1()(torch.zeros(2, 4), trace, torch.zeros(2), 0.0)
    tensor(0.7500)

    References:
        Survey section 5.2.1 (2); Xie et al., Spatially Adaptive Inference, ECCV 2020.
    """

    def __init__(self, sites: str = "*", *, of: Callable[[Decision], Tensor] = soft) -> None:
        self.sites = sites
        self.of = of

    def __call__(self, y: Tensor, trace: Trace, target: Tensor, progress: float) -> Tensor:
        """The sum over sites of the mean size of their values, no unit."""
        found = _rates(trace, _matching(trace, {self.sites: 0.0}), lambda d: self.of(d).abs())
        return torch.stack(list(found.values())).sum() if found else y.sum() * 0
