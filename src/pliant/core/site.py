"""Site: a score meets a rule; the outcome is a Decision."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pliant.core import tape
from pliant.core.decision import Decision
from pliant.core.errors import PliantError


@dataclass(frozen=True)
class Outcome:
    """What a rule makes of scores: the value, and where the rule has them a soft stand-in and a log-probability.

    With ``weight`` the value may lie strictly between 0 and 1, so executors multiply by it; a ``soft`` that is the very
    ``value`` says the same.
    """

    value: Tensor
    soft: Tensor | None = None
    log_prob: Tensor | None = None
    weight: bool = False


class Score(nn.Module, ABC):
    """Turns features into scores; how much each row wants the computation that the site controls.

    A scorer that needs what earlier sites of a chain saw overrides :meth:`step` and hands a state on, rows first.
    Any other module that maps features to scores serves as well.
    """

    @abstractmethod
    def forward(self, x: Any) -> Tensor:
        """Scores of ``x``, rows first."""

    def step(self, x: Any, carry: Any) -> tuple[Tensor, Any]:
        """Scores of ``x`` given the state of the chain so far, and the state to hand on."""
        return self(x), carry


class Rule(nn.Module, ABC):
    """Turns scores into a value. Spends where a score is above the threshold; a NaN score always spends.

    A rule with ``reads_scores = False`` gets zeros of the decision's shape instead, and the scorer isn't run. One with
    ``value_based = True`` says that scores are values of actions, which a loss reads (Q-learning): choices pass no gradient.
    ``spends = False`` decides a number on which no cost hangs, such as a place; tuning leaves it alone.
    """

    reads_scores: bool = True
    value_based: bool = False
    spends: bool = True

    @abstractmethod
    def forward(self, scores: Tensor) -> Outcome:
        """The outcome for ``scores``."""

    def at(self, visit: int) -> Rule:
        """The rule for a loop's ``visit``-th time at its site: the same one, but where it replays."""
        return self

    def equal(self) -> Rule:
        """The rule where as many of its choices must spend in every row, a tensor's size: the same one, but where it draws."""
        return self

    def count(self, choices: int) -> int | None:
        """How many of a row's ``choices`` spend, where that's known beforehand and the same for every row."""
        return None

    def attach(self, path: str) -> None:
        """Called by ``bind`` with the path of the site that this rule now serves."""

    def replaces(self, rule: Rule) -> None:
        """Called by ``bind`` with the rule that decided here before."""

    def settle(self, model: nn.Module) -> None:
        """Called by ``bind`` with the bound model, once every rule is in its place."""


class Site(nn.Module):
    r"""A named place where a choice is made: :math:`d = \mathrm{rule}(\mathrm{scorer}(x))`.

    The name of a site is its path in ``named_modules()``. A scorer whose scores the rule doesn't read isn't run.

    Shape:
        ``x``: whatever the scorer takes, rows first (:math:`R` rows); the value is :math:`(R, *\text{shape})`.

    Args:
        scorer: a :class:`Score`, or any module from features to scores.
        rule: a :class:`Rule`.
        shape: trailing shape of the decision, needed only by rules that read no scores.

    Raises:
        PliantError: where ``given`` or the scores have another number of rows than ``x``.

    >>> import torch, pliant
    >>> site = Site(pliant.scores.MaxProbability(), pliant.rules.Threshold(0.3))
    >>> site(torch.tensor([[4.0, 0.0], [0.1, 0.0]])).value
    tensor([0., 1.])

    References:
        Survey section 5.1 (confidence, policy networks, gating functions).
    """

    sized = False
    """Whether the number of choices that spend is the size of a tensor, such as tokens kept: the same for every row."""

    def __init__(self, scorer: nn.Module, rule: Rule, *, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.scorer = scorer
        self.rule = rule
        self.shape = shape

    def forward(
        self, x: Any, *, given: Tensor | Outcome | None = None, carry: Any = None, visit: int | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> Decision:  # fmt: skip
        """Decide for every row of ``x``; what is ``given`` is taken as it is and nothing is scored.

        An outcome also says by which soft value the giver decided, so that an expected cost has its gradient. A loop
        passes the number of its ``visit``, so that a trace of it can be replayed visit by visit. An executor whose
        decisions have a trailing ``shape`` that hangs on the input's (a map) passes it; every value must have it then.
        """
        here = tape.here()
        rule = self.rule if visit is None else self.rule.at(visit)
        rule = rule.equal() if self.sized else rule
        if visit is None:
            visit = 0 if here.tape is None else here.tape.visits(self)
        first = x if isinstance(x, Tensor) else _first(x)
        rows = first.shape[0]
        scores: Tensor | None = None
        if given is not None:
            outcome = given if isinstance(given, Outcome) else Outcome(given)
        else:
            if not rule.reads_scores:
                outcome = rule(first.new_zeros((rows, *(self.shape if shape is None else shape))))
            else:
                if here.tape is None:
                    scores, carry = self._score(x, carry)
                else:
                    with tape.part(self, visit, "score"):
                        scores, carry = self._score(x, carry)
                outcome = rule(scores)
        value = outcome.value
        if value.shape[0] != rows:
            raise _wrong_rows(value, rows)
        if shape is not None and value.shape[1:] != shape:
            raise PliantError(
                got=f"a decision of shape {tuple(value.shape)}",
                expected=f"({rows}, {', '.join(map(str, shape))})",
                do="let the scorer, the rule or given= say one value for each of these",
            )
        decision = Decision(
            value, scores, outcome.soft, outcome.log_prob, here.rows, here.reached, carry, visit, outcome.weight
        )
        if here.tape is not None:
            here.tape.decided(self, decision)
        return decision

    def _score(self, x: Any, carry: Any) -> tuple[Tensor, Any]:
        scorer = self.scorer
        return scorer.step(x, carry) if isinstance(scorer, Score) else (scorer(x), carry)


def _first(x: Any) -> Tensor:
    if type(x) is tuple and x and isinstance(x[0], Tensor):  # a recurrent step's input and state: at every step
        return x[0]
    for leaf in pytree.tree_leaves(x):
        if isinstance(leaf, Tensor):
            return leaf
    raise PliantError(got="an input without tensors", expected="at least one", do="pass features to the site")


def _wrong_rows(value: Tensor, rows: int) -> PliantError:
    return PliantError(
        got=f"a decision for {value.shape[0]} rows",
        expected=f"one for each of the {rows} rows in flight",
        do="give values for exactly the rows that come here (a replayed trace must be of the same batch)",
    )
