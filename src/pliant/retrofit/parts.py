"""What stands in for layers of a host that run in parts has in common."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pliant.core import tape
from pliant.core.decision import Decision
from pliant.execute import rows


class _Calls(threading.local):
    """Between the first layer of what runs in parts and its last: what was decided, by executor. On the thread, not on modules."""

    def __init__(self) -> None:
        self.open: dict[int, Any] = {}


calls = _Calls()


def hooked(modules: Iterable[nn.Module]) -> bool:
    """Whether somebody looks at what modules read or make."""
    return any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def looked_at(between: Sequence[nn.Module], layers: Iterable[Any] = ()) -> bool:
    """Whether a hook, or what stands in for something between the layers, wants to see all that is between them."""
    return (
        hooked(between) or hooked(forward.__self__ for forward in layers) or any("forward" in vars(m) for m in between)
    )


def all_on(decision: Decision) -> bool:
    """Whether everything was chosen. Not asked where the answer would be a constant of a graph."""
    value = decision.value
    if rows.weighted(decision) or torch.compiler.is_compiling() or isinstance(value, torch._subclasses.FakeTensor):
        return False
    return bool((value == 1).all())


def muted(h: Tensor, gate: Tensor, decision: Decision) -> Tensor:
    """Neurons or maps times their gate; what wasn't chosen says 0 whatever it holds, unless a gradient wants to know."""
    if rows.weighted(decision):
        return h * gate
    return torch.where(gate == 0, torch.zeros_like(h), h)


def unread() -> bool:
    """Whether nobody reads what a part would note. With gradients on it's worked out all the same: a checkpoint that runs its
    layers again, unrecorded, has to save as many tensors as before."""
    return tape.tape() is None and not torch.is_grad_enabled()


def wanted(decision: Decision) -> Tensor:
    """How much of each part is asked for, by its soft value where there is one; a gate other than 0 runs all of it."""
    soft = decision.value if decision.soft is None else decision.soft
    return (soft != 0).to(soft.dtype) if decision.is_weight else soft
