"""ConvNet-AIG: a gated ResNet-20 at target rate 0.6 on Fashion-MNIST, against the plain ResNet-20."""

from __future__ import annotations

import torch
from _common import LAST_ONLY, fashion, faster, percent, phase, seeded, told, trained

from pliant import bind, create_model, masked, plain, record, rules, sites
from pliant.losses import CrossEntropy, TargetRate, Total
from pliant.reproduce import Claim, Lab
from pliant.study import accuracy

ROWS, EPOCHS, TARGET, SEEDS = 8_000, 12, 0.6, (0, 1)
DATA = told(ROWS, "; the YAML's claim is for CIFAR-10")
LOSS = Total({"task": (1.0, CrossEntropy()), "rate": (1.0, TargetRate(TARGET))})


def run(lab: Lab) -> list[Claim]:
    data = fashion(lab, ROWS)
    x, y = data.test.x, data.test.y
    off, lost, spread, permuted, blind, sampled, differ, speed, over_plain, drawn = ([] for _ in range(10))
    for seed in SEEDS:
        base = seeded(seed, lambda: plain(create_model("convnet_aig", in_chans=1, depth=20)))
        trained(lab, f"plain, seed {seed}", base, data, [phase(EPOCHS)], loss=LAST_ONLY, seed=seed)
        model = seeded(seed, lambda: create_model("convnet_aig", in_chans=1, depth=20))
        trained(lab, f"gated, seed {seed}", model, data, [phase(EPOCHS)], loss=LOSS, seed=seed)
        got = accuracy(model, data.test)[0]
        with torch.no_grad():
            _, trace = record(model)(x)
            z = torch.stack([trace.dense(site) for site in trace])  # (gates, images)
            differ.append(float((masked(model)(x[:512]) - model(x[:512])).abs().max()))
        off.append((z.mean(1) - TARGET).abs().mean().item())
        lost.append(accuracy(base, data.test)[0] - got)
        rates = torch.stack([z[:, y == c].mean(1) for c in range(10)])
        spread.append((rates.amax(0) - rates.amin(0)).max().item())
        permuted.append(got - _with_masks_of_other_classes(model, x, y, z))
        blind.append(got - _at_random(model, x, y, z.mean(1)))
        noisy = create_model("convnet_aig", in_chans=1, depth=20, estimator="sample")
        noisy.load_state_dict(model.state_dict())
        draws = [accuracy(noisy.eval(), data.test)[0] for _ in range(3)]
        sampled.append(got - sum(draws) / len(draws))
        speed.append(faster(masked(model), model, x[:256], batch=1, rounds=5))
        over_plain.append(faster(plain(model), model, x[:256], batch=1, rounds=5))
        with torch.no_grad():
            seen = record(noisy)(x)[1]
        drawn.append((torch.stack([seen.dense(site) for site in seen]).mean(1) - TARGET).abs().mean().item())
    return [
        Claim("each gate's test rate is near its target, on average over gates", f"{percent(off)} points off", "<= 10 points", max(off) <= 0.1, off,
              f"argmax rates; sampled as the released code does, gates are {percent(drawn)} points off. Tried before: 8 epochs, 13.7 points off"),
        Claim("accuracy stays near the plain network's", f"{percent(lost)} points lost", "<= 0.7 points", max(lost) <= 0.007, lost,
              "tried before: 8 epochs, 1.75 points lost"),
        Claim("some gate's rate differs between classes", f"{percent(spread)} points", ">= 20 points", min(spread) >= 0.2, spread),
        Claim("masks of images of other classes cost accuracy", f"{percent(permuted)} points", ">= 1 point", min(permuted) >= 0.01, permuted),
        Claim("random gates of the same rates cost accuracy", f"{percent(blind)} points", ">= 2 points", min(blind) >= 0.02, blind),
        Claim("argmax gates are at least as accurate as sampled ones (mean of 3 draws)", f"{percent(sampled)} points", ">= 0", min(sampled) >= 0, sampled),
        Claim("skipping equals masking", f"{max(differ):.1e} largest difference", "<= 1e-4", max(differ) <= 1e-4, differ),
        Claim("and saves time at batch 1 against masking", f"{min(speed):.2f}x (worst seed)", "> 1x", min(speed) > 1, speed),
        Claim("and even against the plain network, which has no gates", f"{min(over_plain):.2f}x (worst seed)", "> 1x", min(over_plain) > 1, over_plain,
              "nine gates cost more here than the skipped blocks save; tried before: 0.79x with 8 epochs"),
    ]  # fmt: skip


@torch.no_grad()
def _with_masks_of_other_classes(model, x, y, z) -> float:
    """Accuracy when each image runs with the gates of an image of another class."""
    g = torch.Generator().manual_seed(0)
    order = torch.randperm(len(y), generator=g)
    for _ in range(50):  # reshuffle those that met their own class
        same = (y[order] == y).nonzero().squeeze(1)
        if len(same) < 2:
            break
        order[same] = order[same[torch.randperm(len(same), generator=g)]]
        swap = torch.randint(len(y), (len(same),), generator=g)
        order[same], order[swap] = order[swap].clone(), order[same].clone()
    forced = {path: _Fixed(z[k][order]) for k, path in enumerate(sites(model))}
    return (bind(model, forced)(x).argmax(-1) == y).double().mean().item()


@torch.no_grad()
def _at_random(model, x, y, rates) -> float:
    g = torch.Generator().manual_seed(0)
    found = [
        (
            bind(model, {p: rules.Random(float(r), g) for p, r in zip(sites(model), rates, strict=True)})(x).argmax(-1)
            == y
        )
        for _ in range(3)
    ]
    return torch.stack(found).double().mean().item()


class _Fixed(rules.Rule):
    """These values, whatever the scores."""

    reads_scores = False

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.values = values

    def forward(self, scores):
        from pliant.core.site import Outcome

        return Outcome(self.values.to(scores))
