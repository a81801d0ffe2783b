"""What produces scores: confidences of a prediction, gates on features."""

from __future__ import annotations

from pliant.scores.confidence import Entropy, Margin, MaxProbability, Patience, Pooled
from pliant.scores.gates import LinearGate, MLPGate
from pliant.scores.guard import Guarded, LogitDistance
from pliant.scores.halting import HaltingHead, Remainder
from pliant.scores.place import PlacePolicy
from pliant.scores.policy import Policy, Shrink
from pliant.scores.recurrent import GateMemory, RecurrentGate
from pliant.scores.routes import RouteGate
from pliant.scores.spatial import ConvGate, MaskHead, SqueezeMaskHead

__all__ = [
    "ConvGate", "Entropy", "GateMemory", "Guarded", "HaltingHead", "LinearGate", "LogitDistance", "MLPGate", "Margin",
    "MaskHead", "MaxProbability", "Patience", "PlacePolicy", "Policy", "Pooled", "RecurrentGate", "Remainder", "RouteGate", "Shrink", "SqueezeMaskHead",
]  # fmt: skip
