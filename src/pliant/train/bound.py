"""Which rules decide while a phase runs: given as data, by epoch where decisions are freed one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pliant.core.bind import Part, bind
from pliant.core.errors import PliantError
from pliant.core.site import Rule
from pliant.rules.fixed import Always
from pliant.rules.forced import Forced

Parts = Mapping[str, Part | tuple[Part, ...]]
"""From a pattern on site paths to what ``pliant.bind`` puts there."""
Rules = Parts | Callable[[int], Parts]
"""The parts of a phase, or a function of its epoch (from 0) that gives them."""


@dataclass(frozen=True)
class Curriculum:
    r"""Decisions freed one after the other; those not free yet are forced, so they're no choices and have no log-probability.

    With :math:`K` sites, :math:`\min(K, f + \lfloor t / e \rfloor s)` of them are free in epoch :math:`t`.

    Args:
        paths: of the sites, first to last, as ``pliant.sites(model)`` names them.
        order: "tail" frees the last ones first, "head" the first ones.
        first: :math:`f`, free in the first epoch.
        step: :math:`s`, freed at a time.
        every: :math:`e`, epochs from one time to the next.
        forced: rule of those that aren't free.
        free: what decides at those that are; none keeps the model's own.

    Raises:
        PliantError: for no paths, or counts out of range.

    >>> freed = Curriculum(("a", "b", "c"))
    >>> [list(freed(epoch)) for epoch in range(3)]
    [['a', 'b'], ['a'], []]

    References:
        Survey section 5.2.2 (3); Wu et al., BlockDrop, CVPR 2018 (curriculum over the last blocks).
    """

    paths: tuple[str, ...]
    order: Literal["tail", "head"] = "tail"
    first: int = 1
    step: int = 1
    every: int = 1
    forced: Part = field(default_factory=Always)
    free: Parts = field(default_factory=dict)

    def __post_init__(self) -> None:
        good = self.paths and self.first >= 0 and self.step >= 1 and self.every >= 1 and self.order in ("tail", "head")
        if not good or isinstance(self.paths, str):
            raise PliantError(
                got=f"a curriculum of {self.paths!r}, order {self.order!r}, first={self.first}, step={self.step}, every={self.every}",
                expected="a tuple of paths, 'tail' or 'head', first of at least 0, step and every of at least 1",
                do="take the paths from tuple(pliant.sites(model))",
            )

    def __call__(self, epoch: int) -> Parts:
        """What is bound in ``epoch``: the forced sites, then what decides at the others."""
        free = min(len(self.paths), self.first + epoch // self.every * self.step)
        still = len(self.paths) - free
        held = self.paths[:still] if self.order == "tail" else self.paths[free:]
        return {**dict.fromkeys(held, self.forced), **{k: v for k, v in self.free.items() if k not in held}}


@dataclass(frozen=True)
class PlanCurriculum:
    """The same over the columns of one plan: the forced ones are on (:class:`pliant.rules.Forced`).

    Args:
        path: of the site that plans.
        columns: how many decisions it plans.
        rule: decides the free ones.
        order: "tail" frees the last ones first, "head" the first ones.
        first: free in the first epoch.
        step: freed at a time.
        every: epochs from one time to the next.

    Raises:
        PliantError: for no columns, or counts out of range.

    >>> from pliant.rules import Threshold
    >>> freed = PlanCurriculum("site", 3, Threshold(0.0))
    >>> [freed(epoch)["site"].extra_repr() for epoch in range(3)]
    ['mask=11?', 'mask=1??', 'mask=???']

    References:
        Survey section 5.2.2 (3); Wu et al., BlockDrop, CVPR 2018.
    """

    path: str
    columns: int
    rule: Rule
    order: Literal["tail", "head"] = "tail"
    first: int = 1
    step: int = 1
    every: int = 1

    def __post_init__(self) -> None:
        self(0)

    def __call__(self, epoch: int) -> Parts:
        """What is bound in ``epoch``."""
        names = tuple(map(str, range(self.columns)))
        held = Curriculum(names, self.order, self.first, self.step, self.every)(epoch)
        return {self.path: Forced(self.rule, [1 if name in held else None for name in names])}


def parts_of(rules: Rules, epoch: int) -> Parts:
    """What ``rules`` bind in ``epoch``."""
    return rules(epoch) if callable(rules) else rules


def bound(model: nn.Module, parts: Parts) -> nn.Module:
    """``model`` itself where nothing is bound, else a copy that shares its tensors."""
    if not parts:
        return model
    other = bind(model, parts)
    home = next((t.device for t in model.parameters()), None)
    return other if home is None else other.to(home)  # the parts come from where the phase was written


def check_parts(model: nn.Module, parts: Parts, phase: str) -> nn.Module:
    """Refuse parts with parameters, which would be lost after the phase; else the bound model."""
    for pattern, value in parts.items():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, nn.Module) and next(part.parameters(), None) is not None:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise PliantError(
                    got=f"a {type(part).__name__} with parameters for {pattern!r} in phase {phase!r}",
                    expected="rules and scores without, since a phase's own are forgotten when it ends",
                    do="put it into the model, and let the phase train it",
                )
    return bound(model, parts)


def generators(rules: Rules, epochs: int) -> Iterator[torch.Generator]:
    """The random generators that the parts of a phase own, each once."""
    found: dict[int, torch.Generator] = {}
    for epoch in range(epochs if callable(rules) else 1):
        for value in parts_of(rules, epoch).values():
            for part in value if isinstance(value, tuple) else (value,):
                for module in part.modules():
                    found |= {id(v): v for v in vars(module).values() if isinstance(v, torch.Generator)}
    return iter(found.values())


def shared_buffers(model: nn.Module, other: nn.Module) -> dict[str, Tensor]:
    """The buffers of ``model`` that ``other``, bound to it, holds too."""
    theirs = dict(other.named_buffers())
    return {name: buffer for name, buffer in model.named_buffers() if theirs.get(name) is buffer}


@torch.no_grad()
def hand_back(shared: Mapping[str, Tensor], other: nn.Module) -> None:
    """Copy what modules of ``other`` put in place of a shared buffer (not into it) into it, and share it again."""
    theirs = dict(other.named_buffers())
    for name, buffer in shared.items():
        if theirs[name] is not buffer:
            buffer.copy_(theirs[name])
            path, _, leaf = name.rpartition(".")
            other.get_submodule(path)._buffers[leaf] = buffer


def described(value: Any) -> str:
    """``value`` in words that tell two plans apart and have no addresses in them.

    >>> import pliant
    >>> described({"*": pliant.rules.Threshold(0.5)}), described((1, 2)), described(described)
    ('*: Threshold(threshold=0.5)', '(1, 2)', 'described')
    """
    if isinstance(value, nn.Module):
        return _module(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {described(v)}" for key, v in value.items())
    if is_dataclass(value) and not isinstance(value, type):
        return _called(value, {f.name: getattr(value, f.name) for f in fields(value)})
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "(" + ", ".join(map(described, value)) + ")"
    if isinstance(value, Tensor):
        return f"{value.item():.6g}" if value.numel() == 1 else f"tensor of {tuple(value.shape)}"
    terms = getattr(value, "terms", None)
    if terms is not None:
        return _called(value, {"terms": terms})
    text = repr(value)
    if " at 0x" in text or callable(value):
        return getattr(value, "__qualname__", None) or _called(value, getattr(value, "__dict__", {}))
    return str(value)


def _module(module: nn.Module) -> str:
    plain = {k: v for k, v in vars(module).items() if not k.startswith("_") and isinstance(v, (int, float, str, tuple))}
    plain.pop("training", None)
    return _called(module, {**plain, **module._buffers, **module._modules})


def _called(value: Any, inside: Mapping[str, Any]) -> str:
    return f"{type(value).__qualname__}({', '.join(f'{k}={described(v)}' for k, v in inside.items())})"
