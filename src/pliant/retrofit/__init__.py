"""Make your own model dynamic: exits for any module whose layers pass a batch along."""

from __future__ import annotations

from pliant.retrofit.attach import exits

__all__ = ["exits"]
