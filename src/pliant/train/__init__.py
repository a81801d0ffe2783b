"""Training in phases, declared as data and run on Lightning Fabric. A plain PyTorch loop stays possible."""

from __future__ import annotations

from pliant.train.bound import Curriculum, PlanCurriculum
from pliant.train.fit import Fit, History, fit
from pliant.train.phases import Loss, Phase, plan
from pliant.train.recipes import agent_on_backbone, alternating, exits_on_backbone, relaxed_to_hybrid
from pliant.train.stop import Plateau

__all__ = [
    "Curriculum", "Fit", "History", "Loss", "Phase", "PlanCurriculum", "Plateau", "agent_on_backbone", "alternating", "exits_on_backbone",
    "fit", "plan", "relaxed_to_hybrid",
]  # fmt: skip
