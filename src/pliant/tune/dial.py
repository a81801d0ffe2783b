"""One dial for any mix of sites: every threshold at the same quantile of its own held-out scores."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from pliant.core.bind import share, sites
from pliant.core.calls import Call, joined, labelled, moved, rows_of
from pliant.core.errors import PliantError
from pliant.core.site import Outcome, Rule
from pliant.core.trace import batch_of
from pliant.tune.held_out import Loader, device_of, run, spread
from pliant.tune.point import OperatingPoint, dial

ROWS = 2048
"""Held-out rows whose scores say where the quantiles are; what a position costs is measured on all rows."""


class _AtQuantile(Rule):
    """Turns its site's threshold to a quantile of the scores that come, the first time they do, and decides by it."""

    def __init__(self, rule: Rule, threshold: Tensor, position: float) -> None:
        super().__init__()
        self.rule, self.threshold, self.position, self.turned = rule, threshold, position, False

    def forward(self, scores: Tensor) -> Outcome:
        """By the threshold just found; a loop's later visits keep the first one's."""
        known = scores[~scores.isnan()]
        if not self.turned and known.numel():
            self.threshold.fill_(_quantile(known, self.position))
            self.turned = True
        return self.rule(scores)


class Dial:
    """The positions of a model's one dial, each measured by really running it on held-out data.

    Args:
        model: any model with thresholds; it isn't changed.
        loader: held-out batches, walked once per position.

    Raises:
        PliantError: where no site has a threshold.
    """

    def __init__(self, model: nn.Module, loader: Loader) -> None:
        if not any(dial(site) is not None for site in sites(model).values()):
            raise PliantError(
                got="a model without thresholds", expected="sites whose rule has a threshold",
                do="give the sites Threshold rules, or bind them",
            )  # fmt: skip
        self.loader = loader
        self.trial = share(model)
        _own_thresholds(self.trial)
        some: list[Call] = []
        for batch in loader:
            some.append(labelled(batch)[0])
            if sum(batch_of(*call) for call in some) >= ROWS:
                break
        whole = joined(some)
        self.some = moved(rows_of(whole, min(batch_of(*whole), ROWS)), device_of(model))

    @torch.no_grad()
    def thresholds(self, position: float) -> dict[str, float]:
        """Every site's threshold at the quantile ``position`` of the scores that come to it with the sites before it so set.

        Scores with everything on would mislead: a gate that sees what others left out may score otherwise.
        """
        trial = share(self.trial).eval()
        ends = float("-inf") if position <= 0 else float("inf")
        buffers: dict[str, Tensor] = {}
        for path, site in sites(trial).items():
            if (buffer := dial(site)) is not None:
                inner = 0 < position < 1
                if inner and getattr(site.rule, "by_rank", False):  # that threshold is a quantile already
                    buffers[path] = buffer.fill_(position)
                    continue
                buffers[path] = buffer.fill_(ends)
                site.rule = _AtQuantile(site.rule, buffer, position) if 0 < position < 1 else site.rule
        if 0 < position < 1:
            args, kwargs = self.some
            trial(*args, **kwargs)
        return {path: float(buffer) for path, buffer in buffers.items()}

    def at(self, position: float) -> OperatingPoint:
        """Position 0 spends everywhere, 1 nowhere; in between, each site lets that share of those that come to it save."""
        point = OperatingPoint(self.thresholds(position), solver="dial")
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
    ordered = scores.detach().float().flatten().sort().values
    at = position * (len(ordered) - 1)
    low, high = ordered[int(at)], ordered[min(int(at) + 1, len(ordered) - 1)]
    return float(low + (high - low) * (at - int(at)))
