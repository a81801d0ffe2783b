"""Give a ViT of timm early exits and let it drop tokens: train it, attach both, tune one budget over both, measure.

    python examples/vit_exits_tokens.py

A quarter of a minute on one CPU core, on scikit-learn's handwritten digits, from random weights; any ViT and data will do instead.
One seed and 359 test images: accuracies move by a few points with either.
"""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pliant
from pliant.cost import interleaved
from pliant.data import load
from pliant.retrofit import exits, tokens


def batches(x: Tensor, y: Tensor, size: int = 64) -> list[tuple[Tensor, Tensor]]:
    return [(x[i], y[i]) for i in torch.randperm(len(x)).split(size)]


def trained(model: nn.Module, weights: list[nn.Parameter], x: Tensor, y: Tensor, epochs: int, lr: float) -> None:
    """Every exit learns the labels, at shares of tokens that change from batch to batch."""
    every = pliant.record(pliant.masked(model))
    dials = [site.rule.threshold for path, site in pliant.sites(model).items() if path.startswith("tokens")]
    optimiser = torch.optim.AdamW(weights, lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, epochs * (len(x) // 64 + 1))
    for _ in range(epochs):
        for a, b in batches(x, y):
            for dial in dials:
                dial.fill_(float(torch.rand(()) * 0.6))
            optimiser.zero_grad()
            _, trace = every(a)
            sum(F.cross_entropy(e.logits, b) for e in trace.exits).backward()
            optimiser.step()
            schedule.step()


def main(epochs: int = 20) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = load("digits")
    host = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, embed_dim=48, num_heads=4, depth=3, num_classes=10
    )
    model = tokens(host, ["blocks.[01]"], example=data.train.x[:4])
    model = exits(model, ["blocks.0", "blocks.1"], example=data.train.x[:4])
    trained(model, list(model.parameters()), data.train.x, data.train.y, epochs, 4e-3)
    model.eval()
    x, y = data.test.x, data.test.y
    dense = pliant.bind(model, {"*": pliant.rules.Always()})  # every token stays, every row goes to the end
    print(f"dense: {100 * (dense(x).argmax(1) == y).float().mean():.1f} % right of {len(x)} test digits")
    for budget in (0.75, 0.5):
        point = pliant.tune(model, batches(data.val.x, data.val.y), budget=budget)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            found, trace = pliant.record(model)(x)
        with torch.no_grad():
            seconds = interleaved({"dense": lambda: dense(x), "tuned": lambda: model(x)}, rounds=5)
        share = trace.flops.sum() / trace.dense_flops.sum()
        agrees = int(trace.flops.sum()) == counter.get_total_flops()
        kept = [f"{1 - t:.0%}" for site, t in point.thresholds.items() if site.startswith("tokens")]
        gone = [int((trace.dense(s) == 0).sum()) for s in trace if s.startswith("exits")]
        right = 100 * (found.argmax(1) == y).float().mean()
        print(f"budget {budget:.0%}: {right:.1f} % right; tokens kept {kept}, rows gone {gone}")
        flops = trace.flops.float().mean() / 1e6
        print(f"  {flops:.2f} MFLOPs an image, {share:.1%} of dense; counter agrees: {agrees}")
        print(f"  {seconds['tuned'].median:.4f} s, dense {seconds['dense'].median:.4f} s")


if __name__ == "__main__":
    main()
