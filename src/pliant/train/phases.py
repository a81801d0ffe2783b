"""Phases of training as data: what is trained, how, and what is annealed meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pliant.core.errors import PliantError
from pliant.core.trace import Trace
from pliant.train.bound import Rules, check_parts, described, parts_of
from pliant.train.stop import Stop

Loss = Callable[[Any, Trace, Tensor, float], Mapping[str, Tensor]]
"""From (prediction, trace, target, progress in [0, 1)) to named terms, each a mean over rows, whose sum is minimised."""
Anneal = tuple[float, float] | Callable[[float], float]
"""(start, end) for a line over the phase, or a function of the epoch, from 0, e.g. ``pliant.estimators.Decay(0.1)``."""


@dataclass(frozen=True)
class Phase:
    r"""One phase of training. All rates are those at the middle of a step, so no step has rate 0.

    With :math:`t` epochs done of :math:`E`, :math:`w` of warm-up: :math:`t / w` while :math:`t < w`, then constant 1,
    cosine :math:`\tfrac12 (1 + \cos \pi \tfrac{t - w}{E - w})`, or :math:`\gamma^{|\{m \le t\}|}` over the milestones.

    Args:
        name: for the plan and the history.
        epochs: passes over the data, at least 1.
        optimizer: "sgd", "adam" or "adamw"; each phase starts a fresh one.
        lr: learning rate, above 0.
        momentum: of SGD, in [0, 1).
        weight_decay: of all trained parameters, at least 0.
        nesterov: Nesterov's momentum (SGD).
        schedule: of the learning rate.
        milestones: epochs of this phase after which "multistep" multiplies the rate by ``gamma``.
        gamma: that factor.
        warmup: epochs over which the rate rises linearly; may be a fraction, less than ``epochs``.
        train: patterns on parameter names (``*`` and ``?`` as in file names); one that begins with ``!`` takes what it
            matches out again: ``("*", "!*scorer*")``. Parameters that aren't chosen are frozen: they get no gradient, and
            a batch norm of which nothing is trained keeps its running statistics to the byte.
        anneal: from pattern on buffer names to (start, end): the buffer has ``start`` in the first epoch and ``end`` in
            the last, linear between; a phase of one epoch has ``start``. Or to a function of the epoch, from 0.
        clip: largest L2 norm of the gradient of all trained parameters; None clips nothing.
        rules: what decides meanwhile, as for ``pliant.bind``, or a function of the epoch such as ``Curriculum``. The phase
            trains a bound copy that shares every parameter; the model keeps its own rules. Buffers of rules bound here
            (temperatures, slopes) are annealed on that copy and forgotten with it.
        loss: of this phase; None takes that of ``fit``.
        metric: of the bound model in evaluation mode, after every epoch; the history has it as "held_out".
        stop: from the phase's history to whether it is over before its last epoch, e.g. ``Plateau()``.

    Raises:
        PliantError: where a value is outside what is said above.

    >>> phase = Phase("joint", epochs=4, lr=0.1, schedule="multistep", milestones=(2, 3), warmup=1)
    >>> [round(phase.rate(t), 4) for t in (0.5, 1.5, 2.5, 3.5)]
    [0.05, 0.1, 0.01, 0.001]

    References:
        Survey sections 5.2.1 and 5.2.2 (training in stages, annealed temperatures).
    """

    name: str
    epochs: int
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    schedule: Literal["constant", "cosine", "multistep"] = "constant"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup: float = 0.0
    train: tuple[str, ...] = ("*",)
    anneal: Mapping[str, Anneal] = field(default_factory=dict)
    clip: float | None = None
    rules: Rules = field(default_factory=dict)
    loss: Loss | None = None
    metric: Callable[[nn.Module], float] | None = None
    stop: Stop | None = None

    def __post_init__(self) -> None:
        sgd = self.optimizer == "sgd"
        wrong = [
            (self.epochs < 1, f"{self.epochs} epochs", "at least 1"),
            (self.optimizer not in ("sgd", "adam", "adamw"), f"optimizer {self.optimizer!r}", "sgd, adam or adamw"),
            (not 0 < self.lr < math.inf, f"lr={self.lr}", "a positive number"),
            (not 0 <= self.momentum < 1, f"momentum={self.momentum}", "a number in [0, 1)"),
            (not sgd and self.momentum != 0, f"momentum for {self.optimizer}", "momentum with sgd only"),
            (self.nesterov and not (sgd and self.momentum > 0), "nesterov without momentum", "sgd with momentum"),
            (not 0 <= self.weight_decay < math.inf, f"weight_decay={self.weight_decay}", "at least 0"),
            (self.schedule not in ("constant", "cosine", "multistep"), f"schedule {self.schedule!r}",
             "constant, cosine or multistep"),
            (bool(self.milestones) != (self.schedule == "multistep"), f"milestones {self.milestones} for {self.schedule}",
             "milestones with multistep, and only there"),
            (not 0 <= self.warmup < self.epochs, f"warmup of {self.warmup} in {self.epochs} epochs", "fewer than epochs"),
            (isinstance(self.train, str) or not self.train, f"train={self.train!r}", "a tuple of patterns"),
            (self.clip is not None and not self.clip > 0, f"clip={self.clip}", "a positive norm or None"),
        ]  # fmt: skip
        for is_wrong, got, expected in wrong:
            if is_wrong:
                raise PliantError(got=got, expected=expected, do=f"mend phase {self.name!r}")

    def rate(self, done: float) -> float:
        """The learning rate when ``done`` epochs of this phase are over (fractions count)."""
        if done < self.warmup:
            return self.lr * done / self.warmup
        if self.schedule == "cosine":
            share = (done - self.warmup) / (self.epochs - self.warmup)
            return self.lr * (1 + math.cos(math.pi * share)) / 2
        return self.lr * self.gamma ** sum(m <= done for m in self.milestones)


def plan(phases: Sequence[Phase]) -> str:
    """The phases as a table in plain text, to print before training.

    >>> print(plan([Phase("warm up", epochs=2, train=("heads.*",)), Phase("joint", epochs=8, optimizer="adamw", lr=1e-3)]))
    phase    epochs  optimizer      schedule  trains   anneals  clip
    warm up       2  sgd lr=0.1     constant  heads.*  -        -
    joint         8  adamw lr=0.001 constant  *        -        -
    """
    head = ("phase", "epochs", "optimizer", "schedule", "trains", "anneals", "clip", "rules", "loss", "metric", "stop")
    rows = [head, *(_row(phase) for phase in phases)]
    # What no phase says has no column, but for those that every phase has.
    kept = [i for i in range(len(head)) if i < 7 or any(row[i] != "-" for row in rows[1:])]
    rows = [tuple(row[i] for i in kept) for row in rows]
    head = rows[0]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [c.rjust(w) if i == 1 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join(map(line, rows))


def _row(p: Phase) -> tuple[str, ...]:
    """One line of the plan."""
    extras = {"momentum": p.momentum, "weight_decay": p.weight_decay}
    optimizer = " ".join([p.optimizer, f"lr={p.lr:g}", *(f"{k}={v:g}" for k, v in extras.items() if v)])
    schedule = p.schedule + (f" x{p.gamma:g} at {','.join(map(str, p.milestones))}" if p.milestones else "")
    anneals = ", ".join(f"{pattern} {_annealed(how)}" for pattern, how in p.anneal.items())
    return (
        p.name,
        str(p.epochs),
        optimizer + (" nesterov" if p.nesterov else ""),
        schedule + (f", warm-up {p.warmup:g}" if p.warmup else ""),
        ", ".join(p.train),
        anneals or "-",
        "-" if p.clip is None else f"{p.clip:g}",
        described(p.rules) or "-",
        *("-" if part is None else described(part) for part in (p.loss, p.metric, p.stop)),
    )


def _annealed(how: Anneal) -> str:
    """How a buffer is annealed, in words."""
    return f"{how[0]:g}->{how[1]:g}" if isinstance(how, tuple) else described(how)


def identity(phase: Phase) -> dict[str, str | None]:
    """The phase in plain values, for a checkpoint to compare."""
    values = {f.name: getattr(phase, f.name) for f in fields(phase)}
    return {k: v if v is None or isinstance(v, str) else described(v) for k, v in values.items()}


def _matching(patterns: Sequence[str], names: Sequence[str], what: str, phase: str) -> list[str]:
    """The names that match, less those that a pattern with ! takes out; every pattern has to match one."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern.removeprefix("!")) for name in names):
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise PliantError(
                got=f"the pattern {pattern!r} in phase {phase!r}",
                expected=f"one that matches a {what} of the model: {shown or 'it has none'}",
                do=f"see model.named_{what}s() for the names",
            )
    wanted = [p for p in patterns if not p.startswith("!")]
    unwanted = [p[1:] for p in patterns if p.startswith("!")]
    found = [
        n for n in names if any(fnmatchcase(n, p) for p in wanted) and not any(fnmatchcase(n, p) for p in unwanted)
    ]
    if patterns and not found:
        raise PliantError(
            got=f"the patterns {tuple(patterns)!r} in phase {phase!r}", expected=f"some {what} left to choose",
            do='begin with a pattern that chooses, e.g. ("*", "!heads.*")',
        )  # fmt: skip
    return found


