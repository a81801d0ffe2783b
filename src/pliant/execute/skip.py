"""Skip: run or bypass a block per row."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pliant.core.executor import Executor
from pliant.core.site import Outcome, Site
from pliant.execute import rows


class Carried(NamedTuple):
    """Features with the scorers' memory along the depth: a gated block that is given it hands both on."""

    x: Any
    carry: Any = None


def opened(x: Any) -> tuple[Any, Any]:
    """Features and the scorers' memory, if any."""
    return x if isinstance(x, Carried) else (x, None)


def closed(like: Any, y: Any, carry: Any) -> Any:
    """Features ``y`` with the memory, where ``like`` came with one."""
    return Carried(y, carry) if isinstance(like, Carried) else y


class Skip(Executor):
    r"""Run a block for the rows that want it and something else for the others.

    .. math:: y = v \cdot \mathrm{block}(x) + (1 - v) \cdot \mathrm{otherwise}(x)

    Shape:
        ``x``: :math:`(R, ...)`; block and ``otherwise`` return the same shape; ``given``: :math:`(R,)`.

    Args:
        block: what value 1 runs.
        site: decides from ``x``.
        otherwise: what value 0 runs; default, ``x`` itself passes.

    >>> import pliant
    >>> skip = Skip(nn.Linear(2, 2), pliant.Site(nn.Flatten(0), pliant.rules.Never())).eval()
    >>> skip(torch.ones(3, 2)).sum()
    tensor(6.)

    References:
        Survey section 2.1.1 (2); Wang et al., SkipNet, ECCV 2018.
    """

    def __init__(self, block: nn.Module, site: Site, *, otherwise: nn.Module | None = None) -> None:
        super().__init__()
        self.block = block
        self.site = site
        self.otherwise = otherwise

    def plain(self, x: Any) -> Any:
        """The block alone."""
        features, carry = opened(x)
        return closed(x, self.block(features), carry)

    def masked(self, x: Any, given: Tensor | Outcome | None = None) -> Any:
        """Both alternatives for every row, mixed by the value."""
        features, carry = opened(x)
        decision = self.site(features, given=given, carry=carry)
        on = rows.run_masked(self.site, decision, 1, self.block, features)
        off = features if self.otherwise is None else rows.run_masked(self.site, decision, 0, self.otherwise, features)
        return closed(x, rows.mix(decision, on, off), decision.carry)

    def gathered(self, x: Any, given: Tensor | Outcome | None = None) -> Any:
        """Each alternative for its own rows."""
        features, carry = opened(x)
        decision = self.site(features, given=given, carry=carry)
        if self.otherwise is None:
            y = rows.run_some(self.site, decision, self.block, (features,), rows.replaced, lambda: features)
        else:
            y = rows.run_either(self.site, decision, (self.otherwise, self.block), features)
        return closed(x, y, decision.carry)


class Residual(Executor):
    r"""Add a branch to its shortcut for the rows that want it.

    .. math:: y = \mathrm{shortcut}(x) + v \cdot \mathrm{branch}(x)

    Shape:
        ``x``: :math:`(R, ...)`; branch and shortcut return the same shape; ``given``: :math:`(R,)`.

    Args:
        branch: the residual branch, what value 1 runs.
        site: decides from ``x``.
        shortcut: always runs; default, the identity.

    >>> import pliant
    >>> block = Residual(nn.Identity(), pliant.Site(nn.Flatten(0), pliant.rules.Always())).eval()
    >>> block(torch.ones(2, 2)).sum()
    tensor(8.)

    References:
        Survey section 2.1.1 (2); Veit and Belongie, ConvNet-AIG, ECCV 2018.
    """

    def __init__(self, branch: nn.Module, site: Site, *, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = branch
        self.site = site
        self.shortcut = nn.Identity() if shortcut is None else shortcut

    def plain(self, x: Any) -> Any:
        """Shortcut and branch, always."""
        features, carry = opened(x)
        return closed(x, self.shortcut(features) + self.branch(features), carry)

    def masked(self, x: Any, given: Tensor | Outcome | None = None) -> Any:
        """The branch for every row, weighted by the value."""
        features, carry = opened(x)
        decision = self.site(features, given=given, carry=carry)
        branch = rows.run_masked(self.site, decision, 1, self.branch, features)
        y = self.shortcut(features) + rows.mix(decision, branch, torch.zeros_like(branch))
        return closed(x, y, decision.carry)

    def gathered(self, x: Any, given: Tensor | Outcome | None = None) -> Any:
        """The branch for the rows that chose it."""
        features, carry = opened(x)
        decision = self.site(features, given=given, carry=carry)
        y = rows.run_some(self.site, decision, self.branch, (features,), rows.added, lambda: self.shortcut(features))
        return closed(x, y, decision.carry)
