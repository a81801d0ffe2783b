"""Make your own model dynamic: exits and gates for any module whose layers pass a batch along."""

from __future__ import annotations

from pliant.retrofit.attach import exits
from pliant.retrofit.skips import skips

__all__ = ["exits", "skips"]
