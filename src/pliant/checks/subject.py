"""What a check works on: a private copy of the model, its input, and decisions to force."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pliant.core.bind import bind, masked, sites
from pliant.core.decision import Decision
from pliant.core.errors import PliantError
from pliant.core.site import Rule
from pliant.core.trace import Trace, batch_of, record
from pliant.rules.fixed import Always, Given, Never, Random

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
CLOSE_CALL = 1e-6
"""A score this near to its threshold may fall on either side by rounding alone."""


def failed(check: str, got: str, expected: str, do: str, site: str | None = None) -> PliantError:
    """The error of a check that found something."""
    return PliantError(got=f"{got} (check {check!r})", expected=expected, do=do, site=site)


class Subject:
    """A copy of a model in evaluation mode and one batch; nothing done to it reaches the caller's model."""

    def __init__(self, model: nn.Module, x: Any) -> None:
        try:
            self.model = copy.deepcopy(model).eval()
        except (RuntimeError, TypeError) as error:
            raise failed(
                "deepcopy", f"{type(error).__name__}: {error}", "a model that copy.deepcopy can copy",
                "keep no tensor with a gradient history, lock or generator as an attribute of a module",
            ) from error  # fmt: skip
        self.args, self.kwargs = call_of(x)
        self.batch = batch_of(self.args, self.kwargs)
        self.paths = list(sites(self.model))
        self._generator = torch.Generator().manual_seed(0)

    def inputs(self, rows: Tensor | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call, or their rows ``rows``."""
        if rows is None:
            return self.args, self.kwargs

        def pick(t: Any) -> Any:
            per_row = isinstance(t, Tensor) and t.ndim > 0 and t.shape[0] == self.batch
            return t.index_select(0, rows.to(t.device)) if per_row else t

        return pytree.tree_map(pick, (self.args, self.kwargs))

    def call(self, model: nn.Module, rows: Tensor | None = None) -> list[Tensor]:
        """The tensors that ``model`` answers, without gradients."""
        args, kwargs = self.inputs(rows)
        with torch.no_grad():
            return tensors(model(*args, **kwargs))

    def record(self, model: nn.Module, rows: Tensor | None = None) -> tuple[list[Tensor], Trace]:
        """The same with what was decided."""
        args, kwargs = self.inputs(rows)
        with torch.no_grad():
            y, trace = record(model)(*args, **kwargs)
        return tensors(y), trace

    def everywhere(self, rule: Rule) -> Any:
        """The model with ``rule`` at every site."""
        return bind(self.model, {"*": rule})

    def trace_of(self, model: nn.Module) -> Trace:
        """What ``model`` decides, where every row's decisions are asked for (the masked form)."""
        return self.record(masked(model))[1]

    def random(self, p: float = 0.5) -> Random:
        """A rule that draws from this subject's own stream."""
        return Random(p, self._generator)

    def mixed(self) -> Any:
        """The model with Always, Never and random decisions at its sites in turn."""
        turn: list[Rule] = [Always(), self.random(), Never()]
        return bind(self.model, {path: turn[i % 3] for i, path in enumerate(self.paths)})

    def loops(self) -> str | None:
        """A site that one call visits several times by an executor that doesn't number them, so that no rule can replay it."""
        trace = self.trace_of(self.model)
        looped = next((s for s, visits in trace.visits.items() if len(visits) > 1), None)
        if looped is not None:
            try:
                self.call(self.everywhere(Given(trace)))
            except PliantError:
                return looped
        return None

    def stochastic(self) -> bool:
        """Whether the model's own rules draw in evaluation."""
        first = self.trace_of(self.model)
        torch.manual_seed(torch.initial_seed() + 1)
        second = self.trace_of(self.model)
        return any(not torch.equal(first.dense(site), second.dense(site)) for site in first)

    def patterns(self) -> Iterator[tuple[str, Any]]:
        """Named models that decide for themselves, at random, in a mixed way, everywhere and nowhere.

        What draws is drawn once here and then replayed, so that every form decides alike.
        """
        looped = self.loops()
        own = self.stochastic()
        yield "its own decisions", self.frozen(self.model) if own and looped is None else self.model
        if looped is None:
            for p in (0.5, 0.8):
                yield f"random decisions (p = {p})", self.frozen(self.everywhere(self.random(p)))
            yield "mixed decisions", self.frozen(self.mixed())
        yield "Always", self.everywhere(Always())
        yield "Never", self.everywhere(Never())

    def frozen(self, model: nn.Module) -> Any:
        """The model with the decisions that ``model`` takes on this batch, for good."""
        return self.everywhere(Given(self.trace_of(model)))

    def frozen_rows(self, trace: Trace, rows: Tensor) -> Any:
        """The model with the decisions of ``trace`` for a call with its rows ``rows`` alone."""
        picked = {
            site: tuple(Decision(d.dense(trace.batch)[rows], visit=d.visit, weight=d.is_weight) for d in trace[site])
            for site in trace
        }
        return self.everywhere(Given(Trace(picked, (), (), len(rows))))

    def decided(self) -> Tensor:
        """Rows none of whose own scores is so near to its threshold that rounding may decide, (rows,) bool."""
        trace, found = self.trace_of(self.model), torch.ones(self.batch, dtype=torch.bool)
        rules = {path: site.rule for path, site in sites(self.model).items()}
        for site in trace:
            threshold = getattr(
                rules[site], "threshold", getattr(getattr(rules[site], "rule", None), "threshold", None)
            )
            for d in trace[site]:
                if d.scores is None or threshold is None:
                    continue
                margin = CLOSE_CALL * d.scores.abs().clamp_min(1)
                near = ((d.scores - threshold).abs() <= margin).reshape(d.scores.shape[0], -1).any(1)
                found[d.rows.cpu() if d.rows is not None else slice(None)] &= ~near.cpu()
        return found


def call_of(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs of a call: from a tensor, a tuple of them, or a mapping."""
    if isinstance(x, Mapping):
        return (), dict(x)
    return (tuple(x) if isinstance(x, (tuple, list)) else (x,)), {}


def tensors(y: Any) -> list[Tensor]:
    """The tensors of an answer."""
    found = [t for t in pytree.tree_leaves(y) if isinstance(t, Tensor)]
    if not found:
        raise PliantError(got=f"an answer of type {type(y).__name__}", expected="tensors", do="return the prediction")
    return found


def gap(got: list[Tensor], wanted: list[Tensor], rows: Tensor | None = None) -> float:
    """Largest difference over the largest wanted number; infinite where shapes or NaNs differ."""
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if rows is not None:
            a, b = a[rows.to(a.device)], b[rows.to(b.device)]
        if not torch.equal(a.isnan(), b.isnan()):
            return float("inf")
        if not a.numel():
            continue
        a, b = (t.detach().double().nan_to_num() for t in (a, b))
        worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp_min(1e-6)))
    return worst


def near(check: str, got: list[Tensor], wanted: list[Tensor], what: str, do: str, rows: Tensor | None = None) -> float:
    """The gap, or an error where it's above the tolerance of the numbers' type."""
    limit = max((TOLERANCE.get(t.dtype, 0.0) for t in wanted), default=0.0)
    found = gap(got, wanted, rows)
    if not found <= limit:
        raise failed(check, f"{what}: answers apart by {found:.1e} of the largest", f"at most {limit:.0e}", do)
    return found


def identical(got: list[Tensor], wanted: list[Tensor]) -> bool:
    """Whether all numbers are the same, bit for bit (NaN equals NaN)."""
    return len(got) == len(wanted) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())
        for a, b in zip(got, wanted, strict=True)
    )
