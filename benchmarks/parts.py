"""Whether running parts of layers pays: seconds against FLOPs of experts and channels attached to models that users have.

    python benchmarks/parts.py --json benchmarks/results/parts.json

Experts split the feed-forward layers of a BERT and a ViT (16 in each), a router for each token; channels are chosen between the
convolutions of a ResNet-18 and a ResNet-50, a gate for each input, each by itself or in 4 groups. Routers run, but what they
say is drawn, so tokens and inputs choose as differently from each other as they can: rows that chose the same would run
together. For each share of parts the same model runs; "1" is all of them, the host's own layers plus the routers. All calls
of a row run in turn on one thread; the answers of the parts that run are compared with those of the masked form first.
Seconds are processor time (``--clock wall``: the file has both).

- FLOPs: executed over those of the host
- seconds: medians over the rounds of the ratio to the host within a round
- share of promise: (host s / s) / (host FLOPs / FLOPs); 1 where seconds fall as FLOPs do
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from common import ALLOCATORS, CLOCKS, Call, allocator, assert_same, calibrated, environment, in_turn, save
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import pliant
from pliant import retrofit
from pliant.cost.meter import threads

SHARES = (1.0, 0.75, 0.5, 0.25)


class Bench(NamedTuple):
    """A host, what it is called with for so many rows, and the parts that are attached."""

    host: Callable[[int], nn.Module]
    call: Callable[[int], dict[str, Tensor]]
    attach: Callable[[nn.Module, dict[str, Tensor]], Any]


def bert(seed: int) -> nn.Module:
    """Six layers of 256 features and 1,024 hidden neurons."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
    }
    return BertForSequenceClassification(BertConfig(vocab_size=1000, **sizes)).eval()


def vit(seed: int) -> nn.Module:
    """DeiT-small's sizes in six blocks: 384 features, 197 tokens."""
    import timm

    torch.manual_seed(seed)
    return timm.create_model("vit_small_patch16_224", depth=6, num_classes=10).eval()


def resnet(name: str, size: int) -> Callable[[int], nn.Module]:
    def make(seed: int) -> nn.Module:
        import torchvision

        torch.manual_seed(seed)
        return calibrated(
            getattr(torchvision.models, name)(num_classes=10), (3, size, size), seed=seed, passes=1, batch=8
        )

    return make


def pictures(size: int, name: str = "x") -> Callable[[int], dict[str, Tensor]]:
    return lambda rows: {name: torch.randn(rows, 3, size, size)}


def texts(rows: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1000, (rows, 64)), "attention_mask": torch.ones(rows, 64, dtype=torch.int64)}


def experts(*at: str) -> Callable[[nn.Module, dict[str, Tensor]], Any]:
    return lambda host, call: retrofit.experts(host, at, experts=16, top=1.0, example=call)


def channels(*at: str, groups: int | None = None) -> Callable[[nn.Module, dict[str, Tensor]], Any]:
    return lambda host, call: retrofit.channels(host, at, top=1.0, example=call, groups=groups)


BENCHES: dict[str, Bench] = {
    "experts, BERT (6 x 256, 64 tokens)": Bench(bert, texts, experts("bert.encoder.layer.*")),
    "experts, ViT-small/16 (6 blocks, 224)": Bench(vit, pictures(224), experts("blocks.*")),
    "channels, ResNet-18 (224)": Bench(resnet("resnet18", 224), pictures(224), channels("layer*.*")),
    "4 groups of channels, ResNet-18 (224)": Bench(
        resnet("resnet18", 224), pictures(224), channels("layer*.*", groups=4)
    ),
    "channels, ResNet-50 (128)": Bench(resnet("resnet50", 128), pictures(128), channels("layer*.*")),
    "4 groups of channels, ResNet-50 (128)": Bench(
        resnet("resnet50", 128), pictures(128), channels("layer*.*", groups=4)
    ),
}


class Drawn(pliant.Score):
    """A router that runs, and then says something else: numbers drawn once for each shape of scores."""

    def __init__(self, router: Any) -> None:
        super().__init__()
        self.router, self.said = router, dict[Any, Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)
        if scores.shape not in self.said:
            self.said[scores.shape] = torch.rand_like(scores)
        return self.said[scores.shape]


