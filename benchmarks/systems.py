"""Seconds beside FLOPs, system by system: how much of what decisions promise the clock confirms, and what soft ones cost.

    python benchmarks/systems.py --json benchmarks/results/systems.json

All calls of a row run in turn on one thread, with the same weights; outputs are compared first. Other systems are in exits.py,
routes.py, pixels.py, steps.py and kernels.py.

The first table is of systems that leave something out. ``dense`` is the model with ``Always`` at every site, so no scorer is asked and
everything runs once; ``dynamic`` is the model with decisions drawn at random at the given rate and replayed, so that the row
indices are as ragged as can be. ``kept`` is (dense s / dynamic s) / (dense FLOPs / dynamic FLOPs): 1 is all that was promised.

The second is of soft systems, which run everything and add to it: FLOPs and seconds of the model over those of the network without.
All ratios are medians over the rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import ALLOCATORS, CLOCKS, Call, allocator, assert_same, environment, in_turn, save
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import pliant
from pliant import create_model, rules
from pliant.cost.meter import threads

Draw = Callable[[int], Tensor]
VOCABULARY = 1_000


def images(*shape: int) -> Draw:
    """Rows of normal noise."""
    return lambda rows: torch.randn(rows, *shape)


def words(length: int) -> Draw:
    """Texts without padding."""
    return lambda rows: torch.randint(1, VOCABULARY, (rows, length))


def text(id: str, **settings: Any) -> Callable[[], nn.Module]:
    """A system that reads words."""
    return lambda: create_model(id, words=VOCABULARY, **settings)


def system(id: str, **settings: Any) -> Callable[[], nn.Module]:
    """A system by its id."""
    return lambda: create_model(id, **settings)


SMALL, WIDE = images(3, 32, 32), {"width": 128, "layers": 6}
SKIPS: dict[str, tuple[Callable[[], nn.Module], Draw]] = {
    "skipnet": (system("skipnet"), SMALL),
    "blockdrop": (system("blockdrop"), SMALL),
    "dfs, 8 and 16 bits": (system("dfs", depth=20, bits=(8, 16)), SMALL),
    "dfs, skip or not": (system("dfs", depth=20, bits=()), SMALL),
    "resnet_act": (system("resnet_act"), SMALL),
    "sact": (system("sact"), SMALL),
    "deebert": (text("deebert", length=64, **WIDE), words(64)),
    "pabee": (text("pabee", length=64, **WIDE), words(64)),
    "sparsely_gated_moe": (text("sparsely_gated_moe", width=128, hidden=512), words(64)),
    "switch_transformer": (text("switch_transformer", width=128), words(128)),
    "pointrend": (system("pointrend", hidden=256), images(3, 64, 64)),
    "lstm_jump": (text("lstm_jump", hidden=256), words(200)),
    "adaframe": (system("adaframe"), images(16, 3, 32, 32)),
    "scsampler": (system("scsampler"), images(16, 3, 32, 32)),
}  # fmt: skip
SOFT: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], nn.Module], Draw]] = {
    "senet": (system("senet"), pliant.plain, SMALL),
    "dy_relu": (system("dy_relu"), pliant.plain, SMALL),
    "condconv": (system("condconv"), pliant.plain, SMALL),
    "deform_conv_v2": (system("deform_conv_v2"), pliant.plain, SMALL),
    "hypernetworks, a layer-norm LSTM without": (system("hypernetworks"), pliant.plain, images(50, 60)),
    "stn, 16 of 32 pixels a side": (system("stn", size=16), pliant.plain, SMALL),
    "carafe, bilinear without": (system("carafe"), lambda _: create_model("carafe", upsample="bilinear"), images(3, 64, 64)),
    "dfn, filters given without": (system("dfn", num_classes=2, in_chans=3), lambda m: m, images(3, 32, 32)),
}  # fmt: skip


def compared(calls: dict[str, Call], rounds: int, promised: float) -> dict[str, Any]:
    """Speed of "dynamic" over "dense", and how much of what was promised that is, by both clocks."""
    row: dict[str, Any] = {}
    for clock, found in in_turn(calls, rounds).items():
        ratio = statistics.median(a / b for a, b in zip(found["dense"], found["dynamic"], strict=True))
        least = {f"{name}_s": min(times) for name, times in found.items()}
        row[clock] = {"speed_up": ratio, "kept": ratio / promised, **least}
    return row


def replayed(model: nn.Module, x: Tensor) -> nn.Module:
    """``model`` with its own decisions on ``x`` given."""
    return pliant.bind(model, {"*": rules.Given(pliant.record(pliant.masked(model))(x)[1])})


def skips(name: str, batch: int, rate: float, rounds: int) -> dict[str, Any]:
    """One system that leaves something out, at one batch size and rate of open sites."""
    build, draw = SKIPS[name]
    torch.manual_seed(0)
    model, x = build().eval(), draw(batch)
    dense = pliant.bind(model, {"*": rules.Always()})
    drawn = pliant.bind(model, {"*": rules.Random(rate, torch.Generator().manual_seed(2))})
    dynamic = replayed(drawn, x)
    y, ran = pliant.record(dynamic)(x)
    assert_same(y, pliant.masked(dynamic)(x), f"{name}: gathered against masked", 1e-3)
    promised = float(ran.dense_flops.double().sum() / ran.flops.double().sum())
    calls: dict[str, Call] = {"dense": lambda: dense(x), "dynamic": lambda: dynamic(x)}
    return {"model": name, "batch": batch, "rate": rate, "promised": promised, **compared(calls, rounds, promised)}


def soft(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """One soft system beside the network without."""
    build, without, draw = SOFT[name]
    torch.manual_seed(0)
    model, x = build().eval(), draw(batch)
    static = without(model).eval()
    static = replayed(model, x) if static is model else static
    assert_same(model(x), pliant.masked(model)(x), f"{name}: gathered against masked", 1e-3)
    flops = [float(pliant.record(m)(x)[1].flops.double().sum()) for m in (static, model)]
    calls: dict[str, Call] = {"dense": lambda: static(x), "dynamic": lambda: model(x)}
    row = compared(calls, rounds, flops[0] / flops[1] if flops[0] else 1.0)
    return {"model": name, "batch": batch, "flops": flops[1] / flops[0] if flops[0] else None, **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="batch sizes")
    parser.add_argument("--rate", type=float, default=0.25, help="share of open gates")
    parser.add_argument("--rounds", type=int, default=7, help="of each call")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="processor", help="whose seconds the tables show; the file has both"
    )
    parser.add_argument("--allocator", choices=ALLOCATORS, default="keep", help="whether glibc keeps freed memory")
    args = parser.parse_args()
    console, start = Console(width=130), time.perf_counter()
    found: dict[str, Any] = {"environment": environment(0, allocator(args.allocator)), "skips": [], "soft": []}
    table = Table(title=f"One thread, {args.clock} seconds, {args.rate:.0%} of gates open")
    for head in ("model", "batch", "dense ms", "dynamic ms", "speed-up", "promised", "kept"):
        table.add_column(head, justify="left" if head == "model" else "right")
    with threads(1), torch.inference_mode():
        for name in SKIPS:
            for batch in args.batches:
                row = skips(name, batch, args.rate, args.rounds)
                found["skips"].append(row)
                s = row[args.clock]
                table.add_row(
                    name, str(batch), f"{s['dense_s'] * 1e3:.2f}", f"{s['dynamic_s'] * 1e3:.2f}", f"{s['speed_up']:.2f}",
                    f"{row['promised']:.2f}", f"{s['kept']:.2f}",
                )  # fmt: skip
        console.print(table)
        table = Table("model", "batch", "FLOPs", "seconds", "ms", title="Soft systems over the network without")
        for name in SOFT:
            for batch in args.batches:
                row = soft(name, batch, args.rounds)
                found["soft"].append(row)
                s = row[args.clock]
                flops = "none without" if row["flops"] is None else f"{row['flops']:.3f}"
                table.add_row(name, str(batch), flops, f"{1 / s['speed_up']:.2f}", f"{s['dynamic_s'] * 1e3:.2f}")
        console.print(table)
    found["seconds"] = round(time.perf_counter() - start, 1)
    console.print(f"{found['environment']['cpu']}, torch {torch.__version__}, one thread, {found['seconds']} s in all")
    save(args.json, found)


if __name__ == "__main__":
    main()
