"""pliant: dynamic neural networks whose skipping is real and whose numbers are measured."""

from __future__ import annotations

from pliant import cost, estimators, execute, losses, rules, scores
from pliant.core import (
    Decision,
    Executor,
    Exit,
    PliantError,
    Rule,
    Score,
    Site,
    Trace,
    bind,
    gathered,
    masked,
    plain,
    record,
    sites,
)  # fmt: skip
from pliant.systems.table import create_model, list_models
from pliant.tune import OperatingPoint, tune

__all__ = [
    "Decision", "Executor", "Exit", "OperatingPoint", "PliantError", "Rule", "Score", "Site", "Trace", "bind", "cost", "create_model",
    "data", "estimators", "execute", "gathered", "losses", "list_models", "masked", "plain", "record", "rules", "scores", "sites", "tune",
]  # fmt: skip
__version__ = "0.1.0"
