"""Stateless tensor work; imports nothing of ours."""

from __future__ import annotations

from pliant.functional.crop import box_mask, overlap, square, zoom
from pliant.functional.gradient import scale_gradient

__all__ = ["box_mask", "overlap", "scale_gradient", "square", "zoom"]
