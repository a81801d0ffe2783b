"""Losses: functions of (prediction, trace, target, progress), collected in one place, each added exactly once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from pliant.core.errors import PliantError
from pliant.core.trace import Trace
from pliant.losses.balance import Importance, Load, SwitchBalance, load
from pliant.losses.baselines import Critic, JointCritic, LeaveOneOut, MovingAverage, ValueLoss, learned, nothing
from pliant.losses.conflict import conflict
from pliant.losses.cost import BlockBounds, FlopsBudget, ResourceAware
from pliant.losses.distill import (
    OneForAll,
    Sandwich,
    SubnetworkDistillation,
    TaughtExits,
    everywhere,
    last_exit,
    next_exit,
    previous_exit,
    where_right,
)
from pliant.losses.exits import CrossEntropy, MultiExit, by_cost, by_depth, constant, ramped
from pliant.losses.further import Again, Further, dense, frozen, itself
from pliant.losses.levels import LevelTarget, level_shares
from pliant.losses.margins import MarginReturns
from pliant.losses.points import PointLoss, Pointwise
from pliant.losses.policy import (
    EntropyBonus,
    Hybrid,
    Reinforce,
    SelfCritical,
    bernoulli,
    categorical,
    greedy,
    surrogate,
)
from pliant.losses.ponder import Ponder, ponder, steps
from pliant.losses.ranking import Ranking, saliency_ranking
from pliant.losses.rate import GateL1, GlobalTargetRate, TargetRate, above, hard, scored, soft, squared
from pliant.losses.rewards import (
    BlockDropReward,
    Dual,
    MarginGain,
    Priced,
    SkipNetReturns,
    StepPenalty,
    minus_loss,
    returns,
    right,
    spent,
    used,
)
from pliant.losses.saving import Saving
from pliant.losses.schedule import Scheduled, falling, rising
from pliant.losses.value import QLearning

Term = Callable[[Tensor, Trace, Tensor, float], Tensor] | Further

__all__ = [
    "Again", "BlockBounds", "BlockDropReward", "Critic", "CrossEntropy", "Dual", "EntropyBonus", "FlopsBudget",
    "Further", "GateL1", "GlobalTargetRate", "Hybrid", "Importance", "JointCritic", "LeaveOneOut", "LevelTarget", "Load", "MarginGain",
    "MarginReturns", "MovingAverage", "MultiExit",
    "OneForAll", "PointLoss", "Pointwise", "Ponder", "Priced", "QLearning", "Ranking", "Reinforce", "ResourceAware",
    "Sandwich", "Saving", "Scheduled", "SelfCritical", "SkipNetReturns", "StepPenalty", "SubnetworkDistillation", "SwitchBalance", "TargetRate",
    "TaughtExits", "Term", "Total", "ValueLoss", "above", "bernoulli", "by_cost", "by_depth", "categorical",
    "conflict", "constant", "dense", "everywhere", "falling", "frozen", "greedy", "hard", "itself", "last_exit",
    "learned", "level_shares", "load", "minus_loss", "next_exit", "nothing", "ponder", "previous_exit", "ramped", "returns", "right",
    "rising", "saliency_ranking", "scored", "soft", "spent", "squared", "steps", "surrogate", "used", "where_right",
]  # fmt: skip


class Total:
    """Named terms with their weights; training minimises the sum and logs each by its name.

    Args:
        terms: from name to (weight, term).

    Raises:
        PliantError: where there are no terms.

    >>> import torch
    >>> total = Total({"task": (2.0, CrossEntropy())})
    >>> total(torch.zeros(2, 4), None, torch.tensor([0, 1]), 0.0)
    {'task': tensor(2.7726)}
    """

    def __init__(self, terms: Mapping[str, tuple[float, Term]]) -> None:
        if not terms:
            raise PliantError(
                got="no loss terms", expected="at least one", do='pass e.g. {"task": (1.0, CrossEntropy())}'
            )
        self.terms = dict(terms)

    def __call__(
        self, y: Tensor, trace: Trace, target: Tensor, progress: float, again: Again | None = None
    ) -> dict[str, Tensor]:
        """Every term, weighted, by name; ``again`` makes the passes that some terms read, as ``fit`` does."""
        found: dict[str, Tensor] = {}
        for name, (weight, term) in self.terms.items():
            if not isinstance(term, Further):
                found[name] = weight * term(y, trace, target, progress)
            elif again is None:
                raise PliantError(
                    got=f"the term {name!r}, which reads another pass on the same inputs",
                    expected="again=, which makes it",
                    do="train with fit(...), or pass again=lambda term: record(term.other(model))(x)",
                )
            else:
                found[name] = weight * term(y, trace, target, progress, again(term))
        return found

    @property
    def further(self) -> list[Further]:
        """The terms that read another pass."""
        return [term for _, term in self.terms.values() if isinstance(term, Further)]
