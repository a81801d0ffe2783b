"""Terms that read a second pass on the same inputs: by the dense network, a frozen teacher, another choice of rules."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pliant.core.bind import bind, share
from pliant.core.trace import Trace
from pliant.rules.fixed import Always

Other = Callable[[nn.Module], nn.Module]
"""From the model in training to what shall run on the same inputs."""
Again = Callable[["Further"], tuple[Any, Trace]]
"""Runs a term's other network on the inputs of the call that the loss is about."""


class Further(ABC):
    """A term that reads another pass. ``fit`` runs it after the model's own, in every step.

    No gradient is kept of it, unless ``learns = True`` says that the term trains the other pass too.

    Args:
        other: asked once a phase for the network to run, e.g. :func:`dense` or ``frozen(teacher)``.
    """

    learns: bool = False

    def __init__(self, other: Other) -> None:
        self.other = other

    @abstractmethod
    def __call__(self, y: Tensor, trace: Trace, target: Tensor, progress: float, further: tuple[Any, Trace]) -> Tensor:
        """The term, given also the other network's prediction and trace."""


def dense(model: nn.Module) -> nn.Module:
    """The model with every site at 1, sharing all tensors; its batch norms use the batch and leave the statistics alone.

    >>> import pliant
    >>> model = pliant.create_model("convnet_aig", depth=8)
    >>> next(dense(model).parameters()) is next(model.parameters())
    True
    """
    return _still(bind(model, {"*": Always()}))


def itself(model: nn.Module) -> nn.Module:
    """The model once more, sharing all tensors, its batch norms' statistics left alone."""
    return _still(share(model))


def frozen(teacher: nn.Module) -> Other:
    """``teacher`` as it is, in evaluation mode, whatever the model; a copy, so that what it's copied from may train on.

    >>> frozen(nn.Linear(2, 2))(nn.Linear(2, 3))
    Linear(in_features=2, out_features=2, bias=True)
    """
    kept = copy.deepcopy(teacher).eval().requires_grad_(False)
    return lambda model: kept


def _still(other: nn.Module) -> nn.Module:
    """Norms in training mode that don't track what they see."""
    for module in other.modules():
        if module.training and getattr(module, "track_running_stats", False):
            module.track_running_stats = False  # pyright: ignore[reportArgumentType]
    return other
