"""Gradient equilibrium: the gradients of a chain's exits are averaged where they meet, not added up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pliant.core.bind import share
from pliant.core.errors import PliantError
from pliant.execute.exits import Exits
from pliant.functional.gradient import scale_gradient

Scale = Callable[[Any, float], Any]
"""From features and a factor to the same features, with the gradient scaled of what shall be in equilibrium."""


def scale_all(x: Any, factor: float) -> Any:
    """Every tensor of the features."""
    return pytree.tree_map(lambda t: scale_gradient(t, factor) if isinstance(t, Tensor) else t, x)


def scale_last(x: Any, factor: float) -> Any:
    """Only the last of a list of features, the one that MSDNet's classifiers read; a tensor by itself."""
    return [*x[:-1], scale_all(x[-1], factor)] if isinstance(x, list) else scale_all(x, factor)


class _Before:
    """A forward pre-hook: unlike a wrapping module it leaves every path and state_dict key as it was, and copies follow."""

    def __init__(self, scale: Scale, factor: float) -> None:
        self.scale, self.factor = scale, factor

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.scale(args[0], self.factor), *args[1:])


def equilibrium(model: nn.Module, *, scale: Scale = scale_all) -> Any:
    r"""A copy of ``model`` that shares its tensors, with gradient equilibrium in every chain of :class:`Exits`.

    .. math:: \nabla_k = \frac{1}{K - k + 1}\, g_{\text{exit } k} + \frac{K - k}{K - k + 1}\, g_\text{deeper}

    is what reaches block :math:`k` of :math:`K`. So the blocks' gradients stop growing with the number of exits behind
    them; the exits' own parameters get their full gradient, and answers don't change by a bit.

    Args:
        model: a chain of exits, or a network that holds some.
        scale: which of a stage's features are scaled: :func:`scale_all`, or :func:`scale_last` for lists of scales of
            which the exits read the last.

    Returns:
        A module of the same type, with the same state_dict.

    Raises:
        PliantError: where there is no chain of exits, one is in equilibrium already, or runs the same part twice.

    >>> import pliant, torch
    >>> from pliant import Site, rules, scores
    >>> chain = Exits([nn.Identity(), nn.Identity()], [nn.Identity(), nn.Identity()],
    ...               [Site(scores.MaxProbability(), rules.Threshold(0.5))])
    >>> x = torch.ones(1, 2, requires_grad=True)
    >>> _, trace = pliant.record(equilibrium(chain).train())(2 * x)
    >>> (3 * trace.exits[0].logits.sum() + 5 * trace.exits[1].logits.sum()).backward()
    >>> x.grad  # 2 (3 / 2 + 5 / 2), where the plain sum is 16
    tensor([[8., 8.]])

    References:
        Survey section 5.2.1 (1); Li et al., Improved Techniques for Training Adaptive Deep Networks, ICCV 2019.

    Differs from the paper: nothing. Its released code scales by 1/(K-k+1) before the fork and by K-k behind it.
    """
    copy = share(model)
    chains = [module for module in copy.modules() if isinstance(module, Exits)]
    if not chains:
        raise PliantError(got="a model without a chain of exits", expected="at least one", do="pass an Exits model")
    for chain in chains:
        total, parts = len(chain.stages), [*list(chain.stages)[1:], *chain.heads]
        hooks = [hook for part in parts for hook in part._forward_pre_hooks.values()]  # pyright: ignore[reportPrivateUsage]
        if len({id(part) for part in parts}) < len(parts) or any(isinstance(hook, _Before) for hook in hooks):
            raise PliantError(
                got="a chain that is in equilibrium already, or runs the same part twice",
                expected="each stage and head once, their gradients as they are",
                do="call equilibrium once, on the chain as it was built",
            )
        for k in range(1, total + 1):
            chain.heads[k - 1].register_forward_pre_hook(_Before(scale, 1 / (total - k + 1)))
            if k < total:
                chain.stages[k].register_forward_pre_hook(_Before(scale, (total - k) / (total - k + 1)))
    return copy
