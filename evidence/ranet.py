"""RANet on Fashion-MNIST: against MSDNet and static ResNets at equal FLOPs, and what leaves at which resolution."""

from __future__ import annotations

import torch
from _common import ALL_EXITS, LAST_ONLY, always, fashion, held, percent, phase, seeded, told, trained
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pliant import bind, create_model, record, rules
from pliant.reproduce import Claim, Lab, Table
from pliant.study import accuracy
from pliant.systems.backbones import resnet
from pliant.systems.resolutions import FusionBlock
from pliant.tune import search
from pliant.tune.held_out import HeldOut

ROWS, EPOCHS, SEEDS = 4_000, 4, (0, 1)
DATA = told(ROWS, "; the YAML's claims are for CIFAR-10")
OURS = {"step": 2, "channels": 8, "growth": 6, "head_channels": 32}
RIVAL = {"exits": 6, "base": 1, "step": 1, "growing": 0, "channels": 8, "growth": 6, "head_channels": 32}
STATIC = {"8, 16, 32 channels": (8, 16, 32), "12, 24, 48": (12, 24, 48), "15, 30, 60": (15, 30, 60)}
SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def run(lab: Lab) -> list[Claim | Table]:
    data = fashion(lab, ROWS)
    x = data.test.x
    area, low, first, lost, blur, energy, over, same, twice, rows = ([] for _ in range(10))
    for seed in SEEDS:
        model = seeded(seed, lambda: create_model("ranet", in_chans=1, **OURS))
        trained(lab, f"RANet, seed {seed}", model, data, [phase(EPOCHS)], loss=ALL_EXITS, seed=seed)
        rival = seeded(seed, lambda: create_model("msdnet", in_chans=1, **RIVAL))
        trained(lab, f"MSDNet, seed {seed}", rival, data, [phase(EPOCHS)], loss=ALL_EXITS, seed=seed)
        (val, test), (other_val, other) = held(model, data), held(rival, data)
        top = min(float(test.flops[-1]), float(other.flops[-1]))
        bottom = max(float(test.flops[0]), float(other.flops[0]))
        budgets = [bottom + (top - bottom) * s for s in SHARES]
        ours = [at(val, test, b) for b in budgets]
        theirs = [at(other_val, other, b) for b in budgets]
        gain = [a - b for a, b in zip(ours, theirs, strict=True)]
        area.append(sum(gain) / len(gain))
        low.append(sum(gain[:4]) / 4)
        first.append(float(test.correct[0].double().mean()) - exit_of(other, float(test.flops[0])))
        rows += [(seed, b / 1e6, a, c) for b, a, c in zip(budgets, ours, theirs, strict=True)]
        over.append([])
        for name, widths in STATIC.items():
            net = seeded(seed, lambda widths=widths: resnet(10, 1, depth=8, widths=widths).model())
            trained(lab, f"ResNet-8 {name}, seed {seed}", net, data, [phase(EPOCHS)], loss=LAST_ONLY, seed=seed)
            flops = float(record(net)(x[:1])[1].flops[0])
            if float(test.flops[0]) <= flops <= float(test.flops[-1]):
                over[-1].append(at(val, test, flops) - accuracy(net, data.test)[0])
        exits = test.leaves(search(val, 0.5 * float(val.flops[-1])))
        coarse, fine = exits < 2, exits >= 4
        drop = [blurred_drop(model, x[part], data.test.y[part], exits[part]) for part in (coarse, fine)]
        blur.append(drop[1] - drop[0])
        high = (x - smooth(x)).square().flatten(1).mean(1)
        energy.append(float(high[fine].mean() / high[coarse].mean()))
        lost.append(lazy_gap(model, x[:64]))
        same.append(fine_blocks(model, x[:64]))
        twice.append(counted_twice(model, x[:2]))
    inside = min(len(o) for o in over)
    wins = [sum(g > 0 for g in o) for o in over]
    return [
        Claim(
            "MSDNet's budgeted curve lies below RANet's by 0.3 points on average over budgets, or RANet's first exit above an MSDNet exit of equal cost",
            f"curve {percent(area)} points, first exit {percent(first)} points",
            ">= 0.3 points, or > 0",
            min(area) >= 0.003 or min(first) > 0,
            [*area, *first],
            f"dense MFLOPs: RANet {float(test.flops[-1]) / 1e6:.1f}, MSDNet {float(other.flops[-1]) / 1e6:.1f}; first exits "
            f"{float(test.flops[0]) / 1e6:.2f} and {float(other.flops[0]) / 1e6:.2f}; budgets from the dearer first to the cheaper last",
        ),
        Claim(
            "in the lower half of the budgets it's at or above MSDNet's",
            f"{percent(low)} points",
            ">= 0",
            min(low) >= 0,
            low,
        ),
        Claim(
            "the budgeted curve is above static ResNet-8s of three sizes at their own FLOPs",
            f"{min(wins)} of {inside} (worst seed): {', '.join(percent(o) for o in over)} points",
            "3 of 3",
            min(wins) >= 3,
            [g for o in over for g in o],
        ),
        Claim(
            "run lazily, each exit answers as the full forward does",
            f"{max(lost):.1e} of the largest logit",
            "<= 1e-5",
            max(lost) <= 1e-5,
            lost,
        ),
        Claim(
            "what an exit costs counts lower sub-networks once: all stages and heads up to it, each run once",
            f"{max(twice):.0f} FLOPs more or less",
            "0",
            max(twice) == 0,
            twice,
        ),
        Claim(
            "no block of a finer sub-network runs where all leave in the first",
            f"{max(same):.0f} calls",
            "0",
            max(same) == 0,
            same,
        ),
        Claim(
            "blurring (sigma 1) costs less accuracy on inputs that leave at the lowest resolution than at the highest",
            f"{percent(blur)} points less",
            "> 0",
            min(blur) > 0,
            blur,
            "each input at the exit that it takes unblurred, thresholds for half the cost",
        ),
        Claim(
            "inputs that leave at the highest resolution have more energy in high frequencies",
            ", ".join(f"{e:.2f} times" for e in energy),
            "> 1 times",
            min(energy) > 1,
            energy,
            "mean square of what a blur of sigma 1 takes away",
        ),
        Table("Accuracy at budgets in MFLOPs", ("seed", "budget", "RANet", "MSDNet"), rows),
    ]


