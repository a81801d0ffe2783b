"""ACT for residual networks: what the price of a unit does, a start from a trained network, and early stopping's seconds."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch
from _common import LAST_ONLY, fashion, phase, seeded, told, trained
from torch import Tensor, nn

from pliant import create_model, masked, plain, record
from pliant.cost import interleaved
from pliant.data import Dataset
from pliant.losses import CrossEntropy, Ponder, Total, steps
from pliant.reproduce import Claim, Lab, Table
from pliant.study import accuracy

ROWS, EPOCHS, SEEDS = 3_000, 8, (0,)
PRICES = (0.001, 0.01, 0.1)
DATA = told(
    ROWS, "; pre-activation ResNet of two stages of 5 units, 8 and 16 channels; the YAML's claims are for CIFAR-10"
)
SIZES: dict[str, Any] = {"in_chans": 1, "units": 5, "widths": (8, 16)}


def build(bias: float = -3.0) -> Any:
    return create_model("resnet_act", bias=bias, **SIZES)


def priced(tau: float) -> Total:
    return Total({"task": (1.0, CrossEntropy()), "ponder": (tau, Ponder())})


@torch.no_grad()
def units(model: nn.Module, data: Dataset) -> float:
    """Units that a test image takes, of 10."""
    return float(steps(record(model)(data.test.x[:1000])[1]).mean())


@torch.no_grad()
def stopped(model: nn.Module, x: Tensor) -> float:
    """Largest relative difference of early-stopped from masked inference."""
    y, z = model(x), masked(model)(x)
    return float((y - z).abs().max() / z.abs().max())


@torch.no_grad()
def seconds(models: list[nn.Module], x: Tensor) -> list[float]:
    """Processor seconds an image, one by one, in turn."""
    one = x.split(1)
    calls: dict[Any, Any] = {k: (lambda m=m: [m(part) for part in one]) for k, m in enumerate(models)}
    found = interleaved(calls, rounds=7, clock=time.thread_time)
    return [found[k].minimum / len(one) for k in calls]


def run(lab: Lab) -> list[Claim | Table]:
    data = fashion(lab, ROWS)
    model = seeded(0, build)
    trained(lab, "without halting", plain(model), data, [phase(EPOCHS)], loss=LAST_ONLY)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    full = accuracy(plain(model), data.test)[0]
    nets, right, took = [], [], []
    for tau in PRICES:
        net = seeded(0, lambda: build(-1.0))
        net.load_state_dict({name: value for name, value in start.items() if "halts" not in name}, strict=False)
        fine = [phase(EPOCHS // 2, lr=0.03)]
        nets.append(trained(lab, f"fine-tuned at {tau}", net, data, fine, loss=priced(tau)))
        right.append(accuracy(net, data.test)[0])
        took.append(units(net, data))
    free = seeded(0, build)
    free.load_state_dict(start)
    trained(lab, "fine-tuned at 0.00001", free, data, [phase(1, lr=0.005)], loss=priced(1e-5))
    near, kept = accuracy(free, data.test)[0], units(free, data)
    gap = max(stopped(net, data.test.x[:256]) for net in [*nets, free])
    times = seconds([free, *nets], data.test.x[:64])
    order = sorted(zip([kept, *took], times, strict=True))
    falls = all(a[1] < b[1] for a, b in itertools.pairwise(order) if b[0] - a[0] > 0.5)
    return [
        Claim("a price of 0.01 a unit takes fewer units than 0.001", f"{took[1]:.2f} against {took[0]:.2f} of 10", "fewer", took[1] < took[0], took[:2]),
        Claim("at an accuracy near the full network's", f"{100 * (full - right[1]):.2f} points lost", "<= 1.5 points", full - right[1] <= 0.015,
              [full - right[1]], f"{100 * full:.2f} % without halting; here halting biases start at -1, not -3, since there are hundreds of steps, not 50,000"),
        Claim("fine-tuned from a trained network at a price near 0, accuracy stays near it", f"{100 * (near - full):+.2f} points", "within 0.5 points",
              abs(near - full) <= 0.005, [near, full], "one epoch at 0.00001 a unit, biases -3"),
        Claim("and nearly all units run", f"{kept:.2f} of 10", ">= 9", kept >= 9, [kept]),
        Claim("early-stopped inference answers as masked inference does", f"{gap:.1e} relative difference", "<= 1e-5", gap <= 1e-5, [gap]),
        Claim("one by one, time falls with the units", ", ".join(f"{1e3 * t:.2f} ms at {u:.2f}" for u, t in reversed(order)),
              "falls wherever there's half a unit less", falls and order[-1][0] - order[0][0] > 0.5, [v for pair in order for v in pair]),
        Table("Fine-tuned at a price", ("price", "units of 10", "accuracy", "ms an image"),
              [(1e-5, kept, near, 1e3 * times[0]), *zip(PRICES, took, right, [1e3 * t for t in times[1:]], strict=True)]),
    ]  # fmt: skip
