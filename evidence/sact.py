"""SACT: does computation go where the digit is, is it better spent than image by image, and does the clock confirm it?"""

from __future__ import annotations

from statistics import mean
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from _common import faster, percent, phase, seeded, trained
from torch import Tensor, nn

from pliant import create_model, masked, record
from pliant.data import Split, load
from pliant.losses import CrossEntropy, Ponder, Total
from pliant.reproduce import Claim, Lab, Table
from pliant.study import accuracy

ROWS, EPOCHS, SEEDS, SIDE, TAU = 2_000, 16, (0, 1, 2), 20, 0.12
RIVAL = 0.02  # the price of resnet_act's units: low enough for no fewer FLOPs than SACT's
DATA = (
    f"made of UCI's digits (8x8), one anywhere on a canvas of noise 2.5 times as wide and high; {ROWS:,} training and 2,000 test "
    "images from separate digits; pre-activation ResNets of two stages of 3 units, 8 and 16 channels; halting biases start at -1"
)
SIZES: dict[str, Any] = {"in_chans": 1, "units": 3, "widths": (8, 16), "bias": -1.0}


def canvases(lab: Lab, part: str, rows: int, seed: int) -> tuple[Split, Tensor]:
    """Images, and where their digits' ink is (R, H, W)."""
    split = getattr(load("digits", lab.root), part)
    g = torch.Generator().manual_seed(seed)
    pick, at = torch.randint(len(split.x), (rows,), generator=g), torch.randint(SIDE - 7, (rows, 2), generator=g)
    digits = (split.x - split.x.min()) / (split.x.max() - split.x.min())
    x = 0.1 * torch.randn(rows, 1, SIDE, SIDE, generator=g)
    ink = torch.zeros(rows, SIDE, SIDE, dtype=torch.bool)
    for r, (top, left) in enumerate(at.tolist()):
        x[r, :, top : top + 8, left : left + 8] += digits[pick[r]]
        ink[r, top : top + 8, left : left + 8] = digits[pick[r], 0] > 0.25
    return Split(3 * x, split.y[pick]), ink


def loss(tau: float) -> Total:
    return Total({"task": (1.0, CrossEntropy()), "ponder": (tau, Ponder())})


def net(lab: Lab, id: str, tau: float, data: Any, seed: int) -> Any:
    """A network trained at a price of ``tau`` a unit."""
    model = seeded(seed, lambda: create_model(id, **SIZES))
    return trained(lab, f"{id} at {tau}, seed {seed}", model, data, [phase(EPOCHS)], loss=loss(tau), seed=seed)


@torch.no_grad()
def ponder_maps(model: nn.Module, x: Tensor) -> Tensor:
    """Ponder cost of every position, N + R summed over stages (R, H, W)."""
    _, trace = record(masked(model))(x)
    total = torch.zeros(len(x), 1, SIDE, SIDE)
    for stage in sorted({site.rsplit(".", 1)[0] for site in trace}):
        steps = [trace[site][0] for site in trace if site.startswith(stage + ".")]
        rho = 2 + sum((d.value * (1 - d.carry.weight) for d in steps), torch.zeros(()))
        total += F.interpolate(rho, size=SIDE)
    return total[:, 0]


@torch.no_grad()
def speed(model: nn.Module, x: Tensor) -> tuple[float, float, float]:
    """Largest relative difference from the masked form, how many times faster it is, and the share of active positions."""
    y, trace = record(model)(x)
    wanted = masked(model)(x)
    active = mean(float(trace.dense(site).mean()) for site in trace)
    return (
        float((y - wanted).abs().max() / wanted.abs().max()),
        faster(masked(model), model, x, batch=1, rounds=5),
        active,
    )


def run(lab: Lab) -> list[Claim | Table]:
    train, _ = canvases(lab, "train", ROWS, 0)
    test, ink = canvases(lab, "test", 2_000, 1)
    data: Any = SimpleNamespace(train=train, test=test)
    full = net(lab, "sact", 0.0, data, 0)
    dense, most, _ = accuracy(full, test)
    ratio, right, flops, gain, extra, rows, apart, times = [], [], [], [], [], [], [], []
    for seed in SEEDS:
        model = net(lab, "sact", TAU, data, seed)
        got, cost, _ = accuracy(model, test)
        maps = ponder_maps(model, test.x[:500])
        on, off = maps[ink[:500]].mean(), maps[~ink[:500]].mean()
        ratio.append(float(on / off))
        right.append(got)
        flops.append(cost)
        other, price, _ = accuracy(net(lab, "resnet_act", RIVAL, data, seed), test)
        gain.append(got - other)
        extra.append(price / cost)
        rows += [(seed, "sact", cost / 1e6, got), (seed, "resnet_act", price / 1e6, other)]
        gap, faster_, active = speed(model, test.x[:32])
        apart.append(gap)
        times.append((faster_, active))
    shown = ", ".join(f"{t:.2f}x at {a:.0%}" for t, a in times)
    few = [t for t, a in times if a <= 0.4]
    return [
        Claim("mean ponder cost on the digit's ink over that of the background", ", ".join(f"{r:.2f}x" for r in ratio), ">= 1.5x",
              min(ratio) >= 1.5, ratio, f"N + R summed over both stages, so at least 4; price {TAU} a unit; the canvas has 6 times the digit's area, not 16"),
        Claim("at no more than 1 point less accuracy than without a price", f"{100 * (dense - mean(right)):.2f} points lost",
              "<= 1 point", dense - mean(right) <= 0.01, [dense - r for r in right],
              f"{percent(right)} %, {100 * dense:.2f} without; {mean(flops) / most:.2f} of its FLOPs"),
        Claim("it's at least as accurate as resnet_act, which takes no fewer FLOPs, mean of 3 seeds", f"{percent(gain)} points above",
              ">= 0, at no more FLOPs", mean(gain) >= 0 and min(extra) >= 1, gain,
              "resnet_act's FLOPs: " + ", ".join(f"{e:.2f} times" for e in extra) + f"; its price is {RIVAL} a unit"),
        Claim("sparse execution answers as masked execution does", f"{max(apart):.1e} relative difference", "<= 1e-4",
              max(apart) <= 1e-4, apart),
        Claim("and is faster, one image at a time, where at most 40 % of the positions are active", shown, "> 1x at <= 40 %",
              bool(few) and min(few) > 1, [v for pair in times for v in pair], "share of positions that go on, mean over sites"),
        Table("Trained at a price", ("seed", "network", "MFLOPs", "accuracy"),
              [(0, "sact without a price", most / 1e6, dense), *rows]),
    ]  # fmt: skip
