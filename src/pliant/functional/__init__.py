"""Stateless tensor work; imports nothing of ours."""

from __future__ import annotations

from pliant.functional.crop import box_mask, overlap, square, zoom
from pliant.functional.gradient import scale_gradient
from pliant.functional.warp import affine, cells, projective, read, spline, spline_basis

__all__ = [
    "affine", "box_mask", "cells", "overlap", "projective", "read", "scale_gradient", "spline", "spline_basis", "square", "zoom",
]  # fmt: skip
