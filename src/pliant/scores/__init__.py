"""What produces scores: confidences of a prediction, gates on features."""

from __future__ import annotations

from pliant.scores.confidence import Entropy, Margin, MaxProbability, Patience, Pooled
from pliant.scores.gates import LinearGate, MLPGate
from pliant.scores.halting import HaltingHead, Remainder

__all__ = [
    "Entropy",
    "HaltingHead",
    "LinearGate",
    "MLPGate",
    "Margin",
    "MaxProbability",
    "Patience",
    "Pooled",
    "Remainder",
]
