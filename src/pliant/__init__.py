"""pliant: dynamic neural networks whose skipping is real and whose numbers are measured."""

from __future__ import annotations

from pliant import cost, data, estimators, execute, losses, retrofit, rules, scores
from pliant.check import check
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
)
from pliant.deploy import compile, export_onnx, from_pretrained, save_pretrained
from pliant.systems.create import create_model
from pliant.systems.table import list_models
from pliant.tune import OperatingPoint, tune

__all__ = [
    "Decision",
    "Executor",
    "Exit",
    "OperatingPoint",
    "PliantError",
    "Rule",
    "Score",
    "Site",
    "Trace",
    "bind",
    "check",
    "compile",
    "cost",
    "create_model",
    "data",
    "estimators",
    "execute",
    "export_onnx",
    "from_pretrained",
    "gathered",
    "list_models",
    "losses",
    "masked",
    "plain",
    "record",
    "retrofit",
    "rules",
    "save_pretrained",
    "scores",
    "sites",
    "tune",
]
__version__ = "0.1.0"
