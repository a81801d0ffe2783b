"""Recipes of the literature as lists of phases: change any of them with ``dataclasses.replace``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pliant.core.errors import PliantError
from pliant.rules.fixed import Always
from pliant.train.bound import Parts, Rules
from pliant.train.phases import Loss, Phase

AGENT = ("*scorer*",)
"""Parameters of the scorers of all sites, by the name that ``Site`` gives them."""


def agent_on_backbone(
    *, settings: Phase, sampled: Rules, reward: Loss, epochs: Sequence[int] = (10, 10, 5), agent: Sequence[str] = AGENT
) -> list[Phase]:
    """Pre-train with every site on, freeze and train the agent by its reward, then train both (BlockDrop, RNP).

    Args:
        settings: optimiser, rate and so on of all three phases; its name, epochs, train, rules and loss are replaced.
        sampled: while the agent learns, e.g. ``{"*": ScoreFunction(Threshold(0.5))}``, or a ``Curriculum`` that frees it.
        reward: the loss of the agent, with the log-probabilities that the trace holds.
        epochs: of the three phases.
        agent: patterns on the agent's parameters.

    Returns:
        The phases; the first takes the loss of ``fit``.

    Raises:
        PliantError: where not three numbers of epochs are given.

    >>> import pliant
    >>> from pliant.train import plan
    >>> rule = pliant.rules.Random(0.5)
    >>> def reward(y, trace, target, progress):
    ...     return {}
    >>> print(plan(agent_on_backbone(settings=Phase("", 1), sampled={"*": rule}, reward=reward)))
    phase      epochs  optimizer   schedule  trains      anneals  clip  rules             loss
    pre-train      10  sgd lr=0.1  constant  *, !*scorer*  -  -  *: Always()       -
    agent          10  sgd lr=0.1  constant  *scorer*    -        -     *: Random(p=0.5)  reward
    joint           5  sgd lr=0.1  constant  *           -        -     *: Random(p=0.5)  reward

    References:
        Survey section 5.2.2 (3); Wu et al., BlockDrop, CVPR 2018; Lin et al., Runtime Neural Pruning, NeurIPS 2017.
    """
    first, second, third = _lengths(epochs, 3)
    backbone = ("*", *(f"!{pattern}" for pattern in agent))
    free = sampled(second - 1) if callable(sampled) else sampled
    return [
        replace(settings, name="pre-train", epochs=first, train=backbone, rules={"*": Always()}, loss=None),
        replace(settings, name="agent", epochs=second, train=tuple(agent), rules=sampled, loss=reward),
        replace(settings, name="joint", epochs=third, train=("*",), rules=free, loss=reward),
    ]


def relaxed_to_hybrid(
    *,
    settings: Phase,
    relaxed: Parts,
    sampled: Parts,
    hybrid: Loss,
    epochs: Sequence[int] = (10, 3),
    slower: float = 0.1,
) -> list[Phase]:
    """Train with relaxed gates and the loss of ``fit``, then by the hybrid objective on sampled ones (SkipNet).

    Args:
        settings: of both phases; the second has ``slower`` times its rate.
        relaxed: rules with a gradient, e.g. ``{"*": StraightThrough(Threshold(0.5))}``.
        sampled: rules with log-probabilities.
        hybrid: the supervised loss and the reward's together.
        epochs: of the two phases.
        slower: factor of the second phase's rate.

    Raises:
        PliantError: where not two numbers of epochs are given.

    >>> import pliant
    >>> rules = {"*": pliant.rules.Random(0.5)}
    >>> found = relaxed_to_hybrid(settings=Phase("", 1), relaxed={}, sampled=rules, hybrid=lambda y, t, z, p: {})
    >>> [(phase.name, phase.epochs, round(phase.lr, 3)) for phase in found]
    [('relaxed', 10, 0.1), ('hybrid', 3, 0.01)]

    References:
        Survey section 5.2.2 (3); Wang et al., SkipNet, ECCV 2018.
    """
    first, second = _lengths(epochs, 2)
    return [
        replace(settings, name="relaxed", epochs=first, rules=relaxed, loss=None),
        replace(settings, name="hybrid", epochs=second, lr=settings.lr * slower, rules=sampled, loss=hybrid),
    ]


def exits_on_backbone(
    *, settings: Phase, last: Loss, early: Sequence[str], epochs: Sequence[int] = (10, 5)
) -> list[Phase]:
    """Train the backbone by its last exit, freeze it to the byte, then train the early exits alone (DeeBERT, IMTA).

    Args:
        settings: of both phases.
        last: the loss of the last exit alone.
        early: patterns on the parameters of the early exits, e.g. ``("heads.0.*", "heads.1.*")``.
        epochs: of the two phases.

    Raises:
        PliantError: where not two numbers of epochs are given.

    >>> found = exits_on_backbone(settings=Phase("", 1), last=lambda y, t, z, p: {}, early=("heads.0.*",))
    >>> [(phase.name, phase.train) for phase in found]
    [('backbone', ('*', '!heads.0.*')), ('exits', ('heads.0.*',))]

    References:
        Survey section 5.2.2 (3); Xin et al., DeeBERT, ACL 2020; Li et al., IMTA, ICCV 2019.
    """
    first, second = _lengths(epochs, 2)
    backbone = ("*", *(f"!{pattern}" for pattern in early))
    return [
        replace(settings, name="backbone", epochs=first, train=backbone, loss=last, rules={"*": Always()}),
        replace(settings, name="exits", epochs=second, train=tuple(early), loss=None),
    ]


def alternating(a: Phase, b: Phase, rounds: int) -> list[Phase]:
    """``a`` and ``b`` in turn, ``rounds`` times each, with their round in the name (RA-CNN; a stop rule ends each turn).

    Raises:
        PliantError: for fewer than one round.

    >>> [phase.name for phase in alternating(Phase("net", 1), Phase("agent", 2), 2)]
    ['net 1', 'agent 1', 'net 2', 'agent 2']

    References:
        Survey section 5.2.2 (3); Fu et al., RA-CNN, CVPR 2017.
    """
    if rounds < 1:
        raise PliantError(got=f"{rounds} rounds", expected="at least 1", do="raise rounds")
    return [replace(phase, name=f"{phase.name} {k + 1}") for k in range(rounds) for phase in (a, b)]


def _lengths(epochs: Sequence[int], count: int) -> Sequence[int]:
    if len(epochs) != count:
        raise PliantError(
            got=f"epochs={tuple(epochs)}", expected=f"{count} numbers, one for each phase", do="pass them all"
        )
    return epochs
