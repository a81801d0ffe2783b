"""How scores become a value: thresholds, the k best, halting, budgets, fixed rules, soft weights."""

from __future__ import annotations

from pliant.core.site import Rule
from pliant.rules.budget import AtMost
from pliant.rules.experts import Switch, TopKSoftmax
from pliant.rules.fixed import Always, Given, Never, Random
from pliant.rules.forced import Forced
from pliant.rules.halting import Halting
from pliant.rules.place import Regressed, Uniform
from pliant.rules.share import Share
from pliant.rules.smooth_step import SmoothStep
from pliant.rules.soft import ReluTanh, Sigmoid, Softmax, SpatialSoftmax
from pliant.rules.threshold import Threshold
from pliant.rules.topk import Ranked, TopK

__all__ = [
    "Always",
    "AtMost",
    "Forced",
    "Given",
    "Halting",
    "Never",
    "Random",
    "Ranked",
    "Regressed",
    "ReluTanh",
    "Rule",
    "Share",
    "Sigmoid",
    "SmoothStep",
    "Softmax",
    "SpatialSoftmax",
    "Switch",
    "Threshold",
    "TopK",
    "TopKSoftmax",
    "Uniform",
]
