"""Stateless tensor work; imports nothing of ours."""

from __future__ import annotations

from pliant.functional.gradient import scale_gradient

__all__ = ["scale_gradient"]
