"""Heads for a host's hidden states, chosen by their shape, never by the host's class."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pliant.core.errors import PliantError


def hidden_of(output: Any, path: str) -> Tensor:
    """The hidden state that a layer returned: a tensor, or the first element of a tuple."""
    hidden = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
        raise PliantError(
            got=f"a layer that returns {_kind(output)}",
            expected="a floating-point tensor with rows first, or a tuple whose first element is one",
            do="name a layer that passes the hidden state on",
            site=path,
        )
    return hidden


def _kind(output: Any) -> str:
    return f"{type(output).__name__} of " + ", ".join(type(t).__name__ for t in pytree.tree_leaves(output)[:4])


class PooledHead(nn.Module):
    r"""Mean over positions, then a linear classifier: :math:`W \bar h + b`.

    Shape:
        hidden :math:`(R, C, H, W)`, :math:`(R, T, D)` or :math:`(R, D)`; ``mask`` :math:`(R, T)`, nonzero where a token
        counts (only for three dimensions); logits :math:`(R, \text{num\_classes})`.

    Args:
        like: a hidden state; its size, dtype and device are taken.
        num_classes: of the host.

    Raises:
        PliantError: where the hidden state has another number of dimensions.

    >>> import torch
    >>> PooledHead(torch.zeros(2, 8, 4, 4), 10)(torch.zeros(2, 8, 4, 4)).shape
    torch.Size([2, 10])

    References:
        Survey section 2.1.1 (1).
    """

    reads_mask = True
    """A head with this attribute is called with ``mask=``, the host's ``attention_mask`` or None."""

    def __init__(self, like: Tensor, num_classes: int) -> None:
        super().__init__()
        if like.ndim not in (2, 3, 4):
            raise PliantError(
                got=f"a hidden state of shape {tuple(like.shape)}",
                expected="(rows, channels, H, W), (rows, tokens, features) or (rows, features)",
                do="pass heads= of your own",
            )
        features = like.shape[1] if like.ndim == 4 else like.shape[-1]
        self.linear = nn.Linear(features, num_classes, device=like.device, dtype=like.dtype)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits of a hidden state."""
        if hidden.ndim == 4:
            return self.linear(hidden.mean((2, 3)))
        if hidden.ndim == 2:
            return self.linear(hidden)
        if mask is None or mask.shape != hidden.shape[:2]:
            return self.linear(hidden.mean(1))
        weight = (mask != 0).to(hidden.dtype).unsqueeze(-1)
        return self.linear((hidden * weight).sum(1) / weight.sum(1).clamp(min=1))
