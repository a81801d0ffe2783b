"""PointRend: how much of the boundary that a head on every pixel finds do a tenth of the pixels recover?"""

from __future__ import annotations

from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from _common import phase, seeded, trained
from _shapes import Parts, boundary_iou, shapes
from torch import Tensor

from pliant import bind, create_model, plain, record, rules
from pliant.core.site import Score
from pliant.losses import PointLoss, Total
from pliant.reproduce import Claim, Lab
from pliant.systems.spatial.pointrend import OnPoints

ROWS, EPOCHS, SIDE, POINTS, SEEDS = 900, 6, 64, 200, (0, 1, 2)
DATA = f"made: {ROWS:,} training and 300 test images of 64x64 with one wavy blob each under noise; coarse maps of 8x8"


class Anywhere(Score):
    """Points at random."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.rand_like(x[:, :1])


def run(lab: Lab) -> list[Claim]:
    train, test = shapes(ROWS, SIDE, 0), shapes(300, SIDE, 1)
    data: Any = Parts(train, test)
    gains: dict[str, list[float]] = {name: [] for name in ("coarse", "full", "chosen", "random", "all")}
    shares, saved = [], []
    for seed in SEEDS:
        model: Any = seeded(seed, lambda: create_model("pointrend", in_chans=1, width=8, hidden=32))
        adam = phase(EPOCHS, optimizer="adam", lr=3e-3, momentum=0.0, nesterov=False, weight_decay=0.0)
        trained(
            lab,
            f"seed {seed}",
            OnPoints(model, points=POINTS),
            data,
            [adam],
            loss=Total({"points": (1.0, PointLoss())}),
            seed=seed,
        )
        model.eval()
        with torch.no_grad():
            _, coarse = model.encoder(test.x)
            y, trace = record(model)(test.x)
            answers = {
                "coarse": F.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear"), "full": plain(model)(test.x), "chosen": y,
                "random": bind(model, {"*": Anywhere()})(test.x),
                "all": bind(model, {"*": rules.TopK(share=1.0, dims=3)})(test.x),
            }  # fmt: skip
        for name, answer in answers.items():
            gains[name].append(boundary_iou(answer.argmax(1), test.y))
        gains["apart"] = [*gains.get("apart", []), float((answers["all"] - answers["full"]).abs().max())]
        shares.append(sum(float(trace.dense(site).sum()) for site in trace) / (len(test.x) * SIDE * SIDE))
        saved.append(float(trace.flops.sum() / trace.dense_flops.sum()))
    base = gains["coarse"]
    of_full = {
        name: [(a - c) / (f - c) for a, c, f in zip(gains[name], base, gains["full"], strict=True)] for name in ("chosen", "random")
    }  # fmt: skip
    shown = {name: ", ".join(f"{v:.3f}" for v in gains[name]) for name in gains}
    apart = max(gains.pop("apart"))
    return [
        Claim("refining at most a tenth of the pixels recovers most of the boundary IoU that the head on every pixel gains",
              f"{100 * mean(of_full['chosen']):.1f} % of the gain with {100 * max(shares):.1f} % of the pixels", ">= 80 %, <= 10 % of the pixels",
              min(of_full["chosen"]) >= 0.8 and max(shares) <= 0.1, of_full["chosen"],
              f"boundary IoU: coarse {shown['coarse']}; chosen points {shown['chosen']}; every pixel {shown['full']}; "
              f"{100 * mean(saved):.1f} % of the FLOPs of the head on every point of every step"),
        Claim("as many points at random gain clearly less", f"{100 * mean(of_full['random']):.1f} % of the gain", "less than half of what chosen ones gain",
              all(r < c / 2 for r, c in zip(of_full["random"], of_full["chosen"], strict=True)), of_full["random"], f"boundary IoU {shown['random']}"),
        Claim("with all points at every step it's the head on the full grid", f"{apart:.1e} largest difference of logits", "<= 1e-4", apart <= 1e-4, [apart]),
    ]  # fmt: skip
