"""How a gradient passes a discrete value: each estimator wraps a rule."""

from __future__ import annotations

from pliant.estimators.base import Estimator
from pliant.estimators.counted import Counted
from pliant.estimators.gaussian import Gaussian
from pliant.estimators.gumbel import (
    BinaryConcrete,
    Gumbel,
    GumbelOneHot,
    GumbelSample,
    GumbelSoftmax,
    concrete_log_density,
)
from pliant.estimators.hard_concrete import HardConcrete, SoftBinaryConcrete
from pliant.estimators.ranked import RankStraightThrough
from pliant.estimators.schedules import Decay, Ramp
from pliant.estimators.score_function import Categorical, EpsilonGreedy, EpsilonGreedyOneHot, ScoreFunction
from pliant.estimators.semantic_hashing import SemHash
from pliant.estimators.straight_through import StochasticStraightThrough, StraightThrough
from pliant.estimators.surrogates import Clipped, Copy, HardSigmoid, Rounding, Sigmoid, Surrogate

__all__ = [
    "BinaryConcrete",
    "Categorical",
    "Clipped",
    "Copy",
    "Counted",
    "Decay",
    "EpsilonGreedy",
    "EpsilonGreedyOneHot",
    "Estimator",
    "Gaussian",
    "Gumbel",
    "GumbelOneHot",
    "GumbelSample",
    "GumbelSoftmax",
    "HardConcrete",
    "HardSigmoid",
    "Ramp",
    "RankStraightThrough",
    "Rounding",
    "ScoreFunction",
    "SemHash",
    "Sigmoid",
    "SoftBinaryConcrete",
    "StochasticStraightThrough",
    "StraightThrough",
    "Surrogate",
    "concrete_log_density",
]
