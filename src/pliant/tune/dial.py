"""One dial for any mix of sites: every threshold at the same quantile of its own held-out scores."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from pliant.core.bind import share, sites
from pliant.core.errors import PliantError
from pliant.core.trace import record
from pliant.tune.held_out import Loader, all_on, device_of, run, spread
from pliant.tune.point import OperatingPoint, dial


@torch.no_grad()
def _score_samples(model: nn.Module, loader: Loader) -> dict[str, Tensor]:
    """All held-out scores of every site that has a threshold, everything on."""
    found: dict[str, list[Tensor]] = {}
    recorder = record(all_on(model))
    wanted = {path for path, site in sites(model).items() if dial(site) is not None}
    for x, _ in loader:
        _, trace = recorder(x.to(device_of(model)))
        for path in wanted & set(trace):
            found.setdefault(path, []).extend(
                d.scores.float().cpu().flatten() for d in trace[path] if d.scores is not None
            )
    return {path: torch.cat(parts) for path, parts in found.items()}


class Dial:
    """The positions of a model's one dial, each measured by really running it on held-out data.

    Args:
        model: any model with thresholds; it isn't changed.
        loader: held-out batches, walked once per position.

    Raises:
        PliantError: where no site has a threshold.
    """

    def __init__(self, model: nn.Module, loader: Loader) -> None:
        self.samples = _score_samples(model, loader)
        if not self.samples:
            raise PliantError(
                got="a model without thresholds", expected="sites whose rule has a threshold",
                do="give the sites Threshold rules, or bind them",
            )  # fmt: skip
        self.loader = loader
        self.trial = share(model)
        _own_thresholds(self.trial)

    def at(self, position: float) -> OperatingPoint:
        """Position 0 spends everywhere, 1 nowhere; in between, the cost never rises."""
        thresholds = {path: _quantile(scores, position) for path, scores in self.samples.items()}
        point = OperatingPoint(thresholds, solver="dial")
        point.apply(self.trial)
        accuracy, flops, dense = run(self.trial, self.loader)
        mean = flops.double().mean().item()
        return replace(
            point, accuracy=accuracy, flops=mean, dense_flops=dense, rows=len(flops), spread=spread(flops)
        )  # fmt: skip

    def for_budget(self, budget: float, *, rounds: int = 12) -> OperatingPoint:
        """The costliest position within ``budget``, a share of dense FLOPs, by bisection.

        Raises:
            PliantError: where even the cheapest position costs more; the message names the range.
        """
        best = self.at(1.0)
        if best.share > budget:
            raise PliantError(
                got=f"a budget of {budget:.1%} of dense FLOPs",
                expected=f"between {best.share:.1%} and {self.at(0.0).share:.1%}",
                do="ask for a budget in that range",
            )
        low, high = 0.0, 1.0
        for _ in range(rounds):
            point = self.at((low + high) / 2)
            if point.share <= budget:
                best, high = point, (low + high) / 2
            else:
                low = (low + high) / 2
        return best

    def for_risk(self, risk: float, *, steps: int = 20) -> OperatingPoint:
        """The cheapest position whose accuracy is within ``risk`` of the dense one's; accuracy needn't be monotone."""
        points = [self.at(step / steps) for step in range(steps + 1)]
        return min((p for p in points if p.accuracy >= points[0].accuracy - risk), key=lambda p: p.flops)


def _own_thresholds(model: nn.Module) -> None:
    """Give the copy thresholds of its own, so that trying positions leaves the original's alone."""
    for module in model.modules():
        if isinstance(module._buffers.get("threshold"), Tensor):
            module._buffers["threshold"] = module._buffers["threshold"].clone()  # pyright: ignore[reportOptionalMemberAccess]


def _quantile(scores: Tensor, position: float) -> float:
    if position <= 0:
        return float("-inf")
    if position >= 1:
        return float("inf")
    ordered = scores.sort().values
    at = position * (len(ordered) - 1)
    low, high = ordered[int(at)], ordered[min(int(at) + 1, len(ordered) - 1)]
    return float(low + (high - low) * (at - int(at)))
