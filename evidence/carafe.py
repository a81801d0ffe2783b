"""CARAFE: does upsampling with predicted kernels meet boundaries better than bilinear upsampling in the same network?"""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from _common import LAST_ONLY, phase, seeded
from _shapes import boundary_iou, shapes
from torch import Tensor

from pliant import create_model, record, sites
from pliant.reproduce import Claim, Lab
from pliant.train import Fit, fit

ROWS, EPOCHS, SIDE, NOISE, WIDTHS, SEEDS = 600, 6, 48, 0.6, (8, 12, 16, 24), (0, 1, 2)
DATA = f"made: {ROWS:,} training and 300 test images of 48x48 with one wavy blob each under heavy noise"


def build(upsample: str) -> Any:
    return create_model("carafe", in_chans=1, widths=WIDTHS, upsample=upsample)


def start(x: Tensor) -> tuple[float, float]:
    """How far fresh operators are from box average and nearest upsampling of ``x``, and their kernels from a sum of 1."""
    torch.manual_seed(0)
    off, sums = [], []
    for up in build("carafe")[0].up:
        with torch.no_grad():
            y, trace = record(up)(x)
        box = F.interpolate(F.avg_pool2d(x, 5, 1, 2), scale_factor=2, mode="nearest")
        off.append(float((y - box).abs().max()))
        sums.append(float((trace.dense("site").sum(1) - 1).abs().max()))
    return max(off), max(sums)


@torch.no_grad()
def own_maps(x: Tensor) -> Tensor:
    """What the first operator of a fresh network upsamples."""
    torch.manual_seed(0)
    pyramid: Any = build("carafe")[0]  # training: its batch norms by the batch
    for down in pyramid.down:
        x = down(x)
    return pyramid.lateral[-1](x)


def run(lab: Lab) -> list[Claim]:
    train, test = shapes(ROWS, SIDE, 0, noise=NOISE), shapes(300, SIDE, 1, noise=NOISE)
    off, sums = start(own_maps(test.x[:32]))
    noise, _ = start(torch.randn(4, WIDTHS[0], 12, 12, generator=torch.Generator().manual_seed(0)))
    found: dict[str, list[float]] = {"carafe": [], "bilinear": []}
    flops: dict[str, float] = {}
    for seed in SEEDS:
        for name, values in found.items():
            model = seeded(seed, lambda name=name: build(name))
            adam = phase(EPOCHS, optimizer="adam", lr=3e-3, momentum=0.0, nesterov=False, weight_decay=0.0)
            fit(model, train, LAST_ONLY, [adam], options=Fit(batch_size=16, seed=seed))
            model.eval()
            lab.progress(name, seed + 1, len(SEEDS))
            with torch.no_grad():
                y, trace = record(model)(test.x)
            values.append(boundary_iou(y.argmax(1), test.y))
            flops[name] = float(trace.flops[0])
            if name == "carafe":
                sums = max([sums, *(float((trace.dense(site).sum(1) - 1).abs().max()) for site in sites(model))])
    shown = {name: ", ".join(f"{v:.4f}" for v in values) for name, values in found.items()}
    gain = [a - b for a, b in zip(found["carafe"], found["bilinear"], strict=True)]
    return [
        Claim("at initialisation it's a 5x5 box average and nearest upsampling", f"{off:.1e} largest difference", "<= 1e-2", off <= 1e-2, [off, noise],
              f"on a fresh network's own maps; on normal noise of variance 1 {noise:.1e}, the largest of 50,000 numbers"),
        Claim("kernels sum to 1, before and after training", f"{sums:.1e} off", "<= 1e-5", sums <= 1e-5, [sums]),
        Claim("boundary IoU is higher than with bilinear upsampling, the same training (mean of 3 seeds)", f"{mean(gain):+.4f}", "> 0", mean(gain) > 0, gain,
              f"carafe {shown['carafe']}; bilinear {shown['bilinear']}; deviation between seeds {stdev(found['bilinear']):.4f}; "
              f"FLOPs an image {flops['carafe'] / 1e6:.1f}M against {flops['bilinear'] / 1e6:.1f}M"),
    ]  # fmt: skip
