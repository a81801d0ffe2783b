"""How much of what holding, skimming and copying steps promise in FLOPs the clock confirms, and what a fused LSTM would take.

    python benchmarks/steps.py --json benchmarks/results/steps.json

All calls run in turn on one thread. ``dense`` is the plain form: the same cells at every step, in a loop. ``dynamic`` is the model
as it is used, each row deciding for itself by scores and thresholds. ``kept`` is (dense s / dynamic s) / (dense FLOPs / dynamic
FLOPs), medians over the rounds of the ratio within a round: 1 is all that was promised. ``over fused`` is the seconds of an
``nn.LSTM`` of the same size and depth on the same steps over the dynamic ones: above 1, the loop in Python beats it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import ALLOCATORS, CLOCKS, allocator, assert_same, environment, in_turn, save
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import pliant
from pliant.cost.meter import threads

STEPS, WIDTH, WORDS = 60, 100, 1_000
Made = tuple[nn.Module, Callable[[int], Tensor], nn.LSTM]


def skip(hidden: int) -> Made:
    """Rows that update at about every third step, each at its own."""
    model: Any = pliant.create_model("skip_rnn", in_chans=WIDTH, hidden=hidden, bias=-1.1)
    nn.init.normal_(model.loop.cell.increment.weight, std=0.3)
    return model, lambda rows: torch.randn(rows, STEPS, WIDTH), nn.LSTM(WIDTH, hidden, batch_first=True)


def skim(hidden: int) -> Made:
    """Words of which about three quarters are skimmed."""
    model: Any = pliant.create_model("skim_rnn", words=WORDS, hidden=hidden, small=16)
    nn.init.normal_(model.loop.site.scorer.linear.weight, std=1.0)
    model.loop.site.rule.rule.threshold.fill_(0.7)
    return model, lambda rows: torch.randint(1, WORDS, (rows, STEPS)), nn.LSTM(WIDTH, hidden, batch_first=True)


def levels(hidden: int) -> Made:
    """Three levels, of which the upper ones mostly copy."""
    model = pliant.create_model("hm_rnn", num_classes=50, hidden=(hidden,) * 3, embedding=WIDTH, bias=-0.4)
    return model, lambda rows: torch.randint(50, (rows, STEPS)), nn.LSTM(WIDTH, hidden, 3, batch_first=True)


MODELS = {"skip_rnn": skip, "skim_rnn": skim, "hm_rnn": levels}


@torch.no_grad()
def measure(name: str, hidden: int, batch: int, rounds: int) -> dict[str, Any]:
    """One model at one width and batch size."""
    torch.manual_seed(0)
    model, draw, fused = MODELS[name](hidden)
    model.eval()
    x, steps = draw(batch), torch.randn(batch, STEPS, WIDTH)
    dense = pliant.plain(model)
    y, ran = pliant.record(model)(x)
    assert_same(y, pliant.masked(model)(x), "gathered against masked", 1e-3)
    promised = float(ran.dense_flops.double().sum() / ran.flops.double().sum())
    seconds = in_turn({"dense": lambda: dense(x), "dynamic": lambda: model(x), "fused": lambda: fused(steps)}, rounds)
    row: dict[str, Any] = {"model": name, "hidden": hidden, "batch": batch, "promised": promised}
    for clock, found in seconds.items():
        ratio = {
            against: statistics.median(a / b for a, b in zip(found[against], found["dynamic"], strict=True))
            for against in ("dense", "fused")
        }
        row[clock] = {
            "speed_up": ratio["dense"], "kept": ratio["dense"] / promised, "over_fused": ratio["fused"],
            **{f"{call}_s": min(times) for call, times in found.items()},
        }  # fmt: skip
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 512], help="units of a level")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32], help="batch sizes")
    parser.add_argument("--rounds", type=int, default=9, help="of each call")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="processor", help="whose seconds the table shows; the file has both"
    )
    parser.add_argument("--allocator", choices=ALLOCATORS, default="keep", help="whether glibc keeps freed memory")
    args = parser.parse_args()
    console, start = Console(width=120), time.perf_counter()
    found: dict[str, Any] = {"environment": environment(0, allocator(args.allocator)), "rows": []}
    table = Table(title=f"One thread, {args.clock} seconds, {STEPS} steps")
    for head in ("model", "units", "batch", "dense ms", "dynamic ms", "speed-up", "promised", "kept", "over fused"):
        table.add_column(head, justify="left" if head == "model" else "right")
    with threads(1):
        for name in MODELS:
            for hidden in args.hidden:
                for batch in args.batches:
                    row = measure(name, hidden, batch, args.rounds)
                    found["rows"].append(row)
                    s = row[args.clock]
                    table.add_row(
                        name, str(hidden), str(batch), f"{s['dense_s'] * 1e3:.2f}", f"{s['dynamic_s'] * 1e3:.2f}",
                        f"{s['speed_up']:.2f}", f"{row['promised']:.2f}", f"{s['kept']:.2f}", f"{s['over_fused']:.2f}",
                    )  # fmt: skip
    console.print(table)
    found["seconds"] = round(time.perf_counter() - start, 1)
    save(args.json, found)


if __name__ == "__main__":
    main()
