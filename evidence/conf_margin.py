"""The margin between the two largest probabilities: a cascade of a small CNN and one that costs over 20 times as much."""

from __future__ import annotations

import torch
from _common import LAST_ONLY, fashion, held, percent, phase, seeded, told, trained
from torch.utils.flop_counter import FlopCounterMode

from pliant import bind, gathered, record, rules
from pliant.reproduce import Claim, Lab, Table
from pliant.systems.backbones import cnn2, resnet
from pliant.systems.depth.big_little_dnn import big_little
from pliant.tune import HeldOut

ROWS, EPOCHS, SEEDS = 6_000, 5, (0, 1)
RATES = tuple(k / 10 for k in range(1, 10))
DATA = told(ROWS)


def accepting(test: HeldOut, rate: float) -> tuple[float, float]:
    """Accuracy of the cascade that keeps the little net's surest answers, and the error among them."""
    kept = test.scores[0].argsort(stable=True)[: round(rate * len(test.labels))]
    good = test.correct.double()
    chosen = good[1].clone()
    chosen[kept] = good[0][kept]
    return chosen.mean().item(), 1 - good[0][kept].mean().item()


@torch.no_grad()
def counted(cascade: torch.nn.Module, x: torch.Tensor, little: int, big: int) -> tuple[int, int]:
    """FLOPs that the counter sees in a gathered run, and those of little for all plus big for who went on."""
    with FlopCounterMode(display=False) as counter:
        _, trace = record(gathered(cascade))(x)
    return counter.get_total_flops(), little * len(x) + big * int(trace.dense("sites.0").sum())


def run(lab: Lab) -> list[Claim | Table]:
    data = fashion(lab, ROWS)
    x = data.test.x
    above, better, whole, gaps, ratio, even, rows = ([] for _ in range(7))
    for seed in SEEDS:
        little, big = (
            trained(lab, f"{name}, seed {seed}", seeded(seed, lambda b=build: b().model()), data, [phase(EPOCHS)], loss=LAST_ONLY, seed=seed)
            for name, build in (("little", lambda: cnn2(10, 1, widths=(8, 16))), ("big", lambda: resnet(10, 1, depth=8)))
        )  # fmt: skip
        cascade = big_little(little, big).eval()
        test = held(cascade, data)[1]
        prices = [int(record(net)(x[:1])[1].flops[0]) for net in (little, big)]
        ratio.append(prices[1] / prices[0])
        even.append(prices[0] / prices[1])
        ends = test.correct.double().mean(1)
        for rate in RATES:
            got, wrong = accepting(test, rate)
            line = float(rate * ends[0] + (1 - rate) * ends[1])
            above.append(got - line)
            better.append(float(1 - ends[0]) - wrong)
            rows.append([f"seed {seed}", rate, got, line, wrong, even[-1] + 1 - rate])
        with torch.no_grad():
            alone = [torch.cat([net(part) for part in x.split(500)]) for net in (little, big)]
            for threshold, wanted in (
                (1.0, alone[0]),
                (-0.01, alone[1]),
            ):  # margins of at least 0, and of at least 1.01
                forced = bind(cascade, {"*": rules.Threshold(threshold)})
                whole.append(
                    float((torch.cat([forced(part) for part in x.split(500)]).argmax(-1) != wanted.argmax(-1)).sum())
                )
        for share in (0.0, 0.1, 0.5, 1.0):
            threshold = rules.Threshold(float(test.scores[0].quantile(1 - share)) - (share == 1.0))
            seen, said = counted(bind(cascade, {"*": threshold}), x[:500], *prices)
            gaps.append(abs(seen - said))
    return [
        Claim("the cascade is above the line from little to big, at every rate of acceptance from 10 to 90 %",
              f"{100 * min(above):+.2f} points at the worst rate and seed", "> 0", min(above) > 0, above,
              f"big costs {min(ratio):.1f} times as much; a cascade costs more than big alone where less than {percent(even)} % is accepted"),
        Claim("errors among the accepted are rarer than the little net's overall", f"{100 * min(better):+.2f} points at the worst rate and seed", "> 0",
              min(better) > 0, better),
        Claim("a margin above 1 asked for gives big's classes on all images, one of 0 little's", f"{sum(whole):.0f} differ", "0", not any(whole), whole),
        Claim("counted FLOPs are little for all and big for those deferred, at 0, 10, 50 and 100 %", f"{sum(gaps)} FLOPs apart", "0", not any(gaps), gaps),
        Table("Rate of acceptance against accuracy, the line between the two nets, error among the accepted, and cost as a share of big's",
              ("run", "accepted", "accuracy", "line", "error", "cost"), rows, ("cost", "accuracy")),
    ]  # fmt: skip
