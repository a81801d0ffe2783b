"""Halting per position: a stage of residual units in which each position of a map stops for itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pliant.core import tape
from pliant.core.errors import PliantError
from pliant.core.executor import Executor
from pliant.core.site import Site
from pliant.execute.loop import Halted
from pliant.execute.pixels import Branch, Wanted, everywhere, somewhere
from pliant.functional.sparse_conv import add, places


class HaltingMap(nn.Module):
    r"""Logits of a unit's halting probabilities at every position, from its state.

    .. math:: z_{ij} = (w * \mathrm{BN}(s))_{ij} + u \cdot \mathrm{BN}(\mathrm{mean}_{hw}(s)) + b

    Shape:
        state :math:`(R, C, H, W)`; logits :math:`(R, 1, H, W)`.

    Args:
        channels: :math:`C`.
        whole: the second term, from a state to :math:`(R,)` (:class:`pliant.scores.HaltingHead`), :math:`b` included; it
            runs for every row.

    >>> import pliant
    >>> halt = HaltingMap(4, pliant.scores.HaltingHead(4, bias=-3.0)).eval()
    >>> halt(torch.zeros(2, 4, 5, 5)).shape, halt(torch.zeros(1, 4, 1, 1))
    (torch.Size([2, 1, 5, 5]), tensor([[[[-3.]]]], grad_fn=<AddBackward0>))

    References:
        Survey sections 2.1.1 (2a) and 3.1.1; Figurnov et al., Spatially Adaptive Computation Time, CVPR 2017.
    """

    def __init__(self, channels: int, whole: nn.Module) -> None:
        super().__init__()
        conv = nn.Conv2d(channels, 1, 3, padding=1, bias=False)
        nn.init.normal_(conv.weight, std=1e-2)
        self.local = Branch(nn.BatchNorm2d(channels), conv)
        self.whole = whole

    def forward(self, s: Tensor, local: Callable[[Branch, Tensor], Tensor] | None = None) -> Tensor:
        """Logits of state ``s``, the first term as ``local`` runs its layers."""
        return self.local(s, local) + self.whole(s).reshape(-1, 1, 1, 1)


class HaltingPixels(Executor):
    r"""Run residual units until each position's halting probabilities have added up; the answer mixes its states.

    .. math::
        h_n = \sigma(\mathrm{halt}_n(s_n)), \quad s_{n+1} = s_n + a_n \odot \mathrm{branch}_n(s_n), \quad
        a_n = 1[\textstyle\sum_{i \le n} h_i < 1 - \varepsilon]

    position by position; :math:`y = \sum_{n < N} h_n s_n + (1 - \sum_{n < N} h_n)\, s_N` as in :class:`pliant.execute.Halting`.
    What has halted keeps its state, which its neighbours still read. After each unit but the last a site reads the remainders;
    where a position halted before, it's 0, and a value there changes nothing.

    Gathered, units and halting maps run at the positions that go on. When none is left the stage ends (recorded, the rest is
    gone through without a position).

    Shape:
        ``x``: :math:`(R, C', H', W')`; answer and states :math:`(R, C, H, W)`; ``given``: :math:`(R, M - 1, H, W)`.

    Args:
        first: the first unit, from ``x`` to the first state; always runs, everywhere.
        branches: :math:`M - 1` residual branches that keep the size, :class:`Branch`.
        halts: as many modules from a state, and how to run a branch of theirs, to logits (:class:`HaltingMap`).
        sites: as many sites of (:class:`pliant.scores.Remainder`, :class:`pliant.rules.Halting`).

    Raises:
        PliantError: where the lists don't fit, or a branch changes the size.

    >>> import pliant
    >>> site = pliant.Site(pliant.scores.Remainder(), pliant.rules.Halting())
    >>> halt = HaltingMap(2, pliant.scores.HaltingHead(2, bias=0.0))
    >>> stage = HaltingPixels(nn.Identity(), [Branch(nn.Conv2d(2, 2, 1))], [halt], [site]).eval()
    >>> y, trace = pliant.record(stage)(torch.ones(1, 2, 4, 4))
    >>> pliant.losses.steps(trace), pliant.losses.ponder(trace).round(decimals=1)
    (tensor([2.]), tensor([2.5000], grad_fn=<RoundBackward1>))

    References:
        Survey sections 2.1.1 (2a), 3.1.1 and 5.1.1; Figurnov et al., Spatially Adaptive Computation Time for Residual
        Networks, CVPR 2017.

    Differs from the paper: what has halted really isn't computed (the released code multiplies by 0), and while training the
    batch norms behind a branch's first convolution learn from the positions that run.
    """

    def __init__(
        self, first: nn.Module, branches: Sequence[Branch], halts: Sequence[nn.Module], sites: Sequence[Site]
    ) -> None:
        super().__init__()
        if not len(branches) == len(halts) == len(sites) or any(branch.stride != 1 for branch in branches):
            raise PliantError(
                got=f"{len(branches)} branches of strides {[b.stride for b in branches]}, {len(halts)} halts, {len(sites)} sites",
                expected="as many of each, all of stride 1",
                do="give every unit but the last a halt and a site, and let the first unit change the size",
            )  # fmt: skip
        self.first = first
        self.branches = nn.ModuleList(branches)
        self.halts = nn.ModuleList(halts)
        self.sites = nn.ModuleList(sites)
        self.visits = [[s is site for s in sites[:n]].count(True) for n, site in enumerate(sites)]

    def plain(self, x: Tensor) -> Tensor:
        """All units at all positions, mixed by their own halting probabilities."""
        s = self.first(x)
        left, y = torch.ones_like(s[:, :1]), torch.zeros_like(s)
        for branch, halt in zip(self.branches, self.halts, strict=True):
            weight = torch.minimum(torch.sigmoid(halt(s)), left)
            y, left, s = torch.addcmul(y, weight, s), left - weight, s + branch(s)
        return torch.addcmul(y, left, s)

    def masked(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        """Every unit at every position."""
        return self._run(self.first(x), given, _MASKED)

    def gathered(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        """Units at the positions that go on."""
        return self._run(self.first(x).contiguous(memory_format=torch.channels_last), given, _GATHERED)

    def _run(self, s: Tensor, given: Tensor | None, form: _Form) -> Tensor:
        left = gate = torch.ones_like(s[:, :1])  # of the budget; and of the values so far, their product
        y, wanted = torch.zeros_like(s), Wanted(self, 0, left, left)
        for n, (branch, halt, site) in enumerate(zip(self.branches, self.halts, self.sites, strict=True)):
            logits = halt(s) if n == 0 else halt(s, partial(form.map, wanted=replace(wanted, part="1/halt.")))
            on = wanted.active > 0
            weight = torch.minimum(torch.sigmoid(logits), left)
            carry = Halted(torch.where(on, weight, 1.0), torch.full_like(left, n == 0))
            decision = site(
                torch.where(on, left - weight, 0.0), given=None if given is None else given[:, n : n + 1], carry=carry,
                visit=self.visits[n], shape=tuple(left.shape[1:]),
            )  # fmt: skip
            value = decision.value
            y = torch.addcmul(y, gate * (value * weight + (1 - value) * left), s)
            gate, left = gate * value, left - weight
            soft = value if decision.soft is None else decision.soft
            active = wanted.active * (~(value.detach() <= 0)).to(value.dtype)
            wanted = Wanted(site, decision.visit, active, wanted.likely * soft, "1/unit.")
            if form.over(wanted):
                return y
            s = form.grow(s, branch, wanted)
        return torch.addcmul(y, gate * left, s)


def _map_everywhere(branch: Branch, x: Tensor, *, wanted: Wanted) -> Tensor:
    """The branch's map with zeros where it isn't wanted."""
    y = everywhere(branch, x, wanted=wanted)
    return torch.where(wanted.active > 0, y, torch.zeros_like(y))


def _map_somewhere(branch: Branch, x: Tensor, *, wanted: Wanted) -> Tensor:
    """The same, computed only where it's wanted; meant for few channels."""
    y = somewhere(branch, x, wanted=wanted)
    return add(x.new_zeros((x.shape[0], y.shape[1], *x.shape[2:])), places(wanted.active), y)


def _grow_everywhere(s: Tensor, branch: nn.Module, wanted: Wanted) -> Tensor:
    """The state after a unit that everybody computes and that changes those who want it."""
    return s + branch(s, partial(_map_everywhere, wanted=wanted))


def _grow_somewhere(s: Tensor, branch: nn.Module, wanted: Wanted) -> Tensor:
    """The same, computed only by those."""
    return add(s, places(wanted.active), branch(s, partial(somewhere, wanted=wanted)))


class _Form(NamedTuple):
    """How halting maps are read, how states grow, and whether a stage may end early."""

    map: Callable[..., Tensor]
    grow: Callable[[Tensor, nn.Module, Wanted], Tensor]
    over: Callable[[Wanted], bool]


def _nobody(wanted: Wanted) -> bool:
    """Whether no position goes on, nobody watches and no statistics are learnt."""
    return (
        tape.tape() is None
        and not wanted.site.training
        and not torch.compiler.is_exporting()
        and not bool(wanted.active.any())
    )


_MASKED = _Form(_map_everywhere, _grow_everywhere, lambda wanted: False)
_GATHERED = _Form(_map_somewhere, _grow_somewhere, _nobody)
