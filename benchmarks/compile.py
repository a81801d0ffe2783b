"""What compiling stage by stage gains: everything on, and rows leaving; and that other mixes of exits compile nothing again.

    python benchmarks/compile.py --json benchmarks/results/compile.json

``pliant.compile`` against the same model in eager mode, same weights and thresholds, outputs compared first; "dense" has every
site on, "dynamic" lets rows leave evenly over the exits. One thread, in turn, processor time, median of ratios within a round.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torchvision
import transformers
from common import CLOCKS, Call, allocator, assert_same, calibrated, counts_of, environment, in_turn, leaving, save
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._dynamo.utils import counters

import pliant
from pliant.core.calls import prediction_of
from pliant.deploy.fold import optimised


def msdnet(seed: int) -> tuple[nn.Module, Callable[[int], Tensor]]:
    torch.manual_seed(seed)
    model = calibrated(pliant.create_model("msdnet"), (3, 32, 32), seed=seed)
    return model, lambda rows: torch.randn(rows, 3, 32, 32)


def resnet(seed: int) -> tuple[nn.Module, Callable[[int], Tensor]]:
    torch.manual_seed(seed)
    host = calibrated(torchvision.models.resnet18(num_classes=10), (3, 64, 64), seed=seed)
    x = torch.randn(4, 3, 64, 64)
    return pliant.retrofit.exits(host, at=["layer1", "layer2", "layer3"], example=x), lambda rows: torch.randn(
        rows, 3, 64, 64
    )


def bert(seed: int) -> tuple[nn.Module, Callable[[int], Tensor]]:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=512,
        num_labels=4,
        vocab_size=1000,
    )
    host = transformers.BertForSequenceClassification(config).eval()
    words = torch.randint(1, 1000, (4, 32))
    at = [f"bert.encoder.layer.{k}" for k in range(5)]
    return pliant.retrofit.exits(host, at=at, example=words), lambda rows: torch.randint(1, 1000, (rows, 32))


MODELS = {"MSDNet": msdnet, "ResNet-18, 3 exits": resnet, "BERT, 5 exits": bert}
WAYS = ("dense, compiled", "dynamic, compiled", "dense, folded", "dynamic, folded")


def to_the_end(model: nn.Module, call: Callable[[], object]) -> None:
    """Call with nobody leaving: every part sees as many rows, for which PyTorch may want a program of its own (1, or fewer than 16)."""
    thresholds = [site.rule.threshold for site in pliant.sites(model).values()]  # pyright: ignore[reportAttributeAccessIssue]
    before = [t.clone() for t in thresholds]
    for t in thresholds:
        t.fill_(float("-inf"))
    call()
    for t, value in zip(thresholds, before, strict=True):
        t.copy_(value)


def measure(name: str, rows: int, rounds: int, seed: int) -> dict[str, Any]:
    torch._dynamo.reset()
    counters.clear()
    model, batch = MODELS[name](seed)
    x = batch(rows)
    exits = len(pliant.sites(model)) + 1
    dynamic = leaving(model, x, counts_of([1.0] * exits, rows))
    dense = pliant.bind(model, {"*": pliant.rules.Always()})
    fast = {k: pliant.compile(m) for k, m in (("dense", dense), ("dynamic", dynamic))}
    calls: dict[Any, Call] = {}
    folded = {k: pliant.compile(optimised(m, x)) for k, m in (("dense", dense), ("dynamic", dynamic))}
    for path, eager in (("dense", dense), ("dynamic", dynamic)):
        assert_same(prediction_of(fast[path](x)), prediction_of(eager(x)), f"{name}, {path}", tolerance=1e-3)
        calls[path, "eager"] = lambda m=eager: m(x)
        calls[path, "compiled"] = lambda m=fast[path]: m(x)
        assert_same(prediction_of(folded[path](x)), prediction_of(eager(x)), f"{name}, {path}, folded", tolerance=1e-3)
        calls[path, "folded"] = lambda m=folded[path]: m(x)
    for count in (1, 8, rows):
        to_the_end(dynamic, lambda count=count: fast["dynamic"](batch(count)))
    for some in (x, x.flip(0), batch(rows - 3), batch(rows + 5), batch(rows // 3)):
        fast["dynamic"](some)
    before = counters["stats"]["unique_graphs"]
    for some in (batch(rows), batch(rows), batch(rows // 2), batch(rows + 9)):
        fast["dynamic"](some)
    again = counters["stats"]["unique_graphs"] - before
    seconds = in_turn(calls, rounds)
    found: dict[str, Any] = {"model": name, "rows": rows, "programs": before, "compiled again": again}
    for clock, measured in seconds.items():
        found[clock] = {
            f"{path}, {how}": statistics.median(
                a / b for a, b in zip(measured[path, "eager"], measured[path, how], strict=True)
            )
            for path in ("dense", "dynamic")
            for how in ("compiled", "folded")
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(MODELS), help="one of the models")
    parser.add_argument("--clock", choices=list(CLOCKS), default="processor")
    parser.add_argument("--json", help="where to write the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    memory = allocator("keep")
    table = Table(title=f"eager seconds over compiled seconds, {options.rows} rows")
    for column in ("model", *WAYS, "programs", "compiled again for other mixes"):
        table.add_column(column)
    found = []
    with torch.inference_mode():
        for name in [options.only] if options.only else MODELS:
            one = measure(name, options.rows, options.rounds, options.seed)
            clock = one[options.clock]
            table.add_row(
                name,
                *(f"{clock[way]:.2f}" for way in WAYS),
                str(one["programs"]),
                str(one["compiled again"]),
            )
            found.append(one)
    Console().print(table)
    told = environment(options.seed, memory) | {
        "transformers": transformers.__version__,
        "torchvision": torchvision.__version__,
    }
    save(options.json, {"environment": told, "results": found})


if __name__ == "__main__":
    main()
