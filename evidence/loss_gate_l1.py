"""L1 on gates: does density fall with the weight, over four decades?"""

from __future__ import annotations

from itertools import pairwise

from _common import fashion, percent, phase, seeded, told, trained
from _gated import small, values

from pliant.losses import CrossEntropy, GateL1, Scheduled, Total, rising
from pliant.reproduce import Claim, Lab
from pliant.study import accuracy

ROWS, EPOCHS, WEIGHTS, SEEDS = 2_000, 4, (0.0, 1e-3, 1e-2, 1e-1, 1.0), (0,)
DATA = told(
    ROWS, "; gates of a ResNet-14 of half the width (the claim about pixel masks isn't run: no pixel masks here yet)"
)


def run(lab: Lab) -> list[Claim]:
    data = fashion(lab, ROWS)
    density, right = [], []
    for weight in WEIGHTS:
        net = seeded(SEEDS[0], lambda: small(14))
        loss = Total({"task": (1.0, CrossEntropy()), "gates": (weight, Scheduled(GateL1(), rising(0.2)))})
        trained(lab, f"weight {weight:g}", net, data, [phase(EPOCHS)], loss=loss, seed=SEEDS[0])
        density.append(float(values(net, data).mean()))
        right.append(accuracy(net, data.test)[0])
    falls = all(a >= b for a, b in pairwise(density)) and density[0] > density[-1]
    shown = ", ".join(f"{d:.3f}" for d in density)
    return [
        Claim("the share of open gates falls as the weight rises over four decades", shown, "each at most the one before", falls, density,
              f"weights {', '.join(f'{w:g}' for w in WEIGHTS)}; accuracy {percent(right)}"),
        Claim("without the penalty gates stay open", f"{density[0]:.3f}", "> 0.9", density[0] > 0.9, density[:1]),
    ]  # fmt: skip
