"""Training in phases, declared as data and run on Lightning Fabric. A plain PyTorch loop stays possible."""

from __future__ import annotations

from pliant.train.fit import Fit, History, Loss, fit
from pliant.train.phases import Phase, plan

__all__ = ["Fit", "History", "Loss", "Phase", "fit", "plan"]
