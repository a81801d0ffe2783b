"""What every estimator is: a rule around a threshold rule."""

from __future__ import annotations

from typing import Any

from pliant.core.errors import PliantError
from pliant.core.site import Rule
from pliant.rules.threshold import Threshold


class Estimator(Rule):
    """Lets a gradient pass the discrete value of ``rule``; knows nothing of executors."""

    rule: Any

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        if not isinstance(rule, Threshold):
            raise PliantError(
                got=f"a {type(rule).__name__} rule",
                expected="a Threshold on logits",
                do="wrap pliant.rules.Threshold(0.0)",
            )
        self.rule = rule
