"""Tokens: of each row only some tokens go on; the others are dropped, or merged into those that do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pliant.core import tape
from pliant.core.decision import Decision
from pliant.core.errors import PliantError
from pliant.core.executor import Executor
from pliant.core.site import Site
from pliant.execute import rows
from pliant.functional.tokens import merge, take


class TokenView(NamedTuple):
    """What a scorer of tokens reads: those that may go (R, C, D), which of them are no padding, and queries and keys."""

    tokens: Tensor
    there: Tensor | None = None
    looks: tuple[Tensor, Tensor] | None = None


class Left(NamedTuple):
    """Tokens that are left (R, n, D), how many each stands for, and where each stood before (None: all stayed)."""

    hidden: Tensor
    size: Tensor | None = None
    order: Tensor | None = None


class Reduce(nn.Module, ABC):
    """What becomes of tokens that don't stay."""

    @abstractmethod
    def forward(self, hidden: Tensor, size: Tensor | None, stay: Tensor, go: Tensor, prefix: int) -> Left:
        """The tokens ``stay`` of each row, given those that ``go``."""


class Drop(Reduce):
    """Tokens that don't stay are gone.

    >>> Drop()(torch.arange(4.0).reshape(1, 4, 1), None, torch.tensor([[0, 3]]), torch.tensor([[1, 2]]), 1).hidden.flatten()
    tensor([0., 3.])

    References:
        Survey section 3.1; Rao et al., DynamicViT, NeurIPS 2021.
    """

    def forward(self, hidden: Tensor, size: Tensor | None, stay: Tensor, go: Tensor, prefix: int) -> Left:
        """Those that stay, as they are."""
        return Left(take(hidden, stay), None if size is None else take(size, stay), stay)


class Merge(Reduce):
    """Tokens that don't stay join the most similar one that does, in the mean of all that it stands for.

    >>> hidden = torch.tensor([[[9.0, 9.0], [2.0, 0.0], [4.0, 0.0], [0.0, 1.0]]])
    >>> Merge()(hidden, None, torch.tensor([[0, 1, 3]]), torch.tensor([[2]]), 1)[:2]
    (tensor([[[9., 9.],
             [3., 0.],
             [0., 1.]]]), tensor([[1., 2., 1.]]))

    References:
        Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023.

    Differs from the paper: a token may join any that stays, not only one of the other half; similar by hidden states, not keys;
    attention isn't weighted by size, since a block of somebody else's has no place for it.
    """

    def forward(self, hidden: Tensor, size: Tensor | None, stay: Tensor, go: Tensor, prefix: int) -> Left:
        """Those that stay, with what joined them."""
        size = hidden.new_ones(hidden.shape[:2]) if size is None else size
        kept, whole = merge(
            take(hidden, stay), take(hidden, go), (take(size, stay), take(size, go)), prefix=prefix
        )  # fmt: skip
        return Left(kept, whole, stay)


