"""The operating point: where the dials of a model stand, and what that bought on held-out data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from pliant.core.bind import sites
from pliant.core.errors import PliantError
from pliant.core.site import Site


def dial(site: Site) -> Tensor | None:
    """The threshold buffer that decides at ``site``; None where its rule has none."""
    rule: Any = site.rule
    while hasattr(rule, "rule"):
        rule = rule.rule
    found = getattr(rule, "threshold", None)
    return found if isinstance(found, Tensor) else None


@dataclass(frozen=True)
class OperatingPoint:
    """Thresholds and temperatures by site, what was asked, and what was measured on the held-out rows.

    Args:
        thresholds: by site path, in the units of its scores.
        temperatures: by site path, for sites whose confidence has one.
        budget: the wanted share of dense FLOPs, if that was asked.
        risk: the allowed loss of accuracy, if that was asked.
        accuracy: on the held-out rows, in [0, 1].
        flops: mean executed FLOPs per row there.
        dense_flops: FLOPs of the dense network per row.
        rows: how many rows were held out.
        solver: what chose the thresholds.
        spread: median ("p50"), "p95" and "max" of the held-out rows' FLOPs.
        delta: allowed probability that the risk on new data is above ``risk``, if that was asked.

    >>> point = OperatingPoint({"sites.0": 0.5}, accuracy=0.9, flops=50.0, dense_flops=100, rows=10, solver="geometric")
    >>> OperatingPoint.from_dict(point.to_dict()) == point, point.share
    (True, 0.5)
    """

    thresholds: Mapping[str, float]
    temperatures: Mapping[str, float] = field(default_factory=dict)
    budget: float | None = None
    risk: float | None = None
    accuracy: float = float("nan")
    flops: float = float("nan")
    dense_flops: int = 0
    rows: int = 0
    solver: str = ""
    spread: Mapping[str, float] = field(default_factory=dict)
    delta: float | None = None

    @property
    def share(self) -> float:
        """Mean executed FLOPs as a share of the dense network's."""
        return self.flops / self.dense_flops

    def apply(self, model: nn.Module) -> None:
        """Turn the dials of ``model`` to this point, in place, and let the point travel with it.

        Raises:
            PliantError: where the model lacks a site of the point, or that site has no threshold.
        """
        found = sites(model)
        for path, value in self.thresholds.items():
            buffer = dial(found[path]) if path in found else None
            if buffer is None:
                raise PliantError(
                    got="a point with a threshold for a site that has none here",
                    expected="sites with thresholds: " + ", ".join(p for p, s in found.items() if dial(s) is not None),
                    do="apply the point to the model it was tuned on",
                    site=path,
                )
            with torch.no_grad():
                buffer.fill_(value)
        for path, value in self.temperatures.items():
            with torch.no_grad():
                found[path].scorer.temperature.fill_(value)  # pyright: ignore[reportCallIssue]
        model.operating_point = self  # pyright: ignore[reportArgumentType]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> OperatingPoint:
        """The point that :meth:`to_dict` wrote.

        Raises:
            PliantError: where ``data`` holds other fields.
        """
        names = {f.name for f in fields(cls)}
        if not names >= set(data) or "thresholds" not in data:
            raise PliantError(
                got="an operating point with fields " + ", ".join(data), expected=", ".join(sorted(names)),
                do="load a point that this version of pliant wrote",
            )  # fmt: skip
        return cls(**data)
