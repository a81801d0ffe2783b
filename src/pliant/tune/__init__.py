"""Thresholds for a budget or a risk on held-out data; temperature; the operating point that travels with the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pliant.core.bind import sites
from pliant.core.calls import labelled
from pliant.core.errors import PliantError
from pliant.tune.dial import Dial
from pliant.tune.held_out import HeldOut, Loader, collect, is_chain, refuse_test, spread
from pliant.tune.lagrangian import lagrangian
from pliant.tune.point import OperatingPoint
from pliant.tune.risk import controlled, lost
from pliant.tune.solvers import cheapest, geometric, search
from pliant.tune.temperature import calibration_error, fit_temperature

Solver = Callable[[HeldOut, float], Tensor]

__all__ = [
    "HeldOut", "Loader", "OperatingPoint", "Solver", "calibration_error", "cheapest", "collect", "controlled",
    "fit_temperature", "geometric", "lagrangian", "lost", "search", "spread", "tune",
]  # fmt: skip


def tune(
    model: nn.Module, loader: Loader, *, budget: float | None = None, risk: float | None = None, solver: Solver = search,
    temperature: Callable[[Tensor, Tensor], float] | None = fit_temperature, delta: float | None = None,
) -> OperatingPoint:  # fmt: skip
    r"""Set the thresholds of ``model`` on held-out data: for a budget in mean FLOPs, or for an allowed loss of accuracy.

    A chain of exits gets one threshold per exit from ``solver`` and one temperature per exit, fitted on the rows that
    reach it. Any other mix of sites is turned by one dial: each threshold at the same quantile of its site's scores.

    Args:
        model: in evaluation mode; its thresholds and temperatures are set **in place**, and the point travels with it.
        loader: held-out batches ``(inputs, labels)``, or mappings with ``labels``; never the test set; may be walked several times. What says of itself that
            it is a test set (``train=False``, ``split="test"``) is refused.
        budget: share of the dense network's FLOPs, in (0, 1].
        risk: allowed loss of held-out accuracy against the dense network, in [0, 1]; the cheapest such point is taken.
        solver: thresholds of a chain for a budget, from what its exits say (``search``, ``geometric`` or ``lagrangian``).
        temperature: fits one exit's temperature; None leaves them.
        delta: with ``risk``, for a chain: the loss of accuracy on new data exceeds ``risk`` with at most this probability
            (see ``controlled``). Temperatures are left as they are, since the same rows can't serve twice.

    Returns:
        The operating point.

    Raises:
        PliantError: where not exactly one of budget and risk is given, or it can't be met; the message names the range.

    >>> import pliant
    >>> _ = torch.manual_seed(0)
    >>> model = pliant.create_model("msdnet", num_classes=4, exits=3, base=1, step=1, channels=4).eval()
    >>> data = [(torch.randn(32, 3, 16, 16), torch.randint(4, (32,)))]
    >>> point = tune(model, data, budget=0.8)
    >>> point.share <= 0.8, list(point.thresholds)
    (True, ['sites.0', 'sites.1'])

    References:
        Survey section 5.1.1; Huang et al., ICLR 2018 (budgeted batch classification); Guo et al., ICML 2017.
    """
    if (budget is None) == (risk is None):
        raise PliantError(
            got=f"budget={budget}, risk={risk}", expected="exactly one of them", do="pass budget= or risk="
        )
    if budget is not None and not 0 < budget <= 1:
        raise PliantError(
            got=f"budget {budget}",
            expected="a share of dense FLOPs in (0, 1]",
            do="pass e.g. 0.5 for half of the compute",
        )
    if risk is not None and not 0 <= risk <= 1:
        raise PliantError(got=f"risk {risk}", expected="an accuracy loss in [0, 1]", do="pass e.g. 0.01 for one point")
    if delta is not None and (risk is None or not (0 < delta < 1 and 0 < risk < 1)):
        raise PliantError(
            got=f"delta={delta} with risk={risk}", expected="both in (0, 1)", do="pass e.g. risk=0.01, delta=0.05"
        )
    refuse_test(loader)
    if model.training:
        raise PliantError(
            got="a model in training mode", expected="evaluation mode", do="call model.eval() first: batch norm matters"
        )
    batches = loader if isinstance(loader, list) else list(loader)
    if not sites(model) or not batches:
        raise PliantError(
            got=f"{len(sites(model))} sites and {len(batches)} batches", expected="at least one of each",
            do="pass a model that decides something, and held-out data",
        )  # fmt: skip
    chain = is_chain(model, labelled(batches[0])[0])
    if delta is not None and not chain:
        raise PliantError(
            got="delta for a model that isn't a chain of exits",
            expected="a chain",
            do="leave delta out for gated models",
        )
    if chain and delta is not None:
        point = _controlled_chain(model, batches, float(risk or 0.0), delta)
    elif chain:
        point = _tune_chain(model, batches, budget, risk, solver, temperature)
    else:
        dial = Dial(model, batches)
        point = dial.for_budget(budget) if budget is not None else dial.for_risk(float(risk or 0.0))
    point = replace(point, budget=budget, risk=risk)
    point.apply(model)
    return point


def _tune_chain(
    model: nn.Module, batches: list[Any], budget: float | None, risk: float | None, solver: Solver,
    temperature: Callable[[Tensor, Tensor], float] | None,
) -> OperatingPoint:  # fmt: skip
    held = collect(model, batches)
    temperatures: dict[str, float] = {}

    def solve(held: HeldOut) -> Tensor:
        return (
            solver(held, budget * float(held.flops.max())) if budget is not None else cheapest(held, float(risk or 0.0))
        )

    thresholds = solve(held)
    scorers = {path: sites(model)[path].scorer for path in held.sites}
    scaled = all(hasattr(s, "temperature") for s in scorers.values())
    if scaled:
        temperatures = {path: float(scorer.temperature) for path, scorer in scorers.items()}  # pyright: ignore[reportArgumentType]
    if temperature is not None and scaled:
        # The rows that reach an exit depend on the thresholds and the thresholds on the temperatures: two turns settle it.
        for _ in range(2):
            exits = held.leaves(thresholds)
            temperatures = {
                path: temperature(held.logits[k][exits >= k], held.labels[exits >= k])
                for k, path in enumerate(held.sites)
            }
            held = replace(held, scores=_rescored(held, scorers, temperatures))
            thresholds = solve(held)
    accuracy, flops = held.evaluate(thresholds)
    named = getattr(solver, "__name__", type(solver).__name__)
    return OperatingPoint(
        dict(zip(held.sites, thresholds.tolist(), strict=True)), temperatures, accuracy=accuracy, flops=flops,
        dense_flops=int(held.flops.max()), rows=len(held.labels), solver=named if budget is not None else "cheapest",
        spread=held.spread(thresholds),
    )  # fmt: skip


def _controlled_chain(model: nn.Module, batches: list[Any], risk: float, delta: float) -> OperatingPoint:
    held = collect(model, batches)
    thresholds = controlled(held, risk, delta=delta)
    accuracy, flops = held.evaluate(thresholds)
    return OperatingPoint(
        dict(zip(held.sites, thresholds.tolist(), strict=True)), accuracy=accuracy, flops=flops, delta=delta,
        dense_flops=int(held.flops.max()), rows=len(held.labels), solver="controlled", spread=held.spread(thresholds),
    )  # fmt: skip


@torch.no_grad()
def _rescored(held: HeldOut, scorers: dict[str, Any], temperatures: dict[str, float]) -> Tensor:
    """The scores at other temperatures, by copies of the scorers."""
    rows = []
    for k, path in enumerate(held.sites):
        twin = copy.deepcopy(scorers[path])
        twin.temperature.fill_(temperatures[path])
        rows.append(twin(held.logits[k].to(twin.temperature.device)).float().cpu())
    return torch.stack(rows)
