"""How much of what masks over pixels promise the clock confirms: residual units, dense and at chosen positions.

    python benchmarks/pixels.py --json benchmarks/results/pixels.json

Every unit runs under masks with a given share of active positions: "blobs" are smoothed noise above a quantile, as learned
masks look; "scattered" positions are drawn one by one, the worst case, since nearly everything is in the dilated mask then.
Masks are given, so mask units aren't timed. All calls of a unit run in turn on one thread. ``dense`` is the plain unit in the
faster of the two memory layouts; ``folded`` is the same after ``pliant.deploy.fold.optimised`` (batch norms folded, weights
packed), for both sides. Seconds are processor time; ratios are medians over rounds of the ratio within a round.

- speed-up: dense seconds / seconds at chosen positions, both as built, or both folded
- promised: dense FLOPs / FLOPs that ran
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import ALLOCATORS, Call, allocator, assert_same, calibrated, environment, in_turn, save
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import pliant
from pliant.cost.meter import threads
from pliant.deploy.fold import optimised
from pliant.execute import Pixels
from pliant.systems.spatial.dynconv import BLOCKS

UNITS = [
    ("bottleneck", 1, 256, 56), ("bottleneck", 8, 256, 28), ("bottleneck", 1, 512, 28), ("basic", 1, 64, 56),
    ("basic", 16, 64, 28), ("basic", 1, 128, 28), ("inverted", 1, 32, 56), ("inverted", 8, 64, 28),
]  # fmt: skip
"""Kind of block, rows, channels outside, side of the map."""
POOL = (
    6  # masks of each sort: a mask that is always the same would meet kernels compiled for its very number of positions
)
MASKS = [("blobs", 0.1), ("blobs", 0.25), ("blobs", 0.4), ("blobs", 0.5), ("scattered", 0.25)]


def blobs(rows: int, side: int, share: float) -> Tensor:
    """Connected regions over about ``share`` of each map."""
    noise = F.avg_pool2d(torch.randn(rows, 1, side + 8, side + 8), 9, 1)
    return (noise > noise.flatten(1).quantile(1 - share, dim=1).reshape(-1, 1, 1, 1)).float()


def scattered(rows: int, side: int, share: float) -> Tensor:
    """Positions drawn each for itself."""
    return (torch.rand(rows, 1, side, side) < share).float()


MAKES: dict[str, Callable[[int, int, float], Tensor]] = {"blobs": blobs, "scattered": scattered}


def unit(kind: str, channels: int, side: int, seed: int) -> nn.Module:
    """A unit of this kind that keeps its size, with batch norms that have seen data."""
    branch, outputs = BLOCKS[kind](channels, channels // 4 if kind == "bottleneck" else channels, 1)
    assert outputs == channels
    site = pliant.Site(pliant.scores.MaskHead(channels), pliant.rules.Threshold(0.0))
    return calibrated(Pixels(branch, site), (channels, side, side), seed=seed, passes=2, batch=2)


def measure(kind: str, rows: int, channels: int, side: int, rounds: int, seed: int) -> list[dict[str, Any]]:
    """Every mask on one unit."""
    torch.manual_seed(seed)
    built: Any = unit(kind, channels, side, seed)
    x = torch.randn(rows, channels, side, side)
    last = x.to(memory_format=torch.channels_last)  # as the answer of a unit before it would be
    folded: Any = optimised(built, last)
    calls: dict[Any, Call] = {
        ("built", "dense"): lambda: built.plain(x), ("built", "dense, channels last"): lambda: built.plain(last),
        ("folded", "dense"): lambda: folded.plain(x), ("folded", "dense, channels last"): lambda: folded.plain(last),
    }  # fmt: skip
    promised: dict[tuple[str, float], float] = {}
    for what, share in MASKS:
        masks = [MAKES[what](rows, side, share) for _ in range(POOL)]
        traces = [pliant.record(built)(last, given=mask)[1] for mask in masks]
        promised[what, share] = float(sum(t.dense_flops.sum() for t in traces) / sum(t.flops.sum() for t in traces))
        for name, model in (("built", built), ("folded", folded)):
            for mask in masks:
                assert_same(model(last, given=mask), pliant.masked(built)(last, given=mask), f"{kind}, {name}")
            following = itertools.cycle(masks)
            calls[name, what, share] = lambda model=model, masks=following: model(last, given=next(masks))
    seconds = in_turn(calls, rounds)["processor"]
    found: list[dict[str, Any]] = []
    for what, share in MASKS:
        row: dict[str, Any] = {
            "unit": kind,
            "rows": rows,
            "channels": channels,
            "side": side,
            "mask": what,
            "share": share,
        }
        row["promised"] = promised[what, share]
        for name in ("built", "folded"):
            denses = [seconds[name, "dense"], seconds[name, "dense, channels last"]]
            dense = min(denses, key=statistics.median)
            ratios = [a / b for a, b in zip(dense, seconds[name, what, share], strict=True)]
            row[name] = {
                "speed_up": statistics.median(ratios),
                "dense_s": min(dense),
                "seconds": min(seconds[name, what, share]),
            }
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--rounds", type=int, default=15, help="of every call")
    parser.add_argument("--seed", type=int, default=0, help="of weights, inputs and masks")
    parser.add_argument("--allocator", choices=ALLOCATORS, default="keep", help="whether glibc keeps freed memory")
    args = parser.parse_args()
    console, start = Console(width=130), time.perf_counter()
    found: dict[str, Any] = {"environment": environment(args.seed, allocator(args.allocator)), "rows": []}
    with threads(1), torch.inference_mode():
        table = Table(title="Residual units at chosen positions, one thread, processor seconds")
        for head in (
            "unit",
            "rows",
            "channels",
            "side",
            "mask",
            "active",
            "promised",
            "as built",
            "folded",
            "dense ms, folded",
        ):
            table.add_column(head, justify="right")
        for kind, rows, channels, side in UNITS:
            for row in measure(kind, rows, channels, side, args.rounds, args.seed):
                table.add_row(
                    kind, str(rows), str(channels), str(side), row["mask"], f"{row['share']:.0%}", f"{row['promised']:.2f}x",
                    f"{row['built']['speed_up']:.2f}x", f"{row['folded']['speed_up']:.2f}x", f"{row['folded']['dense_s'] * 1e3:.2f}",
                )  # fmt: skip
                found["rows"].append(row)
            table.add_section()
    console.print(table)
    found["seconds"] = round(time.perf_counter() - start, 1)
    console.print(f"{found['environment']['cpu']}, torch {torch.__version__}, one thread, {found['seconds']} s in all")
    save(args.json, found)


if __name__ == "__main__":
    main()
