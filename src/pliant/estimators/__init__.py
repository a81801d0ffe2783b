"""How a gradient passes a discrete value: each estimator wraps a rule."""

from __future__ import annotations

from pliant.estimators.base import Estimator
from pliant.estimators.gumbel import Gumbel, GumbelSample
from pliant.estimators.straight_through import StraightThrough

__all__ = ["Estimator", "Gumbel", "GumbelSample", "StraightThrough"]
