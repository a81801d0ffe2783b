"""Identity on the way forward, a factor on the way back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Scaled(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    r"""The same numbers, whose gradient is scaled: :math:`y = x`, :math:`\partial L / \partial x = c\,\partial L / \partial y`.

    Shape:
        ``x``: any; the result has the same shape and shares its memory.

    Args:
        x: a tensor; where it wants no gradient it comes back as it is.
        factor: :math:`c`.

    Returns:
        ``x``, bit for bit.

    >>> x = torch.ones(2, requires_grad=True)
    >>> scale_gradient(x, 0.25).sum().backward()
    >>> x.grad
    tensor([0.2500, 0.2500])

    References:
        Survey section 5.2.1 (1); Li et al., ICCV 2019.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    return _Scaled.apply(x, factor)  # pyright: ignore[reportReturnType]
