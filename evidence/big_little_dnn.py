"""Big/little DNN on Fashion-MNIST: a two-layer CNN before a ResNet-8."""

from __future__ import annotations

from _common import LAST_ONLY, always, fashion, faster, held, percent, phase, right, seeded, told, trained

from pliant import create_model, record, tune
from pliant.reproduce import Claim, Lab
from pliant.study import accuracy, batches
from pliant.systems.depth.big_little_dnn import big_little

ROWS, EPOCHS, SEEDS = 30_000, 8, (0, 1)
DATA = told(ROWS)


def run(lab: Lab) -> list[Claim]:
    data = fashion(lab, ROWS)
    gap, share, speed1, speed256, ordered, everywhere, exact = [], [], [], [], [], [], []
    for seed in SEEDS:
        blank = seeded(seed, lambda: create_model("big_little_dnn", in_chans=1, little="cnn2", big="resnet8"))
        little, big = (
            trained(lab, f"{name}, seed {seed}", net, data, [phase(EPOCHS)], loss=LAST_ONLY, seed=seed)
            for name, net in zip(("little", "big"), blank.heads, strict=True)
        )
        model = big_little(little, big).eval()
        tune(model, batches(data.val), risk=0.002)  # the threshold is chosen on held-out data alone
        alone = right(big, data).double().mean().item()
        got, flops, _ = accuracy(model, data.test)
        big_flops = float(
            record(always(model))(data.test.x[:1])[1].flops[0] - record(little)(data.test.x[:1])[1].flops[0]
        )
        gap.append(alone - got)
        share.append(flops / big_flops)
        speed1.append(faster(big, model, data.test.x[:256], batch=1, rounds=3))
        speed256.append(faster(big, model, data.test.x[:1024], batch=256))
        _, test = held(model, data)
        ordered.append(_over_random(test, 0.3))
        forwarded = (test.leaves(_thresholds(model)) == 1).double().mean().item()
        formula = float(test.flops[0]) + forwarded * big_flops
        exact.append(abs(flops / formula - 1))
        everywhere.append(min(_over_random(test, rate) for rate in (0.2, 0.3, 0.4, 0.5, 0.6)))
    return [
        Claim("a threshold chosen on held-out data keeps test accuracy near the big network's", f"{percent(gap)} points lost",
              "<= 0.5 points", max(gap) <= 0.005, gap),
        Claim("at that threshold the mean cost is at most half of the big network's", f"{percent(share)} %", "<= 50 %", max(share) <= 0.5, share),
        Claim("and the time per image falls, batch 1", f"{min(speed1):.2f}x (worst seed)", ">= 1.5x", min(speed1) >= 1.5, speed1),
        Claim("and batch 256", f"{min(speed256):.2f}x (worst seed)", ">= 1.5x", min(speed256) >= 1.5, speed256),
        Claim("forwarding by margin beats forwarding at random at every rate from 20 to 60 %", f"{percent(everywhere)} points at the worst rate",
              "> 0", min(everywhere) > 0, everywhere),
        Claim("and by this much at 30 %", f"{percent(ordered)} points",
              ">= 1 point", min(ordered) >= 0.01, ordered),
        Claim("measured mean cost equals little + forwarded x big", f"{max(exact):.1e} relative", "<= 1 %", max(exact) <= 0.01, exact),
    ]  # fmt: skip


def _thresholds(model):
    return model.sites[0].rule.threshold.reshape(1)


def _over_random(test, rate: float) -> float:
    """Accuracy by margin minus the expected accuracy of random forwarding, at the same rate."""
    order = test.scores[0].argsort(descending=True, stable=True)
    forward = order[: round(rate * len(order))]
    good = test.correct.double()
    chosen = good[0].clone()
    chosen[forward] = good[1][forward]
    return (chosen.mean() - ((1 - rate) * good[0].mean() + rate * good[1].mean())).item()
