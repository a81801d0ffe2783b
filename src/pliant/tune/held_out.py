"""One pass over held-out data that keeps all that solvers need: scores, answers and the cost of every exit."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pliant.core.bind import bind, sites
from pliant.core.calls import Call, labelled, moved, prediction_of, rows_of
from pliant.core.errors import PliantError
from pliant.core.trace import record
from pliant.rules.fixed import Always
from pliant.rules.threshold import Threshold

Loader = Iterable[Any]
"""Held-out batches: pairs ``(inputs, labels)``, inputs being a tensor, a tuple of arguments or a mapping of keywords; or mappings
of keywords with ``labels`` among them, as loaders for transformers give."""


@dataclass(frozen=True)
class HeldOut:
    """What every exit of a chain says about every held-out row.

    Args:
        sites: paths of the sites of the chain, :math:`E - 1` of them.
        logits: :math:`(E, N, C)`.
        scores: :math:`(E - 1, N)`, the wish to go on.
        labels: :math:`(N,)`.
        flops: :math:`(E,)`, executed FLOPs of a row that leaves at each exit.
    """

    sites: tuple[str, ...]
    logits: Tensor
    scores: Tensor
    labels: Tensor
    flops: Tensor

    @property
    def correct(self) -> Tensor:
        """Whether each exit is right about each row, (E, N)."""
        return self.logits.argmax(-1) == self.labels

    def leaves(self, thresholds: Tensor) -> Tensor:
        """The exit at which each row leaves, (N,), for (E - 1,) thresholds; a NaN score goes on."""
        stays = torch.cat([(self.scores <= thresholds[:, None]), torch.ones_like(self.labels, dtype=torch.bool)[None]])
        return stays.to(torch.uint8).argmax(0)

    def evaluate(self, thresholds: Tensor) -> tuple[float, float]:
        """Accuracy in [0, 1] and mean FLOPs under ``thresholds``."""
        exits = self.leaves(thresholds)
        right = self.correct.gather(0, exits[None]).double().mean().item()
        return right, self.flops[exits].double().mean().item()

    def spread(self, thresholds: Tensor) -> dict[str, float]:
        """Cost of the rows under ``thresholds``; see :func:`spread`."""
        return spread(self.flops[self.leaves(thresholds)])


def spread(flops: Tensor) -> dict[str, float]:
    """Median, 95th percentile and maximum of rows' FLOPs: a mean hides what the dear rows cost.

    >>> spread(torch.tensor([10, 10, 10, 30]))
    {'p50': 10.0, 'p95': 30.0, 'max': 30.0}
    """
    ordered = flops.double().sort().values
    at = {"p50": 0.5, "p95": 0.95, "max": 1.0}
    return {k: ordered[max(0, math.ceil(q * len(ordered)) - 1)].item() for k, q in at.items()}


def refuse_test(loader: object) -> None:
    """Refuse what says of itself that it is a test set: ``split``, ``part`` or ``name`` "test", or ``train=False``.

    Raises:
        PliantError: where it is one. Plain lists of tensors say nothing of themselves.
    """
    while loader is not None:
        named = next((str(getattr(loader, n, "")) for n in ("split", "part") if hasattr(loader, n)), "")
        if named.lower() == "test" or getattr(loader, "train", None) is False:
            raise PliantError(
                got=f"the test set ({type(loader).__name__})", expected="held-out data that is no test set",
                do="split some training data off: thresholds chosen on the test set make its figures worthless",
            )  # fmt: skip
        loader = getattr(loader, "dataset", None)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lives."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def spending(model: nn.Module) -> list[str]:
    """Paths of the sites whose decisions cost something: all but those that decide a place, say."""
    return [path for path, site in sites(model).items() if site.rule.spends]


def _scored(model: nn.Module, paths: list[str]) -> nn.Module:
    """``model`` with everything on and every score asked at ``paths``."""
    return bind(model, dict.fromkeys(paths, Threshold(float("-inf"))))


def is_chain(model: nn.Module, call: Call) -> bool:
    """Whether the sites of ``model`` that spend are just the exits of one chain."""
    paths = spending(model)
    args, kwargs = moved(rows_of(call, 1), device_of(model))
    with torch.no_grad():
        _, trace = record(_scored(model, paths))(*args, **kwargs)
    return len(trace.exits) == len(paths) + 1 and all(len(trace[s]) == 1 for s in paths)


@torch.no_grad()
def collect(model: nn.Module, loader: Loader) -> HeldOut:
    """Run every exit on every row once, and price every exit.

    Args:
        model: a chain of exits, in evaluation mode.
        loader: batches ``(inputs, labels)``, or mappings with ``labels``.

    Returns:
        What the exits say.

    Raises:
        PliantError: where there are no rows, or the scores aren't numbers.
    """
    paths = spending(model)
    every = record(_scored(model, paths))
    names: tuple[str, ...] = ()
    logits, scores, labels, first = [], [], [], None
    for batch in loader:
        call, target = labelled(batch)
        args, kwargs = call = moved(call, device_of(model))
        first = rows_of(call, 1) if first is None and len(target) else first
        _, trace = every(*args, **kwargs)
        names = tuple(path for path in trace if path in paths)
        logits.append(torch.stack([e.logits.float().cpu() for e in trace.exits]))
        scores.append(torch.stack([trace[s][0].scores.float().cpu() for s in names]))  # pyright: ignore[reportOptionalMemberAccess]
        labels.append(target.cpu())
    if first is None:
        raise PliantError(got="no held-out rows", expected="at least one batch", do="pass a loader of (x, labels)")
    flops = [_cost(model, names, k, first) for k in range(len(names) + 1)]
    held = HeldOut(names, torch.cat(logits, 1), torch.cat(scores, 1), torch.cat(labels), torch.tensor(flops))
    if held.logits.isnan().any():
        raise PliantError(
            got=f"NaN logits for {int(held.logits.isnan().any(-1).any(0).sum())} held-out rows",
            expected="finite logits",
            do="look for NaN in the data or in the weights",
        )
    return held


def _cost(model: nn.Module, names: tuple[str, ...], k: int, call: Call) -> int:
    """Executed FLOPs of a row that leaves at exit ``k``, scorers as they run: a row of zeros, since a NaN would go on."""
    rules = {path: Threshold(float("inf" if i >= k else "-inf")) for i, path in enumerate(names)}
    args, kwargs = pytree.tree_map(
        lambda t: torch.zeros_like(t) if isinstance(t, Tensor) and t.is_floating_point() else t, call
    )
    _, trace = record(bind(model, {**rules}))(*args, **kwargs)
    return int(trace.flops[0])


@torch.no_grad()
def run(model: nn.Module, loader: Loader) -> tuple[float, Tensor, int]:
    """Accuracy, each row's executed FLOPs, and the dense FLOPs of ``model`` on ``loader``, by really running it."""
    right = dense = 0
    spent: list[Tensor] = []
    recorder = record(model)
    for batch in loader:
        call, target = labelled(batch)
        args, kwargs = moved(call, device_of(model))
        y, trace = recorder(*args, **kwargs)
        right += int((prediction_of(y).argmax(-1).cpu() == target.cpu()).sum())
        spent.append(trace.flops.cpu())
        dense = int(trace.dense_flops[0]) if len(target) else dense
    rows = sum(map(len, spent))
    if rows == 0:
        raise PliantError(got="no held-out rows", expected="at least one batch", do="pass a loader of (x, labels)")
    return right / rows, torch.cat(spent), dense


def all_on(model: nn.Module) -> nn.Module:
    """The dense network as its sites see it (scorers that are read still run)."""
    return bind(model, {p: _open(sites(model)[p].rule.reads_scores) for p in spending(model)})


def _open(reads: bool) -> Threshold | Always:
    return Threshold(float("-inf")) if reads else Always()
