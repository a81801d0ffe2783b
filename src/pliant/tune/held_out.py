"""One pass over held-out data that keeps all that solvers need: scores, answers and the cost of every exit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pliant.core.bind import bind, sites
from pliant.core.errors import PliantError
from pliant.core.trace import record
from pliant.rules.fixed import Always
from pliant.rules.threshold import Threshold

Loader = Iterable[tuple[Tensor, Tensor]]


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


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lives."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def is_chain(model: nn.Module, x: Tensor) -> bool:
    """Whether the sites of ``model`` are just the exits of one chain."""
    with torch.no_grad():
        _, trace = record(bind(model, {"*": Threshold(float("-inf"))}))(x[:1])
    return len(trace.exits) == len(trace) + 1 and all(len(trace[s]) == 1 for s in trace)


@torch.no_grad()
def collect(model: nn.Module, loader: Loader) -> HeldOut:
    """Run every exit on every row once, and price every exit.

    Args:
        model: a chain of exits, in evaluation mode.
        loader: batches ``(x, labels)``.

    Returns:
        What the exits say.

    Raises:
        PliantError: where there are no rows, or the scores aren't numbers.
    """
    every = record(bind(model, {"*": Threshold(float("-inf"))}))
    names: tuple[str, ...] = ()
    logits, scores, labels, first = [], [], [], None
    for x, target in loader:
        x = x.to(device_of(model))
        first = x[:1] if first is None and len(x) else first
        _, trace = every(x)
        names = tuple(trace)
        logits.append(torch.stack([e.logits.float().cpu() for e in trace.exits]))
        scores.append(torch.stack([trace[s][0].scores.float().cpu() for s in trace]))  # pyright: ignore[reportOptionalMemberAccess]
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


def _cost(model: nn.Module, names: tuple[str, ...], k: int, x: Tensor) -> int:
    """Executed FLOPs of a row that leaves at exit ``k``, scorers as they run: the exit is forced through ``given`` scores."""
    rules = {path: Threshold(float("inf" if i >= k else "-inf")) for i, path in enumerate(names)}
    _, trace = record(bind(model, {**rules}))(torch.zeros_like(x))
    return int(trace.flops[0])


@torch.no_grad()
def run(model: nn.Module, loader: Loader) -> tuple[float, float, int, int]:
    """Accuracy, mean executed FLOPs, dense FLOPs and rows of ``model`` on ``loader``, by really running it."""
    right = spent = rows = dense = 0
    recorder = record(model)
    for x, target in loader:
        y, trace = recorder(x.to(device_of(model)))
        right += int((y.argmax(-1).cpu() == target).sum())
        spent += int(trace.flops.sum())
        dense = int(trace.dense_flops[0]) if len(x) else dense
        rows += len(x)
    if rows == 0:
        raise PliantError(got="no held-out rows", expected="at least one batch", do="pass a loader of (x, labels)")
    return right / rows, spent / rows, dense, rows


def all_on(model: nn.Module) -> nn.Module:
    """The dense network as its sites see it (scorers that are read still run)."""
    return bind(model, {p: _open(s.rule.reads_scores) for p, s in sites(model).items()})


def _open(reads: bool) -> Threshold | Always:
    return Threshold(float("-inf")) if reads else Always()
