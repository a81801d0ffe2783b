"""What produces scores: confidences of a prediction, gates on features."""

from __future__ import annotations

from pliant.scores.confidence import Entropy, Margin, MaxProbability, Patience, Pooled, Steady
from pliant.scores.experts import Noise, NoisyRouter, Router
from pliant.scores.gates import LinearGate, MLPGate
from pliant.scores.guard import Guarded, LogitDistance
from pliant.scores.halting import HaltingHead, Remainder
from pliant.scores.jump import WhereToJump, WhetherToJump
from pliant.scores.lookahead import Lookahead
from pliant.scores.mass import ChannelMass, Mass
from pliant.scores.modulation import Excitation, HyperCell, PooledLinear, Saliency, SideConv
from pliant.scores.place import PlacePolicy
from pliant.scores.policy import Policy, Shrink
from pliant.scores.recurrent import GateMemory, RecurrentGate
from pliant.scores.routes import RouteGate
from pliant.scores.saliency import ElementSaliency
from pliant.scores.spatial import ConvGate, KernelPredictor, MaskHead, PointUncertainty, SqueezeMaskHead
from pliant.scores.steps import Pressure, StepGate
from pliant.scores.tokens import TokenAttention, TokenLinear, TokenNorm, TokenNovelty, TokenScore, TokenScored

__all__ = [
    "ChannelMass", "ConvGate", "ElementSaliency", "Entropy", "Excitation", "GateMemory", "Guarded", "HaltingHead", "HyperCell", "KernelPredictor",
    "LinearGate", "LogitDistance", "Lookahead", "MLPGate", "Margin", "MaskHead", "Mass", "MaxProbability", "Noise", "NoisyRouter", "Patience", "PlacePolicy",
    "PointUncertainty", "Policy", "Pooled", "PooledLinear", "Pressure", "RecurrentGate", "Remainder", "RouteGate", "Router", "Saliency",
    "Shrink", "SideConv", "SqueezeMaskHead", "Steady", "StepGate", "TokenAttention", "TokenLinear", "TokenNorm", "TokenNovelty",
    "TokenScore", "TokenScored", "WhereToJump", "WhetherToJump",
]  # fmt: skip
