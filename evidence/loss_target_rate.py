"""Target rates 0.3, 0.5 and 0.7 on a gated ResNet-14: are they met, do gates adapt to images, are they better than chance?"""

from __future__ import annotations

from _common import fashion, percent, phase, seeded, told, trained
from _gated import at_random, small, values

from pliant.losses import CrossEntropy, TargetRate, Total
from pliant.reproduce import Claim, Lab
from pliant.study import accuracy

ROWS, EPOCHS, TARGETS, WEIGHT, SEEDS = 3_000, 5, (0.3, 0.5, 0.7), 2.0, (0,)
DATA = told(ROWS, "; ResNet-14 of half the width; the YAML's claim is for CIFAR-10")


def run(lab: Lab) -> list[Claim]:
    data = fashion(lab, ROWS)
    off, spread, over, rates, right = [], [], [], [], []
    for target in TARGETS:
        net = seeded(SEEDS[0], lambda: small(14))
        loss = Total({"task": (1.0, CrossEntropy()), "rate": (WEIGHT, TargetRate(target))})
        trained(lab, f"target {target}", net, data, [phase(EPOCHS)], loss=loss, seed=SEEDS[0])
        z = values(net, data)
        rates.append(float(z.mean()))
        off.append(abs(rates[-1] - target))
        spread.append(float(z.mean(0).std()))
        right.append(accuracy(net, data.test)[0])
        blind = [at_random(net, data, z.mean(1), seed) for seed in range(3)]
        over.append(right[-1] - sum(blind) / len(blind))
    return [
        Claim("the mean rate on test images is the target's", f"{100 * max(off):.1f} points off at the worst target", "<= 5 points", max(off) <= 0.05, off,
              f"rates {', '.join(f'{r:.3f}' for r in rates)} for targets {TARGETS}; argmax gates; accuracy {percent(right)}"),
        Claim("rates differ between images: standard deviation of an image's rate",
              f"{min(spread):.3f} at the worst target", "> 0.05", min(spread) > 0.05, spread),
        Claim("learned gates beat random ones of the same rates (mean of 3 draws)", f"{percent(over)} points", ">= 2 points", min(over) >= 0.02, over),
    ]  # fmt: skip
