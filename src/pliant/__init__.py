"""pliant: dynamic neural networks whose skipping is real and whose numbers are measured."""

from __future__ import annotations

from pliant import cost, estimators, execute, rules, scores
from pliant.core import (
    Decision, Executor, Exit, PliantError, Rule, Score, Site, Trace, bind, gathered, masked, plain, record, sites,
)  # fmt: skip

__all__ = [
    "Decision", "Executor", "Exit", "PliantError", "Rule", "Score", "Site", "Trace", "bind", "cost", "create_model",
    "data", "estimators", "execute", "gathered", "list_models", "masked", "plain", "record", "rules", "scores", "sites",
]  # fmt: skip
__version__ = "0.1.0"
