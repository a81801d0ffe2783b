"""Distillation between the full and the partial network: what it adds at rate 0.4, and who gets its gradient."""

from __future__ import annotations

from statistics import mean

import torch
from _common import LAST_ONLY, fashion, percent, phase, seeded, told, trained
from _gated import small, values
from torch import nn

from pliant import bind, estimators, record, rules
from pliant.losses import CrossEntropy, Sandwich, SubnetworkDistillation, TargetRate, Total, dense, frozen
from pliant.reproduce import Claim, Lab
from pliant.study import accuracy
from pliant.systems.backbones import resnet

ROWS, EPOCHS, TARGET, SHARE, TEMPERATURE, SEEDS = 3_000, 6, 0.4, 0.5, 3.0, (0, 1, 2)
DATA = told(ROWS, "; ResNet-14 of 8, 16 and 32 channels; the YAML's claim is for CIFAR-10 and ResNet-20")
RATE = (4.0, TargetRate(TARGET))


def gated() -> nn.Module:
    """Each block with a gate whose decisions in training are those of evaluation: Gumbel's noise left rates at 66 %, not 40."""
    return bind(small(14), {"*": estimators.StraightThrough(rules.Threshold(0.0))})


def gradients(net: nn.Module, x: torch.Tensor) -> tuple[float, float]:
    """Norm of the live teacher's gradient at the gates, and at what the dense pass itself computed (its logits)."""
    net = net.train()
    full = dense(net)(x)
    full.retain_grad()
    y, trace = record(net)(x)
    loss = SubnetworkDistillation(share=1.0)(y, trace, torch.zeros(len(x), dtype=torch.int64), 0.0, (full, trace))
    loss.backward()
    gates = [p.grad.flatten() for name, p in net.named_parameters() if ".scorer." in name and p.grad is not None]
    return float(torch.cat(gates).norm()), 0.0 if full.grad is None else float(full.grad.norm())


def run(lab: Lab) -> list[Claim]:
    data = fashion(lab, ROWS)
    right: dict[str, list[float]] = {"none": [], "frozen": [], "live": [], "teacher": []}
    rates: dict[str, list[float]] = {"none": [], "frozen": [], "live": []}
    gates, through = [], []
    for seed in SEEDS:
        teacher = seeded(seed, lambda: resnet(10, 1, depth=14, widths=(8, 16, 32)).model())
        trained(lab, f"teacher, seed {seed}", teacher, data, [phase(EPOCHS)], loss=LAST_ONLY, seed=seed)
        right["teacher"].append(accuracy(teacher, data.test)[0])
        arms = {
            "none": CrossEntropy(),
            "frozen": SubnetworkDistillation(frozen(teacher), share=SHARE, temperature=TEMPERATURE),
            "live": Sandwich(share=SHARE, temperature=TEMPERATURE),
        }
        for name, term in arms.items():
            net = seeded(seed, gated)
            loss = Total({"task": (1.0, term), "rate": RATE})
            trained(lab, f"{name}, seed {seed}", net, data, [phase(EPOCHS)], loss=loss, seed=seed)
            right[name].append(accuracy(net, data.test)[0])
            rates[name].append(values(net, data).mean().item())
        at_gates, at_teacher = gradients(
            net, data.train.x[:64]
        )  # of the last arm, trained: at first all gates are open
        gates.append(at_gates)
        through.append(at_teacher)
    gain = {n: [a - b for a, b in zip(right[n], right["none"], strict=True)] for n in ("frozen", "live")}
    shown = "; ".join(f"{name} {percent(found)} %" for name, found in right.items())
    return [
        Claim("with distillation from the dense network trained before, a gated one at rate 0.4 is more accurate", f"{percent(gain['frozen'])} points",
              ">= +0.5 points (mean of seeds)", mean(gain["frozen"]) >= 0.005, gain["frozen"],
              f"share {SHARE}, T {TEMPERATURE:g}; live dense pass as the teacher, trained in the same step: {percent(gain['live'])} points (untrained by"
              f" anything else it taught rubbish: -11.3 points); accuracy: {shown}; "
              f"rates: {'; '.join(f'{name} {percent(found)} %' for name, found in rates.items())}"),
        Claim("the live teacher's term has a gradient at the gates", f"norm {min(gates):.1e} at least", "> 0", min(gates) > 0, gates),
        Claim("and none through the dense pass", f"{max(through):g}", "0", max(through) == 0, through),
    ]  # fmt: skip
