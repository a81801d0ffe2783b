"""Small networks of every composition, and decisions forced on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import pliant
from pliant import Decision, Site, Trace, rules, scores
from pliant.execute import Exits, MostConfident, Residual, Skip

WIDTH, CLASSES = 6, 4


def gate(rule: pliant.Rule | None = None) -> Site:
    made = scores.LinearGate(WIDTH, bias=0.0)
    nn.init.normal_(made.linear.weight)
    return Site(made, rules.Threshold(0.0) if rule is None else rule)


def confidence() -> Site:
    return Site(scores.MaxProbability(), rules.Threshold(0.5))


def layer() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())


def head() -> nn.Module:
    return nn.Linear(WIDTH, CLASSES)


def exits() -> nn.Module:
    return Exits([layer() for _ in range(3)], [head() for _ in range(3)], [confidence() for _ in range(2)])


def surest_exit() -> nn.Module:
    sites = [confidence() for _ in range(2)]
    return Exits(
        [layer() for _ in range(3)], [head() for _ in range(3)], sites, answer=MostConfident(scores.MaxProbability())
    )


def patient() -> nn.Module:
    sites = [Site(scores.Patience(2), rules.Threshold(0.0)) for _ in range(4)]
    return Exits([layer() for _ in range(5)], [head() for _ in range(5)], sites)


def skip() -> nn.Module:
    return nn.Sequential(layer(), Skip(layer(), gate()), head())


def either() -> nn.Module:
    return nn.Sequential(Skip(layer(), gate(), otherwise=nn.Linear(WIDTH, WIDTH, bias=False)), head())


def residual() -> nn.Module:
    return nn.Sequential(Residual(layer(), gate()), Residual(layer(), gate(), shortcut=nn.Linear(WIDTH, WIDTH)))


def skip_in_skip() -> nn.Module:
    inner = nn.Sequential(layer(), Skip(layer(), gate()), Skip(layer(), gate(), otherwise=layer()))
    return Skip(inner, gate(), otherwise=nn.Sequential(Residual(layer(), gate())))


def exits_of_skips() -> nn.Module:
    stages = [nn.Sequential(Skip(layer(), gate()), Residual(layer(), gate())) for _ in range(3)]
    return Exits(stages, [head() for _ in range(3)], [confidence() for _ in range(2)])


NETS: dict[str, Callable[[], nn.Module]] = {
    f.__name__: f for f in (exits, surest_exit, patient, skip, either, residual, skip_in_skip, exits_of_skips)
}


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETS[name]().eval()


def trace_of(values: Mapping[str, Sequence[float] | Tensor], batch: int) -> Trace:
    return Trace({s: (Decision(torch.as_tensor(v, dtype=torch.float32)),) for s, v in values.items()}, (), (), batch)


def force(model: nn.Module, values: Mapping[str, Sequence[float] | Tensor], batch: int) -> Any:
    """The model with these values at its sites, for one batch."""
    return pliant.bind(model, {"*": rules.Given(trace_of(values, batch))})
