"""What Fabric wraps: the recorded model and its loss, so that DDP sees everything that reads a parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pliant.core.errors import PliantError
from pliant.core.trace import Trace, record
from pliant.losses.further import Further


class Batch:
    """One batch. Not a tuple: Fabric would round the inputs of a mixed-precision run before autocast decides."""

    def __init__(self, x: Tensor, target: Tensor, progress: float) -> None:
        self.x, self.target, self.progress = x, target, progress


class Step(nn.Module):
    """From a batch to the named terms of the loss; the loss is computed in float32 whatever the model runs in.

    A Trace can't cross Fabric's wrapper (it copies outputs and refuses frozen dataclasses), scalars can.
    """

    def __init__(self, model: nn.Module, loss: Callable[..., Mapping[str, Tensor]]) -> None:
        super().__init__()
        self.recorder = record(model)
        self.loss = loss
        self.others: dict[int, nn.Module] = {}  # not registered: they share the model's parameters, or aren't trained

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The terms."""
        y, trace = _wide(self.recorder(batch.x), batch.x)
        device = batch.x.device.type
        # All other passes run first, under the autocast of the model's own.
        passes = {id(term): self._again(term, batch.x) for term in getattr(self.loss, "further", ())}
        more = {"again": lambda term: passes[id(term)]} if passes else {}
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            return _checked(self.loss(y, trace, batch.target, batch.progress, **more))

    def _again(self, term: Further, x: Tensor) -> tuple[Any, Trace]:
        """The pass that a term reads besides the model's own; its network is made once a phase."""
        if id(term) not in self.others:
            self.others[id(term)] = record(term.other(self.recorder.model).to(x.device))
        with torch.set_grad_enabled(term.learns and torch.is_grad_enabled()):
            return _wide(self.others[id(term)](x), x)


def _wide(call: tuple[Any, Trace], x: Tensor) -> tuple[Any, Trace]:
    """Prediction and trace in float32 where autocast made them narrower."""
    if not torch.is_autocast_enabled(x.device.type):
        return call
    y, trace = call
    wide: dict[int, Tensor] = {}  # one copy of each tensor: what was one tensor stays one
    y = _widened(y, wide)
    return y, replace(_widened(trace, wide), accounts=trace.accounts)


def _widened(tree: Any, wide: dict[int, Tensor]) -> Any:
    """The tree with its half-precision tensors in float32."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dtype in (torch.bfloat16, torch.float16):
            return wide.setdefault(id(leaf), leaf.float())
        return leaf

    return pytree.tree_map(one, tree)


def _checked(terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The terms, if they are what a loss returns."""
    good = isinstance(terms, Mapping) and terms and all(isinstance(t, Tensor) and t.ndim == 0 for t in terms.values())
    if not good:
        raise PliantError(
            got=f"a loss that returns {_described(terms)}",
            expected="a non-empty mapping from names to scalar tensors",
            do='return e.g. {"task": cross_entropy(y, target)}',
        )
    return dict(terms)


def _described(terms: Any) -> str:
    if not isinstance(terms, Mapping):
        return f"a {type(terms).__name__}"
    return repr({k: tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for k, t in terms.items()})
