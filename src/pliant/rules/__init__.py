"""How scores become a value: thresholds, fixed rules, soft weights."""

from __future__ import annotations

from pliant.core.site import Rule
from pliant.rules.fixed import Always, Given, Never, Random
from pliant.rules.soft import Sigmoid
from pliant.rules.threshold import Threshold

__all__ = ["Always", "Given", "Never", "Random", "Rule", "Sigmoid", "Threshold"]
