"""What the machinery costs when it saves nothing: every site forced on, against the plain backbone.

    python benchmarks/overhead.py --json benchmarks/results/overhead.json

For each model, in turn on one thread:

- plain: ``pliant.plain(model)``, the backbone to its last answer, no other head, no site
- base: what the forced model has to compute anyway. For exits, every stage and every head (all heads are part of the dense
  cost), called one after the other by hand; for gated blocks it is the same as plain
- forced: ``pliant.bind(model, {"*": Always()})``
- recorded: ``pliant.record(forced)``
- scored: thresholds at -inf, so that every scorer runs and every row goes on; not part of the bounds

The bounds: forced at most 5 % over base at 64 rows and 12 % at one; recorded at most 2 % of base more. Seconds are processor
time of the one thread, wall-clock ones stand beside them in the file. Percentages are medians over the rounds of the ratio
within a round: what a drifting machine disturbs least.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import ALLOCATORS, CLOCKS, allocator, assert_same, calibrated, environment, in_turn, save, with_heads
from rich.console import Console
from rich.table import Table
from torch import nn

import pliant
from pliant.cost.meter import threads
from pliant.execute import Exits
from pliant.rules import Always, Threshold
from pliant.systems.depth.convnet_aig import convnet_aig
from pliant.systems.depth.msdnet import msdnet
from pliant.systems.depth.sdn import sdn

MODELS: dict[str, Callable[[], nn.Module]] = {
    "msdnet, small (5 exits, base 1, step 1)": lambda: msdnet(exits=5, base=1, step=1),
    "msdnet, default (7 exits)": msdnet,
    "sdn on resnet20": lambda: sdn(backbone="resnet20"),
    "sdn on resnet56, default": sdn,
    "convnet_aig, 20 layers": lambda: convnet_aig(depth=20),
    "convnet_aig, 110 layers, default": convnet_aig,
}
BOUNDS = {1: 0.12, 64: 0.05}
RECORDING = 0.02


def measure(model: Any, batch: int, rounds: int, seed: int) -> dict[str, Any]:
    """Seconds and ratios of one model at one batch size."""
    x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    plain, forced = pliant.plain(model), pliant.bind(model, {"*": Always()})
    recorded, scored = pliant.record(forced), pliant.bind(model, {"*": Threshold(float("-inf"))})
    exits = isinstance(model, Exits)
    assert_same(forced(x), recorded(x)[0], "recorded against forced", 0.0)
    assert_same(forced(x), scored(x), "scored against forced")
    if type(getattr(model, "answer", None)) in (type(None), pliant.execute.Answer):
        assert_same(forced(x), plain(x), "forced against plain")
    calls: dict[str, Callable[[], object]] = {"plain": lambda: plain(x)}
    if exits:
        calls["base"] = lambda: with_heads(model, x)
    calls |= {"forced": lambda: forced(x), "recorded": lambda: recorded(x), "scored": lambda: scored(x)}
    seconds = in_turn(calls, rounds)
    found: dict[str, Any] = {"batch": batch, "rounds": rounds, "base": "every stage and head" if exits else "plain"}
    for clock in CLOCKS:
        s = seconds[clock]
        base = s["base" if exits else "plain"]

        def over(a: list[float], b: list[float], base: list[float] = base) -> float:
            return statistics.median((p - q) / r for p, q, r in zip(a, b, base, strict=True))

        found[clock] = {
            "seconds": {name: {"minimum": min(t), "median": statistics.median(t)} for name, t in s.items()},
            "forced_over_plain": over(s["forced"], s["plain"], s["plain"]), "forced_over_base": over(s["forced"], base),
            "recorded_over_forced": over(s["recorded"], s["forced"]), "scored_over_base": over(s["scored"], base),
            "forced_over_base_of_minima": min(s["forced"]) / min(base) - 1,
            "recorded_over_forced_of_minima": (min(s["recorded"]) - min(s["forced"])) / min(base),
        }  # fmt: skip
    shown = found["processor"]
    found["held"] = {
        "forced": shown["forced_over_base"] <= BOUNDS[batch] if batch in BOUNDS else None,
        "recorded": shown["recorded_over_forced"] <= RECORDING,
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64], help="batch sizes")
    parser.add_argument("--rounds", type=float, default=1.0, help="factor on the number of rounds")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs")
    parser.add_argument("--clock", choices=list(CLOCKS), default="processor", help="whose seconds the table shows")
    parser.add_argument("--allocator", choices=ALLOCATORS, default="keep", help="whether glibc keeps freed memory")
    args = parser.parse_args()
    console, start = Console(width=150), time.perf_counter()
    found: dict[str, Any] = {
        "environment": environment(args.seed, allocator(args.allocator)),
        "bounds": BOUNDS,
        "rows": [],
    }
    table = Table(
        title=f"Overhead, one thread, {args.clock} seconds (bounds: 5 % at 64 rows, 12 % at 1; recording 2 %)"
    )
    for head in (
        "model",
        "batch",
        "plain ms",
        "base ms",
        "forced over plain",
        "over base",
        "recording",
        "scoring too",
        "",
    ):
        table.add_column(head, justify="left" if head == "model" else "right")
    with threads(1), torch.inference_mode():
        for name, make in MODELS.items():
            torch.manual_seed(args.seed)
            model = calibrated(make(), (3, 32, 32), seed=args.seed)
            for batch in args.batches:
                row = measure(model, batch, max(5, round(args.rounds * (80 if batch < 8 else 12))), args.seed)
                found["rows"].append({"model": name, **row})
                shown = row[args.clock]
                base = shown["seconds"]["base" if "base" in shown["seconds"] else "plain"]["minimum"]
                table.add_row(
                    name, str(batch), f"{shown['seconds']['plain']['minimum'] * 1e3:.2f}", f"{base * 1e3:.2f}",
                    *(
                        f"{100 * shown[k]:+.1f} %" for k in
                        ("forced_over_plain", "forced_over_base", "recorded_over_forced", "scored_over_base")
                    ),
                    "held" if all(v in (True, None) for v in row["held"].values()) else "NOT held",
                )  # fmt: skip
    console.print(table)
    found["seconds"] = round(time.perf_counter() - start, 1)
    console.print(f"{found['environment']['cpu']}, torch {torch.__version__}, one thread, {found['seconds']} s in all")
    save(args.json, found)


if __name__ == "__main__":
    main()
