"""What ONNX Runtime skips: seconds of exported, retrofitted models as none to all of the rows go on, against the dense export.

    python benchmarks/onnx_runtime.py --json benchmarks/results/onnx_runtime.json

The dense one is the host itself, exported. Of each way to save (an exit, gates, tokens, a cascade) there's one file; its thresholds,
an input, are set so that exactly the wanted share of the rows goes on, and answers are compared with PyTorch's first. One
thread, in turn, processor time; speed-ups are medians of the ratio within a round, milliseconds are minima.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import timm
import torch
import torchvision
from common import CLOCKS, Call, allocator, assert_same, calibrated, environment, in_turn, save
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pliant
from pliant.deploy import export_onnx
from pliant.retrofit import cascade, exits, skips, tokens

SIDE = 64
Made = tuple[nn.Module, nn.Module]
"""A model that skips, and what runs where nothing is skipped."""


def resnet(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return calibrated(torchvision.models.resnet18(num_classes=10), (3, SIDE, SIDE), seed=seed)


def one_exit(x: Tensor, seed: int) -> Made:
    host = resnet(seed)
    return exits(host, ["layer1"], example=x[:4]), host


def gates(x: Tensor, seed: int) -> Made:
    host = resnet(seed)
    model = skips(host, ["layer*.1"], example=x[:4])
    for name, p in model.named_parameters():
        if name.startswith("skips") and p.ndim == 2:
            nn.init.normal_(p)  # scores that tell rows apart
    return model, host


def fewer_tokens(x: Tensor, seed: int) -> Made:
    torch.manual_seed(seed)
    host = timm.create_model("vit_tiny_patch16_224", img_size=SIDE, patch_size=8, num_classes=10).eval()
    return tokens(host, ["blocks.2"], example=x[:4]), host


def two_models(x: Tensor, seed: int) -> Made:
    host = resnet(seed)
    little = calibrated(timm.create_model("test_resnet", num_classes=10), (3, SIDE, SIDE), seed=seed)
    return cascade([little, host], example=x[:4]), host


KINDS: dict[str, Callable[[Tensor, int], Made]] = {
    "exit after layer1 of ResNet-18": one_exit, "gates on 4 of 8 blocks of ResNet-18": gates,
    "tokens after block 3 of 12 of a ViT": fewer_tokens, "cascade of a small net and ResNet-18": two_models,
}  # fmt: skip


def turned(model: nn.Module, x: Tensor, share: float) -> tuple[Any, list[float]]:
    """``model`` and its thresholds such that ``share`` of the rows goes on at each site, or of the tokens stays."""
    found: list[float] = []
    model = pliant.bind(model, {})
    for path, site in pliant.sites(model).items():
        rule: Any = site.rule
        while hasattr(rule, "rule"):
            rule = rule.rule
        if path.startswith("tokens"):
            value = 1 - share
        else:  # between the scores of two rows, gates before it being as they are by now
            rule._buffers["threshold"] = torch.tensor(float("-inf"))
            scores = pliant.record(model)(x)[1][path][0].scores.sort().values  # pyright: ignore[reportOptionalMemberAccess]
            leave = len(x) - round(share * len(x))
            ends = [float("-inf"), *((scores[1:] + scores[:-1]) / 2).tolist(), float("inf")]
            value = ends[leave]
        rule._buffers["threshold"] = torch.tensor(value)
        found.append(value)
    return model, found


def session(model: nn.Module, x: Tensor, folder: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    path = export_onnx(model, Path(folder) / "model.onnx", x[:4])
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def measure(kind: str, rows: int, shares: Sequence[float], rounds: int, seed: int) -> list[dict[str, Any]]:
    x = torch.randn(max(rows, 4), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    model, host = KINDS[kind](x, seed)
    x = x[:rows]
    with tempfile.TemporaryDirectory() as folder:
        dense, skipping = session(host, x.repeat(4, 1, 1, 1), folder), session(model, x.repeat(4, 1, 1, 1), folder)
    calls: dict[Any, Call] = {"dense": lambda: dense.run(None, {"input": x.numpy()})}
    promised: dict[float, float] = {}
    with FlopCounterMode(display=False) as counter:
        host(x)
    whole = counter.get_total_flops()
    assert_same(torch.from_numpy(dense.run(None, {"input": x.numpy()})[0]), host(x), "dense in ONNX Runtime")
    for share in shares:
        own, thresholds = turned(model, x, share)
        y, trace = pliant.record(own)(x)
        promised[share] = whole / int(trace.flops.sum())
        feed = {"input": x.numpy(), "thresholds": np.array(thresholds, dtype=np.float32)}
        assert_same(torch.from_numpy(skipping.run(None, feed)[0]), y, f"{kind}, {share:.0%}")
        calls[share] = lambda feed=feed: skipping.run(None, feed)
    seconds = in_turn(calls, rounds)
    return [
        {
            "kind": kind, "rows": rows, "share": share, "promised": promised[share],
            **{clock: {
                "milliseconds": min(s[share]) * 1e3, "dense_milliseconds": min(s["dense"]) * 1e3,
                "speed_up": statistics.median(a / b for a, b in zip(s["dense"], s[share], strict=True)),
            } for clock, s in seconds.items()},
        }
        for share in shares
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--rounds", type=int, default=25, help="rounds at 32 rows; eight times as many at one")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs")
    parser.add_argument("--clock", choices=list(CLOCKS), default="processor", help="whose seconds the table shows")
    parser.add_argument("--only", choices=list(KINDS), help="one of the models")
    args = parser.parse_args()
    torch.set_num_threads(1)
    memory = allocator("keep")
    table = Table(title="ONNX Runtime, one thread; speed-up over the dense export, medians of ratios within a round")
    for head in ("model", "rows", "go on", "ms", "dense ms", "speed-up", "promised by FLOPs"):
        table.add_column(head, justify="left" if head == "model" else "right")
    found: list[dict[str, Any]] = []
    with torch.no_grad():
        for kind in [args.only] if args.only else KINDS:
            for rows, shares in ((32, [0, 0.25, 0.5, 0.75, 1]), (1, [0, 1])):
                for one in measure(kind, rows, shares, args.rounds * (8 if rows == 1 else 1), args.seed):
                    s = one[args.clock]
                    table.add_row(
                        kind, str(rows), f"{one['share']:.0%}", f"{s['milliseconds']:.2f}", f"{s['dense_milliseconds']:.2f}",
                        f"{s['speed_up']:.2f}", f"{one['promised']:.2f}",
                    )  # fmt: skip
                    found.append(one)
    Console(width=150).print(table)
    told = environment(args.seed, memory) | {
        "onnxruntime": onnxruntime.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__
    }  # fmt: skip
    save(args.json, {"environment": told, "results": found})


if __name__ == "__main__":
    main()