def check(phases: Sequence[Phase], model: nn.Module) -> None:
    """Every pattern of every phase matches something of ``model`` with the rules of that phase."""
    if not phases:
        raise PliantError(got="no phases", expected="at least one", do="pass e.g. [Phase('joint', epochs=10)]")
    for phase in phases:
        _matching(phase.train, [n for n, _ in model.named_parameters(remove_duplicate=False)], "parameter", phase.name)
        known: dict[str, None] = {}  # a curriculum may bind the buffer's rule late
        for epoch in range(phase.epochs if callable(phase.rules) else 1):
            other = check_parts(model, parts_of(phase.rules, epoch), phase.name)
            known |= dict.fromkeys(name for name, _ in other.named_buffers())
        _matching(list(phase.anneal), list(known), "buffer", phase.name)


def trained(phase: Phase, model: nn.Module) -> list[nn.Parameter]:
    """The parameters that ``phase`` trains; a shared one counts once, by any of its names."""
    named = dict(model.named_parameters(remove_duplicate=False))
    names = _matching(phase.train, list(named), "parameter", phase.name)
    return list({id(named[name]): named[name] for name in names}.values())


def prepare(phase: Phase, model: nn.Module) -> list[nn.Parameter]:
    """Freeze all but what ``phase`` trains, set every module's mode, and return the trained parameters."""
    chosen = trained(phase, model)
    wanted = {id(p) for p in chosen}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted)
    model.train()
    for norm in _frozen_norms(model, wanted):
        norm.eval()
    return chosen


