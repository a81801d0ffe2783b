"""The items of the public contract; ``pliant.check`` runs them."""

from __future__ import annotations
