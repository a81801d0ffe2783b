"""MSDNet against a ResNet and a DenseNet with exits, Fashion-MNIST: which exits are best, does an early one hurt the last?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from _common import ALL_EXITS, always, fashion, faster, held, percent, phase, seeded, told, trained

from pliant import Site, create_model, record, rules, scores, tune
from pliant.execute import Exits
from pliant.losses import MultiExit, Total
from pliant.reproduce import Claim, Lab
from pliant.study import accuracy, batches
from pliant.systems.backbones import resnet
from pliant.systems.multiscale import Classifier

ROWS, EPOCHS, SEEDS = 8_000, 5, (0, 1)
DATA = told(ROWS, "; the YAML's claims are for CIFAR-10")
CONFIG = {"exits": 5, "base": 1, "step": 1, "growing": 1, "channels": 6, "growth": 6, "head_channels": 32}


class Pyramid1(torch.nn.Module):
    """A head that takes a single map where MSDNet's takes a list of scales."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.head = Classifier(channels, 32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head([x])


def resnet_exits(widths: Sequence[int], after: Sequence[int]) -> Exits:
    """A ResNet-20 with MSDNet's classifiers after given blocks and at its end."""
    parts = resnet(10, 1, depth=20, widths=widths)
    stages = parts.stages(list(after))
    channels = [widths[(n - 1) // 3] for n in after]
    heads = [*(Pyramid1(c) for c in channels), parts.head]
    return Exits(stages, heads, [Site(scores.MaxProbability(), rules.Threshold(0.5)) for _ in after])


class Dense(torch.nn.Module):
    """A layer of a DenseNet: what it makes stands beside what it read."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        conv = torch.nn.Conv2d(channels, growth, 3, padding=1, bias=False)
        self.layer = torch.nn.Sequential(torch.nn.BatchNorm2d(channels), torch.nn.ReLU(), conv)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, self.layer(x)], 1)


def densenet_exits(growth: int, layers: int, after: Sequence[int]) -> Exits:
    """A DenseNet of three blocks with MSDNet's classifiers after given layers and at its end."""
    channels, done, stages, heads = 2 * growth, 0, [], []
    stage: list[torch.nn.Module] = [torch.nn.Conv2d(1, channels, 3, padding=1, bias=False)]
    for block in range(3):
        if block:
            half = torch.nn.Conv2d(channels, channels // 2, 1, bias=False)
            stage += [torch.nn.BatchNorm2d(channels), torch.nn.ReLU(), half, torch.nn.AvgPool2d(2)]
            channels //= 2
        for _ in range(layers):
            stage.append(Dense(channels, growth))
            channels, done = channels + growth, done + 1
            if done in (*after, 3 * layers):
                stages.append(torch.nn.Sequential(*stage))
                heads.append(Pyramid1(channels))
                stage = []
    return Exits(stages, heads, [Site(scores.MaxProbability(), rules.Threshold(0.5)) for _ in after])


def at_cost(flops: torch.Tensor, accuracies: torch.Tensor, cost: float) -> float:
    """Accuracy at ``cost``, straight lines between exits; below the first exit, its own (in the rival's favour)."""
    cost = min(max(cost, float(flops[0])), float(flops[-1]))
    k = min(int((flops <= cost).sum()) - 1, len(flops) - 2)
    w = (cost - float(flops[k])) / float(flops[k + 1] - flops[k])
    return float(accuracies[k] * (1 - w) + accuracies[k + 1] * w)


def run(lab: Lab) -> list[Claim]:
    data = fashion(lab, ROWS)
    one = data.test.x[:1]
    build = {
        "MSDNet": lambda: create_model("msdnet", in_chans=1, **CONFIG),
        "ResNet": lambda: resnet_exits((12, 24, 48), (1, 2, 4, 6)),
        "DenseNet": lambda: densenet_exits(8, 5, (1, 2, 3, 5)),
    }
    cost = {name: int(record(always(make().eval()))(one)[1].flops[0]) for name, make in build.items()}
    gains: dict[str, list[float]] = {"ResNet": [], "DenseNet": []}
    hurt: dict[str, list[float]] = {"MSDNet": [], "ResNet": []}
    over, speed, curves = [], [], []
    for seed in SEEDS:
        every = {}
        for name, make in build.items():
            every[name] = trained(
                lab, f"{name}, all exits, {seed}", seeded(seed, make), data, [phase(EPOCHS)], loss=ALL_EXITS, seed=seed
            )
            last = {}
            for what, first in (("last", 0.0), ("first and last", 1.0)) if name in hurt else ():
                weights = [first, 0.0, 0.0, 0.0, 1.0]
                loss = Total({"exits": (1.0, MultiExit(weights))})
                net = trained(
                    lab, f"{name}, {what}, {seed}", seeded(seed, make), data, [phase(EPOCHS)], loss=loss, seed=seed
                )
                last[what] = accuracy(always(net), data.test)[0]
            if last:
                hurt[name].append(last["last"] - last["first and last"])
        tests = {name: held(net, data)[1] for name, net in every.items()}
        right = {name: test.correct.double().mean(1) for name, test in tests.items()}
        ours, mine = tests["MSDNet"], right["MSDNet"]
        early = [k for k in range(5) if float(ours.flops[k]) < 0.5 * float(ours.flops[-1])]
        for name, found in gains.items():
            curve = tests[name].flops.double(), right[name]
            found += [float(mine[k]) - at_cost(*curve, float(ours.flops[k])) for k in early]
        curves += [a for one_net in right.values() for a in one_net.tolist()]
        model = every["MSDNet"]
        tune(model, batches(data.val), budget=0.5)
        got, flops, _ = accuracy(model, data.test)
        over.append(got - at_cost(ours.flops.double(), mine, flops))
        speed.append(faster(always(model), model, data.test.x[:1024], batch=256, rounds=5))
    mega = ", ".join(f"{name} {flops / 1e6:.1f}" for name, flops in cost.items())
    beaten = [
        Claim(f"every MSDNet exit before half of its cost beats a {name}'s exit of equal FLOPs, trained alike",
              f"{100 * min(found):+.2f} points at the worst exit and seed", ">= +1.5 points", min(found) >= 0.015, found,
              f"dense MFLOPs: {mega}")
        for name, found in gains.items()
    ]  # fmt: skip
    return [
        *beaten,
        Claim("adding the first exit's loss changes MSDNet's last exit little", f"{percent(hurt['MSDNet'])} points lost", "< 0.5 points (mean)",
              abs(sum(hurt["MSDNet"]) / len(SEEDS)) < 0.005, hurt["MSDNet"]),
        Claim("and costs the ResNet's last exit more than MSDNet's", f"{percent(hurt['ResNet'])} points lost", "more than MSDNet's",
              sum(hurt["ResNet"]) > sum(hurt["MSDNet"]), hurt["ResNet"]),
        Claim("tuned to 50 % of its FLOPs it is more accurate than its anytime exit of equal FLOPs", f"{percent(over)} points", "> 0", min(over) > 0, over),
        Claim("and its time falls accordingly, batch 256", f"{min(speed):.2f}x (worst seed)", ">= 1.5x", min(speed) >= 1.5, speed),
        Claim("accuracy of every exit (MSDNet's five, ResNet's five, DenseNet's five, by seed)", percent(curves), "reported", True, curves),
    ]  # fmt: skip
