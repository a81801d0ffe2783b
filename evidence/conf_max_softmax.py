"""The largest probability as a confidence: half the cost on four exits, batches against single images, and the thresholds' ends."""

from __future__ import annotations

import torch
from _chains import differing, fashion_four
from _common import ALL_EXITS, always, faster, percent, phase, seeded, trained
from torch import Tensor

from pliant import bind, plain, rules, sites, tune
from pliant.data import load
from pliant.execute import Exits
from pliant.reproduce import Claim, Lab
from pliant.study import accuracy, batches
from pliant.tune import collect

ROWS, EPOCHS, BUDGET, SEEDS = 8_000, 6, 0.5, (0, 1)
DATA = f"Fashion-MNIST: first {ROWS:,} training, 5,000 held-out and 10,000 test images; four exits"


@torch.no_grad()
def ends(model: Exits, x: Tensor) -> tuple[bool, bool]:
    """Whether thresholds that no confidence meets give the last exit, bit for bit, and ones that all meet the first."""
    never = bind(model, {"*": rules.Threshold(-0.01)})  # a doubt of -0.01: confidence 1.01
    at_once = bind(model, {"*": rules.Threshold(1.0)})
    first = model.heads[0](model.stages[0](x))
    return torch.equal(never(x), plain(model)(x)), torch.equal(at_once(x), first)


def run(lab: Lab) -> list[Claim]:
    data = load("fashion_mnist", lab.root, limit=ROWS)
    off, lost, over, counts, shares, last, first, right = ([] for _ in range(8))
    for seed in SEEDS:
        model = seeded(seed, fashion_four)
        trained(lab, f"seed {seed}", model, data, [phase(EPOCHS)], loss=ALL_EXITS, seed=seed)
        tune(model, batches(data.val), budget=BUDGET)
        got, flops, _ = accuracy(model, data.test)
        test = collect(model, batches(data.test))
        each = test.correct.double().mean(1)
        exits = test.leaves(torch.stack([site.rule.threshold for site in sites(model).values()]))
        histogram = torch.bincount(exits, minlength=4) / len(exits)
        off.append(abs(flops / float(test.flops[-1]) - BUDGET))
        lost.append(float(each[-1]) - got)
        over.append(got - float(histogram.double() @ each))
        right.append(each.tolist())
        counts += differing(model, data.test.x[:448])
        shares.append(1 / faster(always(model), model, data.test.x[:1024], batch=64))
        a, b = ends(model, data.test.x[:256])
        last.append(float(a))
        first.append(float(b))
    told = "; ".join(", ".join(f"{100 * v:.1f}" for v in each) for each in right)
    return [
        Claim("thresholds set on 5,000 held-out images for half the cost spend half on test images", f"{percent(off)} points off", "<= 3 points",
              max(off) <= 0.03, off),
        Claim("accuracy then is near the last exit's", f"{percent(lost)} points lost", "<= 1.0 points", max(lost) <= 0.01, lost,
              f"accuracy of the exits by seed: {told} %"),
        Claim("and above that of as many images leaving at each exit, chosen at random", f"{percent(over)} points", ">= 2 points", min(over) >= 0.02, over),
        Claim("batches of 1, 7 and 64 have the classes and exits of single images, scores within 1e-6 of a threshold excepted",
              f"{sum(counts)} of 448 rows differ", "0", not any(counts), counts),
        Claim("seconds at half the cost as a share of the full network's, batch 64, one thread", f"{percent(shares)} %", "< 75 %", max(shares) < 0.75, shares),
        Claim("thresholds above confidence 1 give the last exit, bit for bit", "yes" if all(last) else "no", "yes", all(last), last),
        Claim("and thresholds of confidence 0 the first", "yes" if all(first) else "no", "yes", all(first), first),
    ]  # fmt: skip
