"""Chain: gated blocks in a row that hand the scorers' memory on and take one plan for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from pliant.core.errors import PliantError
from pliant.core.site import Outcome
from pliant.execute.levels import Levels
from pliant.execute.skip import Carried, Residual, Skip


def gated(module: nn.Module) -> bool:
    """Whether a block of a chain decides."""
    return isinstance(module, (Skip, Residual, Levels))


class Chain(nn.Module):
    r"""Blocks one after the other, as ``nn.Sequential`` runs them; gates hand their carry on and may be given a plan.

    .. math:: (v_l, m_l) = \mathrm{site}_l(x_l, m_{l-1}), \qquad x_{l+1} = \mathrm{block}_l(x_l; v_l)

    The memory starts empty, unless ``x`` is :class:`Carried` features: then it goes on from theirs and the answer carries it
    too. So chains can be the stages of exits (the first behind :class:`Remember`, heads behind :class:`Forget`), which
    choose the memory's rows along with the features.

    Shape:
        ``x``: what the first block takes, rows first; ``given``: :math:`(R, K)` for the :math:`K` gated blocks in order, or an
        outcome of that shape whose soft value tells the planner's probabilities.

    Args:
        blocks: :class:`Skip` and :class:`Residual` blocks, and any other modules between them.

    Raises:
        PliantError: where there are no blocks, or a plan is for another number of gates.

    >>> import torch, pliant
    >>> def site():
    ...     return pliant.Site(nn.Flatten(0), pliant.rules.Never())
    >>> chain = Chain([Residual(nn.Identity(), site()), nn.ReLU(), Residual(nn.Identity(), site())]).eval()
    >>> chain(torch.ones(2, 1), given=torch.tensor([[1.0, 1.0], [0.0, 1.0]])).flatten()
    tensor([4., 2.])

    References:
        Survey sections 2.1.1 (2b, 2c) and 5.1; Wang et al., SkipNet, ECCV 2018; Wu et al., BlockDrop, CVPR 2018.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        if len(blocks) == 0:
            raise PliantError(got="no blocks", expected="at least one", do="pass Skip and Residual blocks")
        self.blocks = nn.ModuleList(blocks)
        # Looked up once, since what wraps a block later (checkpointing, compiling) is of another type.
        self.gates = [gated(block) for block in blocks]

    def forward(self, x: Any, given: Tensor | Outcome | None = None) -> Any:
        """The last block's output; with the memory after the last gate where ``x`` is :class:`Carried`."""
        plan = given if given is None or isinstance(given, Outcome) else Outcome(given)
        if plan is not None and plan.value.shape[1:] != (sum(self.gates),):
            raise PliantError(
                got=f"a plan of shape {tuple(plan.value.shape)}",
                expected=f"(rows, {sum(self.gates)}), a value for each gated block",
                do="plan all gates of the chain, in order",
            )
        state, gate = x if isinstance(x, Carried) else Carried(x), 0
        for block, decides in zip(self.blocks, self.gates, strict=True):
            if decides:
                state = block(state) if plan is None else block(state, given=_column(plan, gate))
                gate += 1
            else:
                state = Carried(block(state.x), state.carry)
        return state if isinstance(x, Carried) else state.x


def _column(plan: Outcome, gate: int) -> Outcome:
    return Outcome(plan.value[:, gate], None if plan.soft is None else plan.soft[:, gate])


class Remember(nn.Module):
    """Put an empty memory beside the features, before the first of several chains that share it.

    >>> import torch
    >>> Remember()(torch.zeros(1)).carry is None
    True
    """

    def forward(self, x: Any) -> Carried:
        """The features with an empty memory."""
        return Carried(x)


class Forget(nn.Module):
    """The features without the memory, for a head behind a chain that carries one.

    >>> import torch
    >>> Forget()(Carried(torch.ones(1), None))
    tensor([1.])
    """

    def forward(self, x: Carried) -> Any:
        """The features."""
        return x.x
