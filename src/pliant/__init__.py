"""pliant: dynamic neural networks whose skipping is real and whose numbers are measured."""

from __future__ import annotations

from pliant.core.errors import PliantError

__all__ = ["PliantError"]
__version__ = "0.1.0"