class Tokens(Executor):
    r"""Of each row, the tokens that its site chooses go on; the first ``prefix`` (class, registers) always do, and one more.

    .. math:: y = (x_1, \dots, x_p, x_{i_1}, \dots, x_{i_k}), \qquad \{i_1, \dots, i_k\} = \{i : v_i = 1\}

    The next layers see one tensor of :math:`p + k` tokens, so the number is the same in every row: the rule names it
    (:class:`~pliant.rules.Share`), scores choose which. Masked and gathered forms run the same shapes; nothing would be left
    of the skipping to compare otherwise. What later layers cost is counted at the size that was decided.

    Shape:
        ``x`` :math:`(R, T, D)`; returns :math:`(R, p + k, D)`; values :math:`(R, T - p)`.

    Args:
        site: decides from a :class:`TokenView`, as those scores do that have ``Token`` in their name.
        how: what becomes of the others: :class:`Drop` (default) or :class:`Merge`.
        prefix: tokens at the front that always stay.

    Raises:
        PliantError: at the call, where rows keep different numbers of tokens, or ``x`` has other dimensions.

    >>> import pliant
    >>> tokens = Tokens(pliant.Site(pliant.scores.TokenNorm(), pliant.rules.Share(0.5)), prefix=1).eval()
    >>> tokens(torch.tensor([[[9.0], [1.0], [3.0], [2.0], [4.0]]])).flatten()
    tensor([9., 3., 4.])

    References:
        Survey section 3.1; Rao et al., DynamicViT, NeurIPS 2021.
    """

    def __init__(self, site: Site, *, how: Reduce | None = None, prefix: int = 1) -> None:
        super().__init__()
        self.site, self.how, self.prefix = site, Drop() if how is None else how, prefix
        site.sized = True

    def plain(self, x: Tensor) -> Tensor:
        """All of them."""
        return x

    def masked(self, x: Tensor) -> Tensor:
        """Those that stay, as in the other form."""
        return self.step(x).hidden

    def gathered(self, x: Tensor) -> Tensor:
        """Those that stay."""
        return self.step(x).hidden

    def step(
        self, x: Tensor, *, size: Tensor | None = None, there: Tensor | None = None,
        looks: tuple[Tensor, Tensor] | None = None,
    ) -> Left:  # fmt: skip
        """The same, with sizes of merged tokens (R, T), which tokens are no padding (R, T), and what attention saw."""
        if x.ndim != 3:
            raise PliantError(
                got=f"features of shape {tuple(x.shape)}", expected="(rows, tokens, features)",
                do="put it between layers that pass tokens on",
            )  # fmt: skip
        if self.form == "plain":
            return Left(x, size)
        prefix, choices = self.prefix, x.shape[1] - self.prefix
        view = TokenView(x[:, prefix:], None if there is None else there[:, prefix:], looks)
        decision = self.site(view, shape=(choices,))
        k = self._count(decision, choices)
        if tape.tape() is not None:
            units = torch.full((x.shape[0],), k, dtype=torch.int64, device=x.device)
            with tape.part(self.site, decision.visit, tape.SIZE, units=units, of=max(choices, 1)):
                pass
        if rows.same(k, choices):
            return Left(self._weighed(x, decision, None), size)
        # A stable sort of zeros and ones: those that stay come first, in the order in which they stood.
        order = decision.value.detach().argsort(dim=1, descending=True, stable=True)
        front = torch.arange(prefix, device=x.device).expand(x.shape[0], -1)
        stay, go = order.narrow(1, 0, k), order.narrow(1, k, choices - k) + prefix
        left = self.how(x, size, torch.cat([front, stay + prefix], 1), go, prefix)
        return left._replace(hidden=self._weighed(left.hidden, decision, stay))

    def _weighed(self, hidden: Tensor, decision: Decision, stay: Tensor | None) -> Tensor:
        """Times the value where that is a weight or wants a gradient: 1 forward for those that stay."""
        if not rows.weighted(decision):
            return hidden
        value = decision.value if stay is None else take(decision.value, stay)
        return torch.cat([hidden[:, : self.prefix], hidden[:, self.prefix :] * value.unsqueeze(-1)], 1)

    def _count(self, decision: Decision, choices: int) -> int:
        """How many tokens stay behind the prefix, the same in every row."""
        k = self.site.rule.equal().count(choices)
        if k is None:
            k = self._counted(decision, choices)
        return min(max(k, 1), choices) if isinstance(k, int) else k  # else a symbol of an exported graph

    def _counted(self, decision: Decision, choices: int) -> int:
        """As many as the values say. In a replayed masked form, a row without any is one that never came here."""
        if decision.value.shape[0] == 0:
            return choices
        counts = (decision.value > 0).sum(1)
        high: Any = counts.amax().item()
        if torch.compiler.is_exporting():
            torch._check(high >= 1)
            torch._check(high <= choices)
            return high
        low = int(torch.where(counts > 0, counts, high).amin())
        if low != high:
            raise PliantError(
                got=f"{low} to {high} of {choices} tokens kept in the rows of one batch",
                expected="the same number in every row: the next layers take one tensor",
                do="use a rule that ranks, pliant.rules.Share or TopK: scores still choose which ones stay",
            )
        return high
