"""What a value makes run: every executor in a masked and a gathered form that agree."""

from __future__ import annotations

from pliant.execute.exits import Answer, Exits, MostConfident
from pliant.execute.skip import Residual, Skip

__all__ = ["Answer", "Exits", "MostConfident", "Residual", "Skip"]
