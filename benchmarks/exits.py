"""How much of what early exits promise the clock confirms: MSDNet dense and dynamic, and a peer on its own workload.

    python benchmarks/exits.py --json benchmarks/results/exits.json

All calls of a row of the table run in turn on one thread, with the same modules in the same optimisation. ``dense`` is every
stage and every head on every row with no site asked. ``dynamic`` is the model as it is used: scores, rules, row
compaction, putting answers back. Its thresholds are such that exactly the wanted rows of the batch leave at each exit.
Seconds are processor time of the one thread, so that others on the machine don't count; wall-clock seconds are
measured beside them (``--clock wall`` shows them, the file holds both; on an idle machine they agree).

Shares are medians over the rounds of the ratio within a round, the calls compared standing side by side in it: what a
drifting or busy machine disturbs least. Ratios of minima stand in brackets, milliseconds are minima.

- share of the FLOP promise: (dense s / dynamic s) / (dense FLOPs / dynamic FLOPs)
- share of the stage-time limit: (sum over stages of stage-and-head s at the rows that reach it) / dynamic s
- limit: the latter sum's own share of the FLOP promise
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import (
    ALLOCATORS,
    CLOCKS,
    Call,
    allocator,
    assert_same,
    calibrated,
    counts_of,
    environment,
    in_turn,
    leaving,
    save,
    taken,
    with_heads,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import pliant
from pliant.cost.meter import threads
from pliant.deploy.fold import optimised
from pliant.execute import Exits
from pliant.systems.depth.msdnet import msdnet

SPREADS = {"evenly": [1 / 7] * 7, "early": [0.5, 0.2, 0.1, 0.08, 0.06, 0.04, 0.02]}


def patterns(shares: Sequence[float], rows: int) -> list[tuple[list[int], float]]:
    """Rows per exit of the batches to be timed, with their weights.

    One row: one batch for each exit. A few rows: batches that together have the shares. Many: one batch with the shares.
    """
    exits = len(shares)
    if rows == 1:
        return [([int(k == j) for k in range(exits)], share) for j, share in enumerate(shares)]
    if rows >= 32:
        return [(counts_of(shares, rows), 1.0)]
    batches = 13  # of 8 rows: 104 rows
    exits_of = [k for k, n in enumerate(counts_of(shares, rows * batches)) for _ in range(n)]
    random.Random(0).shuffle(exits_of)
    found = [exits_of[i * rows : (i + 1) * rows] for i in range(batches)]
    return [([batch.count(k) for k in range(exits)], 1 / batches) for batch in found]


def stages_alone(model: Exits, x: Tensor, counts: Sequence[int]) -> Call:
    """Each stage and its head on as many rows as reach it, on inputs made before; what the stages before really make."""
    ready: list[tuple[nn.Module, nn.Module, Any]] = []
    state: Any = x
    for stage, head, n in zip(model.stages, model.heads, reaching(counts), strict=True):
        if n:
            ready.append((stage, head, pytree.tree_map(lambda t, n=n: t[:n].clone(), state)))
        state = stage(state)

    def call() -> None:
        for stage, head, rows in ready:
            head(stage(rows))

    return call


def reaching(counts: Sequence[int]) -> list[int]:
    """Rows that reach each stage."""
    return [sum(counts[k:]) for k in range(len(counts))]


def measure(model: Exits, rows: int, rounds: int, seed: int) -> list[dict[str, Any]]:
    """Every spread at one batch size."""
    x = torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    calls: dict[Any, Call] = {"dense": lambda: with_heads(model, x)}
    flops: dict[Any, float] = {}
    dense_flops = 0.0
    for spread, shares in SPREADS.items():
        for i, (counts, _) in enumerate(patterns(shares, rows)):
            bound = leaving(model, x, counts)
            y, trace = pliant.record(bound)(x)
            assert_same(y, pliant.masked(bound)(x), "gathered against masked")
            flops[spread, i], dense_flops = float(trace.flops.sum()), float(trace.dense_flops.sum())
            calls["dynamic", spread, i] = lambda bound=bound: bound(x)
            calls["limit", spread, i] = stages_alone(bound, x, counts)
    seconds = in_turn(calls, rounds)
    found: list[dict[str, Any]] = []
    for spread, shares in SPREADS.items():
        weights = [weight for _, weight in patterns(shares, rows)]
        promised = dense_flops / sum(weight * flops[spread, i] for i, weight in enumerate(weights))
        row: dict[str, Any] = {"batch": rows, "spread": spread, "batches": len(weights), "promised": promised}
        for clock, measured in seconds.items():

            def summed(what: str, of: Callable[[list[float]], float], spread: str = spread, weights: Any = weights,
                       measured: Any = measured) -> float:  # fmt: skip
                return sum(weight * of(measured[what, spread, i]) for i, weight in enumerate(weights))

            rounds_of = range(rounds)
            by_round = [
                shares_of(measured["dense"][r], summed("dynamic", lambda s, r=r: s[r]),
                          summed("limit", lambda s, r=r: s[r]), promised) for r in rounds_of
            ]  # fmt: skip
            row[f"{clock} paired"] = {k: statistics.median(one[k] for one in by_round) for k in by_round[0]}
            row[f"{clock} minima"] = shares_of(
                min(measured["dense"]), summed("dynamic", min), summed("limit", min), promised
            )
        found.append(row)
    return found


def shares_of(dense: float, dynamic: float, limit: float, promised: float) -> dict[str, float]:
    """The figures of one batch size and spread."""
    return {
        "dense_s": dense, "dynamic_s": dynamic, "limit_s": limit, "speed_up": dense / dynamic,
        "share_of_flops": dense / dynamic / promised, "share_of_limit": limit / dynamic,
        "limit_of_flops": dense / limit / promised,
    }  # fmt: skip


def own(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """MSDNet in its default configuration, as built and optimised."""
    torch.manual_seed(args.seed)
    built: Any = calibrated(msdnet(), (3, 32, 32), seed=args.seed)
    fast = optimised(built, torch.randn(64, 3, 32, 32))
    x = torch.randn(16, 3, 32, 32)
    for a, b in zip(with_heads(built, x), with_heads(fast, x), strict=True):
        assert_same(a, b, "optimised against built")
    chosen = next(p for p in fast.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1)
    layout = "channels last" if chosen.is_contiguous(memory_format=torch.channels_last) else "default"
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in built.parameters()), "layout": layout, "rows": []}
    for name, model in (("as built", built), ("optimised", fast)):
        table = Table(
            title=f"MSDNet {name}, one thread, {args.clock} seconds (medians of ratios within a round; ratios of minima in brackets)"
        )
        for head in ("batch", "exits", "dense ms", "dynamic ms", "speed-up", "promised"):
            table.add_column(head, justify="right")
        for head in ("share of FLOP promise", "share of stage-time limit", "limit / FLOP promise"):
            table.add_column(head, justify="right")
        for batch in args.batches:
            rounds = max(3, round(args.rounds * {1: 60, 8: 16, 64: 14}.get(batch, 5)))
            for row in measure(model, batch, rounds, args.seed + batch):
                paired, least = row[f"{args.clock} paired"], row[f"{args.clock} minima"]
                shares = [
                    f"{paired[k]:.2f} ({least[k]:.2f})" for k in ("share_of_flops", "share_of_limit", "limit_of_flops")
                ]
                table.add_row(
                    str(batch), row["spread"], f"{least['dense_s'] * 1e3:.2f}", f"{least['dynamic_s'] * 1e3:.2f}",
                    f"{paired['speed_up']:.2f}", f"{row['promised']:.2f}", *shares,
                )  # fmt: skip
                found["rows"].append({"model": name, "rounds": rounds, **row})
        console.print(table)
    return found


def resnet_exits(backbone: Any, heads: Sequence[nn.Module]) -> Exits:
    """A torchvision ResNet as a chain with exits after its first three groups of blocks."""
    stem = nn.Sequential(backbone.conv1, backbone.bn1, backbone.relu, backbone.maxpool, backbone.layer1)
    last = nn.Sequential(backbone.avgpool, nn.Flatten(1), backbone.fc)
    sites = [pliant.Site(pliant.scores.MaxProbability(), pliant.rules.Threshold(0.5)) for _ in heads]
    return Exits([stem, backbone.layer2, backbone.layer3, backbone.layer4], [*heads, last], sites).eval()


def peer(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """ResNet-18 at 64x64, 32 rows, a quarter leaving at each of three exits; the same weights and thresholds for all."""
    from importlib.metadata import version

    from earlyon.models import custom_ee
    from torchvision.models import resnet18

    torch.manual_seed(args.seed)
    backbone = calibrated(resnet18(num_classes=10), (3, 64, 64), seed=args.seed)
    theirs = custom_ee(backbone, ["layer1", "layer2", "layer3"], 10, input_shape=(1, 3, 64, 64)).eval()
    x = torch.randn(32, 3, 64, 64)
    # Their wrapper hooks the backbone itself; a copy without the hooks serves as ours and as the dense one.
    static = resnet18(num_classes=10).eval()
    static.load_state_dict(backbone.state_dict())
    heads = list(theirs.exit_heads.values())
    ours = leaving(resnet_exits(static, heads), x, [8, 8, 8, 8])
    fitted = pliant.retrofit.exits(static, at=["layer1", "layer2", "layer3"], heads=heads, example=x[:5])
    fitted = leaving(fitted, x, [8, 8, 8, 8])
    doubts = [float(site.rule.threshold) for site in pliant.sites(ours).values()]  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    theirs.config.confidence_thresholds = [1 - t for t in doubts]
    folded = optimised(ours, x)
    dense_folded = optimised(static, x)
    y, trace = pliant.record(ours)(x)
    one_by_one = [theirs(row[None]) for row in x]
    exits = [r.exit_taken if r.exit_taken >= 0 else 3 for r in one_by_one]
    assert exits == taken(ours, x).tolist() == taken(folded, x).tolist(), "the peer and ours leave at the same exits"
    assert_same(torch.cat([r.prediction for r in one_by_one]), y, "the peer's rows one by one against ours")
    assert_same(folded(x), y, "folded against built")
    assert_same(fitted(x), y, "retrofitted against built")
    batched = theirs.forward_inference_batched(x)
    assert_same(static(x), dense_folded(x), "folded dense against dense")
    calls: dict[str, Call] = {
        "dense": lambda: static(x),
        "earlyon, batch": lambda: theirs.forward_inference_batched(x),
        "earlyon, one by one": lambda: [theirs(row[None]) for row in x],
        "pliant": lambda: ours(x),
        "pliant.retrofit": lambda: fitted(x),
        "dense, optimised": lambda: dense_folded(x),
        "pliant, optimised": lambda: folded(x),
    }
    both = in_turn(calls, max(3, round(args.rounds * 15)))
    seconds = both[args.clock]
    promised = float(trace.dense_flops.sum() / trace.flops.sum())
    table = Table(title=f"ResNet-18 at 64x64, 32 rows, a quarter at each of 3 exits; FLOPs promise {promised:.2f}x")
    for head in ("what", "ms, least", "ms, median", "against its dense"):
        table.add_column(head, justify="right")
    for name, s in seconds.items():
        dense = min(seconds["dense, optimised" if "optimised" in name else "dense"])
        table.add_row(
            str(name), f"{min(s) * 1e3:.1f}", f"{statistics.median(s) * 1e3:.1f}", f"{dense / min(s):.2f}x faster"
        )
    console.print(table)
    return {
        "earlyon": version("earlyon"), "torchvision": version("torchvision"), "promised": promised,
        "earlyon_batch_exit_taken": batched.exit_taken, "thresholds": doubts,
        "seconds": {
            clock: {n: {"minimum": min(s), "median": statistics.median(s)} for n, s in found.items()}
            for clock, found in both.items()
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 256], help="batch sizes")
    parser.add_argument("--rounds", type=float, default=1.0, help="factor on the number of rounds")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="processor", help="whose seconds the tables show; the file has both"
    )
    parser.add_argument("--only", choices=["own", "peer"], help="one half of the benchmark")
    parser.add_argument("--allocator", choices=ALLOCATORS, default="keep", help="whether glibc keeps freed memory")
    args = parser.parse_args()
    console, start = Console(width=150), time.perf_counter()
    found: dict[str, Any] = {"environment": environment(args.seed, allocator(args.allocator))}
    with threads(1), torch.inference_mode():
        if args.only != "peer":
            found["msdnet"] = own(args, console)
        if args.only != "own":
            found["peer"] = peer(args, console)
    found["seconds"] = round(time.perf_counter() - start, 1)
    console.print(f"{found['environment']['cpu']}, torch {torch.__version__}, one thread, {found['seconds']} s in all")
    save(args.json, found)


if __name__ == "__main__":
    main()
