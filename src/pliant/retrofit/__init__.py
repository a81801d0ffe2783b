"""Make your own model dynamic: exits, gates and cascades for any module whose layers pass a batch along."""

from __future__ import annotations

from pliant.retrofit.attach import exits
from pliant.retrofit.cascade import cascade
from pliant.retrofit.causal import causal
from pliant.retrofit.channels import channels
from pliant.retrofit.experts import experts
from pliant.retrofit.fit import fit_routers
from pliant.retrofit.plan import Plan
from pliant.retrofit.skips import skips
from pliant.retrofit.tokens import tokens

__all__ = ["Plan", "cascade", "causal", "channels", "exits", "experts", "fit_routers", "skips", "tokens"]
