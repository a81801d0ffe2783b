"""Balance: losses that keep experts equally busy."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from pliant.core.decision import Decision
from pliant.core.errors import PliantError
from pliant.core.trace import Trace
from pliant.scores.experts import Noise


def variation(total: Tensor) -> Tensor:
    r"""The squared coefficient of variation, :math:`\mathrm{var} / (\mathrm{mean}^2 + 10^{-10})`; 0 for one number.

    >>> variation(torch.tensor([1.0, 3.0]))
    tensor(0.2500)
    """
    return total.var(correction=0) / (total.mean() ** 2 + 1e-10)


class _Balance:
    """The mean over the sites that match of a figure of each of their visits."""

    def __init__(self, sites: str = "*") -> None:
        self.sites = sites

    def of(self, decision: Decision) -> Tensor:
        """The figure of one visit."""
        raise TypeError("abstract")

    def __call__(self, y: Tensor, trace: Trace, target: Tensor, progress: float) -> Tensor:
        """The mean over sites, no unit."""
        found = [self.of(decision) for decision in self._decisions(trace) if decision.value.numel()]
        return torch.stack(found).mean() if found else y.sum() * 0

    def _decisions(self, trace: Trace) -> Iterator[Decision]:
        matching = [site for site in trace if fnmatchcase(site, self.sites)]
        if not matching:
            raise PliantError(
                got=f"the pattern {self.sites!r}", expected="one that matches a site of " + ", ".join(map(repr, trace)),
                do="see pliant.sites(model) for the paths",
            )  # fmt: skip
        for site in matching:
            for decision in trace[site]:
                if decision.value.ndim < 2:
                    raise PliantError(
                        got=f"values of shape {tuple(decision.value.shape)}", expected="a gate for each of several experts",
                        do="name the sites of experts: Importance('*.experts.site')", site=site,
                    )  # fmt: skip
                yield decision


class Importance(_Balance):
    r"""How unequal the experts' summed gates are: :math:`\mathrm{CV}(\sum_t v_{te})^2`.

    Args:
        sites: pattern on the paths of the sites that count.

    Raises:
        PliantError: where no recorded site matches, or one decides something else.

    >>> trace = Trace({"a": (Decision(torch.tensor([[1.0, 0.0], [1.0, 0.0]])),)}, (), (), 2)
    >>> Importance()(torch.zeros(2, 4), trace, torch.zeros(2), 0.0)
    tensor(1.)

    References:
        Survey section 2.1.2 (2); Shazeer et al., Sparsely-Gated Mixture-of-Experts, ICLR 2017.
    """

    def of(self, decision: Decision) -> Tensor:
        """The squared coefficient of variation of the summed gates."""
        return variation(decision.value.flatten(0, -2).sum(0))


class Load(_Balance):
    r"""How unequal the experts' numbers of tokens are, made smooth by the scores' noise: :math:`\mathrm{CV}(L)^2`.

    .. math:: L_e = \sum_t \Phi\Big(\frac{\mathrm{clean}_{te} - \mathrm{kth}_{\ne e}(s_t)}{\mathrm{std}_{te}}\Big)

    the chance that expert :math:`e` stays among the best :math:`k` if its own noise were drawn again.

    Args:
        k: experts of each token.
        sites: pattern on the paths of the sites that count.

    Raises:
        PliantError: where no recorded site matches, or its scores have no noise (see :class:`pliant.scores.NoisyRouter`).

    >>> noise = Noise(torch.zeros(2, 3), torch.ones(2, 3))
    >>> trace = Trace({"a": (Decision(torch.ones(2, 3), scores=torch.zeros(2, 3), carry=noise),)}, (), (), 2)
    >>> Load(1)(torch.zeros(2, 4), trace, torch.zeros(2), 0.0)
    tensor(0.)

    References:
        Survey section 2.1.2 (2); Shazeer et al., Sparsely-Gated Mixture-of-Experts, ICLR 2017, appendix A.
    """

    def __init__(self, k: int, sites: str = "*") -> None:
        super().__init__(sites)
        self.k = k

    def of(self, decision: Decision) -> Tensor:
        """The squared coefficient of variation of the smooth load."""
        return variation(load(decision, self.k))


def load(decision: Decision, k: int) -> Tensor:
    """The smooth number of tokens of each expert, (E,); see :class:`Load`."""
    if not isinstance(decision.carry, Noise) or decision.scores is None:
        raise PliantError(
            got="scores without noise", expected="those of a NoisyRouter, recorded while training",
            do="use Importance, or SwitchBalance for one expert a token",
        )  # fmt: skip
    scores, clean, std = (t.flatten(0, -2) for t in (decision.scores, *decision.carry))
    if k >= scores.shape[1]:
        return scores.new_full((scores.shape[1],), float(scores.shape[0]))
    best = scores.topk(k + 1, -1).values
    inside = scores > best[:, k:]  # among the best k: what it must stay above is the next one behind them
    bound = torch.where(inside, best[:, k:], best[:, k - 1 : k])
    return torch.special.ndtr((clean - bound) / std).sum(0)


class SwitchBalance(_Balance):
    r"""Switch's auxiliary loss: :math:`E \sum_e f_e P_e`, which is 1 where tokens and probabilities are shared equally.

    :math:`f_e` is the share of tokens whose best expert is :math:`e` (before any is turned away; no gradient), :math:`P_e` the
    mean probability that the router gives it.

    Args:
        sites: pattern on the paths of the sites that count.

    Raises:
        PliantError: where no recorded site matches, or one was decided without scores.

    >>> scores = torch.tensor([[[9.0, 0.0], [9.0, 0.0]]])
    >>> trace = Trace({"a": (Decision(torch.ones(1, 2, 2), scores=scores),)}, (), (), 1)
    >>> SwitchBalance()(torch.zeros(1, 4), trace, torch.zeros(1), 0.0).round(decimals=3)
    tensor(2.)

    References:
        Survey section 2.1.2 (2); Fedus et al., Switch Transformers, JMLR 2022.
    """

    def of(self, decision: Decision) -> Tensor:
        """How far from equal shares, at least 1 where probabilities follow the choices."""
        if decision.scores is None:
            raise PliantError(
                got="a decision without scores",
                expected="one of a rule that reads them",
                do="train with pliant.rules.Switch",
            )
        p = decision.scores.flatten(0, -2).softmax(-1)
        shares = torch.zeros_like(p).scatter(-1, p.argmax(-1, keepdim=True), 1.0).mean(0)
        return p.shape[1] * (shares.detach() * p.mean(0)).sum()
