"""How much of what routing and looking promise in FLOPs the clock confirms.

    python benchmarks/routes.py --json benchmarks/results/routes.json

All calls run in turn on one thread, with the same weights. ``dense`` is the masked form with ``Always`` at every site, so no scorer
is asked and everything runs; ``dynamic`` is the model with decisions drawn at random at the given rate and replayed, so that
the row indices are as ragged as can be. ``kept`` is (dense s / dynamic s) / (dense FLOPs / dynamic FLOPs), both medians over the
rounds of the ratio within a round: 1 is all that was promised.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import ALLOCATORS, CLOCKS, allocator, assert_same, calibrated, environment, in_turn, save
from rich.console import Console
from rich.table import Table
from torch import nn

import pliant
from pliant import rules
from pliant.cost.meter import threads

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "supernet_routing, 4 branches": (lambda: pliant.create_model("supernet_routing"), (3, 32, 32)),
    "dynamic_routing_seg, 8 layers, 3 scales": (
        lambda: pliant.create_model("dynamic_routing_seg", layers=8, scales=3, channels=32), (3, 128, 128),
    ),
    "ranet": (lambda: pliant.create_model("ranet"), (3, 32, 32)),
    "gfnet, 4 looks": (lambda: pliant.create_model("gfnet"), (3, 96, 96)),
    "tel, depth 10 of pixels": (lambda: pliant.create_model("tel", trees=20, depth=10, widths=(8,)), (3, 32, 32)),
}  # fmt: skip


def measure(name: str, batch: int, rate: float, rounds: int) -> dict[str, Any]:
    """One model at one batch size and rate of open sites."""
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model: Any = calibrated(build(), shape, seed=0)
    x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(1))
    dense = pliant.masked(pliant.bind(model, {"*": rules.Always()}))
    drawn = pliant.bind(model, {"*": rules.Random(rate, torch.Generator().manual_seed(2))})
    _, trace = pliant.record(pliant.masked(drawn))(x)
    dynamic = pliant.bind(model, {"*": rules.Given(trace)})
    y, ran = pliant.record(dynamic)(x)
    assert_same(y, pliant.masked(dynamic)(x), "gathered against masked", 1e-3)
    promised = float(ran.dense_flops.double().sum() / ran.flops.double().sum())
    seconds = in_turn({"dense": lambda: dense(x), "dynamic": lambda: dynamic(x)}, rounds)
    row: dict[str, Any] = {"model": name, "batch": batch, "rate": rate, "promised": promised}
    for clock, found in seconds.items():
        ratios = [a / b for a, b in zip(found["dense"], found["dynamic"], strict=True)]
        row[clock] = {
            "speed_up": statistics.median(ratios), "kept": statistics.median(ratios) / promised,
            "dense_s": min(found["dense"]), "dynamic_s": min(found["dynamic"]),
        }  # fmt: skip
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64], help="batch sizes")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.25, 0.5], help="share of open gates")
    parser.add_argument("--rounds", type=int, default=9, help="of each call")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="processor", help="whose seconds the table shows; the file has both"
    )
    parser.add_argument("--allocator", choices=ALLOCATORS, default="keep", help="whether glibc keeps freed memory")
    args = parser.parse_args()
    console, start = Console(width=130), time.perf_counter()
    found: dict[str, Any] = {"environment": environment(0, allocator(args.allocator)), "rows": []}
    table = Table(title=f"One thread, {args.clock} seconds")
    for head in ("model", "batch", "open", "dense ms", "dynamic ms", "speed-up", "promised", "kept"):
        table.add_column(head, justify="left" if head == "model" else "right")
    with threads(1), torch.inference_mode():
        for name in MODELS:
            for batch in args.batches:
                for rate in args.rates:
                    row = measure(name, batch, rate, args.rounds)
                    found["rows"].append(row)
                    s = row[args.clock]
                    table.add_row(
                        name, str(batch), f"{rate:.2f}", f"{s['dense_s'] * 1e3:.2f}", f"{s['dynamic_s'] * 1e3:.2f}",
                        f"{s['speed_up']:.2f}", f"{row['promised']:.2f}", f"{s['kept']:.2f}",
                    )  # fmt: skip
    console.print(table)
    found["seconds"] = round(time.perf_counter() - start, 1)
    save(args.json, found)


if __name__ == "__main__":
    main()
