"""Forced: some of a plan's columns are on or off, whatever the scores say; another rule decides the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pliant.core.errors import PliantError
from pliant.core.site import Outcome, Rule


class Forced(Rule):
    r"""A rule with some columns out of its hands: :math:`v_k = m_k` where :math:`m_k` is 0 or 1, the rule's where it's None.

    What is forced is no choice: its log-probability is 0 and its soft value is the value, so that no policy loss and no
    entropy sees it. For curricula over a plan, ablations, and "what if block 7 always runs".

    Shape:
        scores :math:`(R, ..., K)`; the value has the same shape.

    Args:
        rule: decides the free columns.
        mask: :math:`m`, :math:`K` of 1 (on), 0 (off) or None (free).

    Raises:
        PliantError: where the mask holds something else, or the scores have another number of columns.

    >>> import pliant
    >>> Forced(pliant.rules.Threshold(0.0), (1, None, 0))(torch.tensor([[-5.0, -5.0, 5.0], [-5.0, 5.0, 5.0]])).value
    tensor([[1., 0., 0.],
            [1., 1., 0.]])

    References:
        Survey section 5.2.2 (3); Wu et al., BlockDrop, CVPR 2018 (curriculum over the last blocks).
    """

    free: Tensor
    on: Tensor

    def __init__(self, rule: Rule, mask: Sequence[int | None]) -> None:
        super().__init__()
        if not set(mask) <= {0, 1, None}:
            raise PliantError(
                got=f"the mask {tuple(mask)}", expected="1, 0 or None for each column", do="pass e.g. (1, None)"
            )
        self.rule = rule
        self.register_buffer("free", torch.tensor([m is None for m in mask]))
        self.register_buffer("on", torch.tensor([float(m or 0) for m in mask]))

    def extra_repr(self) -> str:
        """The mask."""
        pairs = zip(self.free.tolist(), self.on.tolist(), strict=True)
        return "mask=" + "".join("?" if free else str(int(on)) for free, on in pairs)

    def forward(self, scores: Tensor) -> Outcome:
        """The rule's outcome with the forced columns put in."""
        if scores.shape[-1:] != self.free.shape:
            raise PliantError(
                got=f"scores of shape {tuple(scores.shape)}", expected=f"{len(self.free)} columns, as many as the mask has",
                do="give the mask one entry for each planned decision",
            )  # fmt: skip
        out, on = self.rule(scores), self.on.to(scores)

        def put(t: Tensor | None, forced: Tensor) -> Tensor | None:
            return None if t is None else torch.where(self.free, t, forced)

        value = torch.where(self.free, out.value, on)
        soft = value if out.soft is out.value else put(out.soft, on)
        return Outcome(value, soft, put(out.log_prob, torch.zeros_like(on)), out.weight)
