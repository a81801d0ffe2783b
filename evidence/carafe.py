"""CARAFE: does upsampling with predicted kernels meet boundaries better than bilinear upsampling in the same network?"""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from _common import LAST_ONLY, phase, seeded, trained
from _shapes import Parts, boundary_iou, shapes

from pliant import create_model, record, sites
from pliant.reproduce import Claim, Lab

ROWS, EPOCHS, SIDE, WIDTHS, SEEDS = 600, 6, 48, (8, 12, 16, 24), (0, 1, 2)
DATA = f"made: {ROWS:,} training and 300 test images of 48x48 with one wavy blob each under heavy noise"


def build(upsample: str) -> Any:
    return create_model("carafe", in_chans=1, widths=WIDTHS, upsample=upsample)


def start() -> tuple[float, float]:
    """How far a fresh operator is from box average and nearest upsampling, and its kernels from a sum of 1."""
    torch.manual_seed(0)
    up, x = build("carafe")[0].up[0], torch.randn(4, WIDTHS[0], 12, 12)
    with torch.no_grad():
        y, trace = record(up)(x)
    box = F.interpolate(F.avg_pool2d(x, 5, 1, 2), scale_factor=2, mode="nearest")
    return float((y - box).abs().max()), float((trace.dense("site").sum(1) - 1).abs().max())


def run(lab: Lab) -> list[Claim]:
    off, sums = start()
    train, test = shapes(ROWS, SIDE, 0, noise=0.8), shapes(300, SIDE, 1, noise=0.8)
    data: Any = Parts(train, test)
    found: dict[str, list[float]] = {"carafe": [], "bilinear": []}
    flops: dict[str, float] = {}
    for seed in SEEDS:
        for name, values in found.items():
            model = seeded(seed, lambda name=name: build(name))
            adam = phase(EPOCHS, optimizer="adam", lr=3e-3, momentum=0.0, nesterov=False, weight_decay=0.0)
            trained(lab, f"{name}, seed {seed}", model, data, [adam], loss=LAST_ONLY, seed=seed)
            with torch.no_grad():
                y, trace = record(model)(test.x)
            values.append(boundary_iou(y.argmax(1), test.y))
            flops[name] = float(trace.flops[0])
            if name == "carafe":
                sums = max([sums, *(float((trace.dense(site).sum(1) - 1).abs().max()) for site in sites(model))])
    shown = {name: ", ".join(f"{v:.4f}" for v in values) for name, values in found.items()}
    gain = [a - b for a, b in zip(found["carafe"], found["bilinear"], strict=True)]
    return [
        Claim("at initialisation it's a 5x5 box average and nearest upsampling", f"{off:.1e} largest difference", "<= 1e-2", off <= 1e-2, [off]),
        Claim("kernels sum to 1, before and after training", f"{sums:.1e} off", "<= 1e-5", sums <= 1e-5, [sums]),
        Claim("boundary IoU is higher than with bilinear upsampling, the same training (mean of 3 seeds)", f"{mean(gain):+.4f}", "> 0", mean(gain) > 0, gain,
              f"carafe {shown['carafe']}; bilinear {shown['bilinear']}; deviation between seeds {stdev(found['bilinear']):.4f}; "
              f"FLOPs an image {flops['carafe'] / 1e6:.1f}M against {flops['bilinear'] / 1e6:.1f}M"),
    ]  # fmt: skip
