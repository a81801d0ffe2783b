"""What a site decided: the one record that everything else reads."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Decision:
    r"""What one visit of one site decided; value 1 spends, value 0 saves.

    Shape:
        ``scores``, ``value``, ``soft`` and ``log_prob`` are :math:`(R, ...)`, rows first, with any trailing shape: nothing
        for exits and skips, :math:`(R, C)` for channels, :math:`(R, 1, H, W)` for pixels.

    Args:
        value: 0 or 1 (or a weight in between, for soft rules), in the dtype of the scores.
        scores: how much each row wants the computation; None where the rule reads no scores.
        soft: a differentiable stand-in for ``value``, for losses; None where the rule has none.
        log_prob: log-probability of ``value`` under the rule's distribution, if it sampled.
        rows: index in the original batch of each row, int64; None means all rows in their order.
        reached: which rows really come here when everything is computed (the masked form); None means all.
        carry: state per row that the scorer hands to the next site of a chain.
        visit: how many times this site was visited before in the same recorded call.
        weight: whether the value may lie strictly between 0 and 1; a ``soft`` that is the very ``value`` says so too.

    >>> import torch
    >>> d = Decision(value=torch.tensor([1.0, 0.0]), rows=torch.tensor([3, 5]))
    >>> d.dense(6)
    tensor([0., 0., 0., 1., 0., 0.])
    """

    value: Tensor
    scores: Tensor | None = None
    soft: Tensor | None = None
    log_prob: Tensor | None = None
    rows: Tensor | None = None
    reached: Tensor | None = None
    carry: Any = None
    visit: int = 0
    weight: bool = False

    @property
    def is_weight(self) -> bool:
        """Whether the value may lie strictly between 0 and 1."""
        return self.weight or self.soft is self.value

    def dense(self, batch: int) -> Tensor:
        """The value over the whole batch of ``batch`` rows, 0 (saved) where a row never came here."""
        return self._spread(self.value, batch)

    def dense_soft(self, batch: int) -> Tensor:
        """The soft value over the whole batch where there is one, the hard value elsewhere."""
        return self._spread(self.value if self.soft is None else self.soft, batch)

    def _spread(self, value: Tensor, batch: int) -> Tensor:
        if self.reached is not None:
            value = value * self.reached.to(value.dtype).reshape(-1, *[1] * (value.ndim - 1))
        if self.rows is None:
            return value
        # Added, not copied: an exported set ends in a dummy row that repeats a real one and was never reached.
        return value.new_zeros((batch, *value.shape[1:])).index_add(0, self.rows, value)


_TENSORS = [f.name for f in fields(Decision) if f.name not in ("visit", "weight")]


def _flatten(d: Decision) -> tuple[list[Any], list[Any]]:
    """Only what is there: transforms such as vmap take no None for an output."""
    there = [name for name in _TENSORS if getattr(d, name) is not None]
    return [getattr(d, name) for name in there], [d.visit, d.weight, there]


def _unflatten(values: Any, context: Any) -> Decision:
    visit, weight, there = context
    return Decision(**dict(zip(there, values, strict=True)), visit=visit, weight=weight)


pytree.register_pytree_node(
    Decision, _flatten, _unflatten, serialized_type_name="pliant.Decision",
    to_dumpable_context=lambda c: c, from_dumpable_context=lambda c: c,
)  # fmt: skip