def _frozen_norms(model: nn.Module, wanted: set[int]) -> Iterator[nn.Module]:
    """Modules with running statistics of which nothing is trained.

    One without parameters of its own (affine=False) goes with the nearest module around it that has some.
    """

    def visit(module: nn.Module, outer: bool) -> Iterator[nn.Module]:
        parameters = list(module.parameters())
        live = any(id(p) in wanted for p in parameters) if parameters else outer
        if not live and isinstance(getattr(module, "running_mean", None), Tensor):
            yield module
        for child in module.children():
            yield from visit(child, live)

    return visit(model, True)


def anneal(phase: Phase, model: nn.Module, epoch: int) -> None:
    """Set the annealed buffers to what they are in ``epoch`` (from 0)."""
    share = epoch / max(1, phase.epochs - 1)
    for name, buffer in model.named_buffers():
        how = next((how for pattern, how in phase.anneal.items() if fnmatchcase(name, pattern)), None)
        if isinstance(how, tuple):
            buffer.fill_(how[0] + (how[1] - how[0]) * share)
        elif how is not None:
            buffer.fill_(how(epoch))


def optimizer_of(phase: Phase, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """A fresh optimizer over ``parameters``."""
    kinds: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    extra = {"momentum": phase.momentum, "nesterov": phase.nesterov} if phase.optimizer == "sgd" else {}
    return kinds[phase.optimizer](parameters, lr=phase.lr, weight_decay=phase.weight_decay, **extra)
