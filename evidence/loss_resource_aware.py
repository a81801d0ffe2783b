"""The resource-aware loss: is the budget met, what do the blocks' bounds do, and who is closed where costs differ?"""

from __future__ import annotations

from dataclasses import replace
from statistics import mean

import torch
from _common import fashion, percent, phase, seeded, told, trained
from _gated import small, values
from torch.utils.flop_counter import FlopCounterMode

from pliant import Site, estimators, gathered, masked, record, rules, scores
from pliant.cost import expected_flops
from pliant.execute import Skip
from pliant.losses import CrossEntropy, FlopsBudget, GlobalTargetRate, ResourceAware, Total
from pliant.reproduce import Claim, Lab
from pliant.study import accuracy

ROWS, EPOCHS, SHARE, WEIGHT, SEEDS = 2_500, 4, 0.5, 10.0, (0, 1, 2)
DATA = told(ROWS, "; ResNet-14 of half the width, gates per block, not per pixel; the two blocks: normal random rows")
TERMS = {"bounded": ResourceAware(SHARE), "free": FlopsBudget(SHARE)}


def two_blocks(term: object, seed: int) -> tuple[float, float]:
    """Test rates of a cheap and a dear gated block, each worth as much to the task, ten times apart in cost."""
    torch.manual_seed(seed)

    def block(inner: int) -> Skip:
        part = torch.nn.Sequential(torch.nn.Linear(4, inner), torch.nn.Linear(inner, 4))
        return Skip(part, Site(scores.LinearGate(4, bias=1.0), estimators.Gumbel(rules.Threshold(0.0))))

    class Sum(torch.nn.Module):
        """Both blocks read the same kind of input and are asked for the same function of it."""

        def __init__(self) -> None:
            super().__init__()
            self.cheap, self.dear = block(4), block(40)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = x[:, :4], x[:, 4:]
            return torch.cat([self.cheap(a), self.dear(b)], 1)

    net = Sum().train()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    wanted = torch.randn(4, 4) / 2
    for step in range(300):
        x = torch.randn(64, 8)
        y, trace = record(net)(x)
        target = torch.cat([x[:, :4] @ wanted, x[:, 4:] @ wanted], 1)
        loss = (y - target).square().mean() + WEIGHT * term(y, trace, target, step / 300)  # pyright: ignore
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        trace = record(net.eval())(torch.randn(2000, 8))[1]
    return float(trace.dense("cheap.site").mean()), float(trace.dense("dear.site").mean())


def counted(net: torch.nn.Module, x: torch.Tensor) -> float:
    """Relative gap between the cost in the loss, of hard values, and what the counter sees executed, in evaluation."""
    with torch.no_grad():
        trace = record(masked(net))(x)[1]
        with FlopCounterMode(display=False) as counter:
            gathered(net)(x)
    visits = {site: tuple(replace(d, soft=None) for d in found) for site, found in trace.visits.items()}
    said = float(expected_flops(replace(trace, visits=visits)).sum())
    return abs(said - counter.get_total_flops()) / counter.get_total_flops()


def run(lab: Lab) -> list[Claim]:
    data = fashion(lab, ROWS)
    spent, spread, least, right = ({name: [] for name in TERMS} for _ in range(4))
    gaps = []
    for seed in SEEDS:
        for name, term in TERMS.items():
            net = seeded(seed, lambda: small(14))
            loss = Total({"task": (1.0, CrossEntropy()), "cost": (WEIGHT, term)})
            trained(lab, f"{name}, seed {seed}", net, data, [phase(EPOCHS)], loss=loss, seed=seed)
            got, flops, _ = accuracy(net, data.test)
            rates = values(net, data).mean(1)
            spent[name].append(flops / int(record(net)(data.test.x[:1])[1].dense_flops[0]))
            spread[name].append(float(rates.std()))
            least[name].append(float(rates.min()))
            right[name].append(got)
            gaps.append(counted(net, data.test.x[:256]))
    worse = [float(a < 0.05 or s > t) for a, s, t in zip(least["free"], spread["free"], spread["bounded"], strict=True)]
    dear = {
        name: [b - a for a, b in (two_blocks(term, seed) for seed in SEEDS)]
        for name, term in (("FLOPs", FlopsBudget(SHARE)), ("counts", GlobalTargetRate(SHARE)))
    }
    within = all(0.45 <= s <= 0.55 for s in spent["bounded"])
    shown = {name: ", ".join(f"{v:.3f}" for v in found) for name, found in spread.items()}
    return [
        Claim("executed FLOPs on test images are the wanted half of the dense ones",
              f"{percent(spent['bounded'])} % of them", "45 to 55 %", within, spent["bounded"],
              f"without bounds {percent(spent['free'])} %; accuracy {percent(right['bounded'])}, without bounds {percent(right['free'])}"),
        Claim("without bounds a block dies or rates differ more between blocks", f"{sum(worse):.0f} of {len(worse)} seeds", ">= 2 of 3", sum(worse) >= 2, worse,
              f"deviation between blocks with bounds {shown['bounded']}, without {shown['free']}; "
              f"least rate with {percent(least['bounded'])}, without {percent(least['free'])}"),
        Claim("of two blocks as useful, ten times apart in cost, a budget in FLOPs closes the dear one more than one in counts",
              f"rate of the dear minus the cheap block: {mean(dear['FLOPs']):+.2f} by FLOPs, {mean(dear['counts']):+.2f} by counts",
              "lower by FLOPs, every seed", all(a < b for a, b in zip(dear["FLOPs"], dear["counts"], strict=True)), [*dear["FLOPs"], *dear["counts"]]),
        Claim("the cost in the loss is what the counter sees executed", f"{max(gaps):.1e} relative gap at most", "<= 1 %", max(gaps) <= 0.01, gaps),
    ]  # fmt: skip
