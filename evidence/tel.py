"""Tree ensemble layer: exact sparsity in forward and backward, that grows in training; and the depth from which it pays."""

from __future__ import annotations

import copy
import time

import torch
from _common import LAST_ONLY, fashion, phase, told, trained
from torch import Tensor, nn
from torch.nn import functional as F

from pliant import gathered, masked, record
from pliant.core.bind import share
from pliant.cost import interleaved
from pliant.execute import Trees
from pliant.reproduce import Claim, Lab, Table
from pliant.rules import Sigmoid, SmoothStep
from pliant.study import accuracy
from pliant.train import Fit, fit

ROWS, EPOCHS, SEEDS, TREES, SIDE = 6_000, 6, (0, 1), 10, 10
DATA = told(ROWS, f", averaged to {SIDE} by {SIDE} pixels; the layer alone on batch-normalised pixels")


class Pixels(nn.Module):
    """Averaged pixels as features."""

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, SIDE).flatten(1)


def forest(depth: int, rule, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    trees = Trees(SIDE * SIDE, 10, trees=TREES, rules=[rule() for _ in range(depth)])
    return nn.Sequential(Pixels(), nn.BatchNorm1d(SIDE * SIDE), trees)


@torch.no_grad()
def leaves(model: nn.Module, x: Tensor) -> float:
    """Leaves that a row reaches in one tree, on average."""
    was = model.training
    _, trace = record(gathered(model.eval()))(x)
    model.train(was)
    return float(trace.notes[-1].units.double().mean()) / TREES


def run(lab: Lab) -> list[Claim | Table]:
    data, depth = fashion(lab, ROWS), 6
    x = data.test.x[:500]
    first, last, final, rows = [], [], {}, []
    for width in (0.1, 0.3, 1.0, 3.0):
        for seed in SEEDS if width == 1.0 else SEEDS[:1]:
            model = forest(depth, lambda width=width: SmoothStep(width), seed)
            seen = [leaves(_normed(model, data), x)]
            fit(
                gathered(model),
                data.train,
                LAST_ONLY,
                [adam(EPOCHS)],
                options=Fit(seed=seed, on_epoch=lambda _, m=model, s=seen: s.append(leaves(m, x))),
            )
            right = accuracy(model.eval(), data.test)[0]
            rows.append((width, seed, seen[0], seen[1], seen[-1], right))
            final.setdefault(width, seen[-1])
            if width == 1.0:
                first.append(seen[0])
                last.append(seen[-1])
            lab.progress("widths", len(rows), 6)
    soft = forest(depth, Sigmoid)
    trained(lab, "sigmoid", soft, data, [adam(EPOCHS)], loss=LAST_ONLY)
    always, rounded = leaves(copy.deepcopy(soft).double(), x.double()), leaves(soft, x)
    rows.append(("sigmoid", 0, 2.0**depth, 2.0**depth, always, accuracy(soft, data.test)[0]))
    outputs, gradients = zip(*(_gap(seed) for seed in SEEDS), strict=True)
    speed = []
    for deep in (4, 6, 8, 10):
        model = forest(deep, lambda: SmoothStep(1.0))
        fit(gathered(model), data.train, LAST_ONLY, [adam(3 if deep < 10 else 2)], options=Fit(seed=0))
        speed += [(deep, batch, leaves(model, x), *_times(model.eval(), x[:batch])) for batch in (1, 64)]
        lab.progress("depths", deep, 10)
    wins = {(deep, batch): dense / sparse for deep, batch, _, _, sparse, dense in speed}
    ordered = [final[w] for w in sorted(final)]
    return [
        Claim(
            "sparse outputs are those of the dense formula",
            f"{max(outputs):.1e}",
            "<= 1e-5",
            max(outputs) <= 1e-5,
            outputs,
        ),
        Claim(
            "and so are all gradients, of leaves, nodes and input (double precision; finite differences in the tests)",
            f"{max(gradients):.1e}",
            "<= 1e-5",
            max(gradients) <= 1e-5,
            gradients,
        ),
        Claim(
            "reachable leaves per tree fall during training (depth 6, width 1)",
            f"{sum(first) / len(first):.1f} to {sum(last) / len(last):.1f} of 64",
            "falls",
            all(b < a for a, b in zip(first, last, strict=True)),
            [*first, *last],
        ),
        Claim(
            "and fall as the width shrinks (3, 1, 0.3, 0.1)",
            ", ".join(f"{v:.1f}" for v in reversed(ordered)),
            "falls",
            ordered == sorted(ordered) and len(set(ordered)) == 4,
            ordered,
        ),
        Claim(
            "with a sigmoid they stay all",
            f"{always:.1f} of 64",
            "64",
            always == 64,
            [always],
            f"in double precision; in single a trained sigmoid rounds to 1 here and there, and {rounded:.2f} are left",
        ),
        Claim(
            "at depth 8 and 10 inference of the trained layer beats a dense soft tree of the same size, 64 rows",
            f"{wins[8, 64]:.2f}x and {wins[10, 64]:.2f}x",
            "> 1x",
            min(wins[8, 64], wins[10, 64]) > 1,
            [wins[8, 64], wins[10, 64]],
        ),
        Claim(
            "and for one row",
            f"{wins[8, 1]:.2f}x and {wins[10, 1]:.2f}x",
            "> 1x",
            min(wins[8, 1], wins[10, 1]) > 1,
            [wins[8, 1], wins[10, 1]],
            "some thirty small operations per level cost one row more than the product that they save; tried: whole levels where many nodes are reached",
        ),
        Table(
            "Leaves reached per tree of depth 6, and accuracy",
            ("width", "seed", "at the start", "after an epoch", "trained", "accuracy"),
            rows,
        ),
        Table(
            "Milliseconds of the trained layer, and of a dense soft tree (one matrix product)",
            ("depth", "batch", "leaves per tree", "only reached nodes", "full levels whole", "dense"),
            speed,
        ),
    ]


def adam(epochs: int):
    return phase(epochs, optimizer="adam", lr=0.01, momentum=0.0, nesterov=False, weight_decay=0.0)


@torch.no_grad()
def _normed(model: nn.Sequential, data) -> nn.Module:
    """The model with its batch norm's statistics from some training images."""
    model.train()
    for part in data.train.x[:2000].split(200):
        model[1](model[0](part))
    return model


def _gap(seed: int) -> tuple[float, float]:
    torch.manual_seed(seed)
    net = Trees(20, 5, trees=4, rules=[SmoothStep(1.0) for _ in range(6)]).double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.4)
    x, found = torch.randn(40, 20, dtype=torch.float64), []
    for form in (masked, gathered):
        at = x.clone().requires_grad_()
        y = form(net)(at)
        found.append((y.detach(), torch.autograd.grad(y.square().sum(), [at, *net.parameters()])))
    (y, g), (z, h) = found
    return float((y - z).abs().max()), max(float((a - b).abs().max()) for a, b in zip(g, h, strict=True))


@torch.no_grad()
def _times(model: nn.Sequential, x: Tensor) -> tuple[float, ...]:
    """Milliseconds of the layer on its features: reached nodes only, levels with many reached nodes whole, and dense."""
    trees, z = model[2], model[1](model[0](x))
    weight, counts = torch.cat([level.weight for level in trees.nodes]), [len(level.weight) for level in trees.nodes]

    def dense() -> Tensor:
        right, reach = torch.sigmoid(z @ weight.T).split(counts, 1), z.new_ones(len(z), TREES)
        for p in right:
            reach = torch.stack([reach * p, reach * (1 - p)], -1).flatten(1)
        return reach @ trees.leaves

    exact, mixed = trees, share(trees)
    mixed.dense_above = 1 / 24
    calls = {"exact": lambda: exact(z), "mixed": lambda: mixed(z), "dense": dense}
    found = interleaved(calls, rounds=15, clock=time.thread_time)
    return tuple(found[name].minimum * 1e3 for name in calls)