def at(val: HeldOut, test: HeldOut, flops: float) -> float:
    """Test accuracy with thresholds chosen on held-out rows for this many FLOPs."""
    return test.evaluate(search(val, flops))[0]


def exit_of(test: HeldOut, flops: float) -> float:
    """Accuracy of a chain's exits at this cost, straight lines between them; below the first one, its own."""
    right, costs = test.correct.double().mean(1), test.flops.double()
    if flops <= float(costs[0]):
        return float(right[0])
    k = min(int((costs <= flops).sum()) - 1, len(costs) - 2)
    w = (flops - float(costs[k])) / float(costs[k + 1] - costs[k])
    return float(right[k] * (1 - w) + right[k + 1] * w)


def smooth(x: Tensor, sigma: float = 1.0) -> Tensor:
    """A Gaussian blur."""
    line = torch.exp(-0.5 * (torch.arange(-3, 4) / sigma) ** 2)
    line = line / line.sum()
    return F.conv2d(F.conv2d(x, line.view(1, 1, 1, -1), padding=(0, 3)), line.view(1, 1, -1, 1), padding=(3, 0))


@torch.no_grad()
def blurred_drop(model: nn.Module, x: Tensor, y: Tensor, exits: Tensor) -> float:
    """How much accuracy a blur costs at these exits."""
    every = record(always(model))
    found = []
    for images in (x, smooth(x)):
        logits = torch.cat([torch.stack([e.logits for e in every(part)[1].exits]) for part in images.split(500)], 1)
        found.append(float((logits.argmax(-1).gather(0, exits[None])[0] == y).double().mean()))
    return found[0] - found[1]


@torch.no_grad()
def lazy_gap(model: nn.Module, x: Tensor) -> float:
    """Largest difference between an exit's answer when everything runs and when only what it needs does."""
    every, worst = record(always(model))(x)[1].exits, 0.0
    for last, full in enumerate(every):
        stop = {f"sites.{k}": rules.Always() if k < last else rules.Never() for k in range(len(every) - 1)}
        worst = max(worst, float((bind(model, stop)(x) - full.logits).abs().max() / full.logits.abs().max()))
    return worst


@torch.no_grad()
def counted_twice(model: nn.Module, x: Tensor) -> float:
    """How far the booked cost of any exit is from that of the stages and heads up to it, each run once by itself."""
    worst, spent, state = 0, 0, x
    for last, (stage, head) in enumerate(zip(model.stages, model.heads, strict=True)):  # pyright: ignore[reportArgumentType]
        with FlopCounterMode(display=False) as counter:
            state = stage(state)
            head(state)
        spent += counter.get_total_flops()
        stop = {f"sites.{k}": rules.Always() if k < last else rules.Never() for k in range(len(model.stages) - 1)}  # pyright: ignore[reportArgumentType]
        worst = max(worst, abs(int(record(bind(model, stop))(x)[1].flops.sum()) - spent))
    return float(worst)


@torch.no_grad()
def fine_blocks(model: nn.Module, x: Tensor) -> float:
    """Calls of fusion blocks where all rows leave at the first exit."""
    early, calls = bind(model, {"*": rules.Never()}), []
    for m in early.modules():
        if isinstance(m, FusionBlock):
            m.register_forward_pre_hook(lambda *_: calls.append(1))
    early(x)
    return float(len(calls))