def at_share(model: Any, share: float) -> Any:
    """The same model whose routers choose another share of the parts."""
    rule = pliant.estimators.RankStraightThrough(pliant.rules.Share(share))
    return pliant.bind(model, {"*": rule})


def answer(model: Any, call: dict[str, Tensor]) -> Tensor:
    y = model(**call)
    return y if isinstance(y, Tensor) else y.logits


def measure(
    name: str, batches: list[int], rounds: float, seed: int, clock: str, console: Console
) -> list[dict[str, Any]]:
    """One host at several batch sizes and shares."""
    bench = BENCHES[name]
    host = bench.host(seed)
    model = bench.attach(host, bench.call(4))
    for site in pliant.sites(model).values():
        site.scorer = Drawn(site.scorer)
    table = Table(title=f"{name}: {clock} seconds, medians of ratios within a round (ratios of minima in brackets)")
    for head in ("rows", "share", "FLOPs", "host ms", "ms", "seconds", "share of promise"):
        table.add_column(head, justify="right")
    found: list[dict[str, Any]] = []
    for batch in batches:
        call = bench.call(batch)
        models = {share: at_share(model, share) for share in SHARES}
        flops: dict[float, float] = {}
        for share, one in models.items():
            y, trace = pliant.record(one)(**call)
            y = y if isinstance(y, Tensor) else y.logits
            scale = 1e-4 * (1 + float(y.abs().max()))
            assert_same(answer(pliant.masked(one), call), y, f"{name} at {share}", scale)
            dense = pliant.record(pliant.plain(one))(**call)[1].flops
            flops[share] = float(trace.flops.sum() / dense.sum())
        assert torch.equal(answer(pliant.bind(model, {"*": pliant.rules.Always()}), call), answer(host, call))
        calls: dict[Any, Call] = {"host": lambda call=call: host(**call)}
        calls |= {share: (lambda one=one, call=call: one(**call)) for share, one in models.items()}
        once = -time.perf_counter()
        host(**call)
        once += time.perf_counter()
        both = in_turn(calls, max(3, min(30, round(rounds * 1.5 / once))))
        for share in SHARES:
            row: dict[str, Any] = {"model": name, "rows": batch, "share": share, "flops": flops[share]}
            for c, seconds in both.items():
                ratios = [a / b for a, b in zip(seconds[share], seconds["host"], strict=True)]
                paired, least = statistics.median(ratios), min(seconds[share]) / min(seconds["host"])
                row[c] = {
                    "host_s": min(seconds["host"]), "s": min(seconds[share]), "seconds": paired, "seconds_of_minima": least,
                    "share_of_promise": flops[share] / paired, "rounds": len(ratios),
                }  # fmt: skip
            found.append(row)
            said = row[clock]
            table.add_row(
                str(batch), f"{share:g}", f"{flops[share]:.2f}", f"{said['host_s'] * 1e3:.1f}", f"{said['s'] * 1e3:.1f}",
                f"{said['seconds']:.2f} ({said['seconds_of_minima']:.2f})", f"{said['share_of_promise']:.2f}",
            )  # fmt: skip
    console.print(table)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="batch sizes")
    parser.add_argument("--rounds", type=float, default=1.0, help="factor on the number of rounds")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="processor", help="whose seconds the tables show; the file has both"
    )
    parser.add_argument("--only", default="", help="those whose name has this in it")
    parser.add_argument("--allocator", choices=ALLOCATORS, default="keep", help="whether glibc keeps freed memory")
    args = parser.parse_args()
    console, start = Console(width=130), time.perf_counter()
    found: dict[str, Any] = {"environment": environment(args.seed, allocator(args.allocator)), "rows": []}
    with threads(1), torch.inference_mode():
        for name in BENCHES:
            if args.only in name:
                found["rows"] += measure(name, args.batches, args.rounds, args.seed, args.clock, console)
    found["seconds"] = round(time.perf_counter() - start, 1)
    console.print(f"{found['environment']['cpu']}, torch {torch.__version__}, one thread, {found['seconds']} s in all")
    save(args.json, found)


if __name__ == "__main__":
    main()
