"""FLOPs per alternative counted on fake tensors, and what a trace cost by them."""

from __future__ import annotations

from pliant.cost.account import Bill, accounts, expected_flops, expected_shares
from pliant.cost.count import Part, Prices, count, prices
from pliant.cost.meter import Timing, interleaved, realised_share

__all__ = [
    "Bill",
    "Part",
    "Prices",
    "accounts",
    "count",
    "expected_flops",
    "expected_shares",
    "interleaved",
    "prices",
    "realised_share",
    "Timing",
]
