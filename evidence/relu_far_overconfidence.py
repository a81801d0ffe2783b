"""Far from the data: images times 50 and noise leave a chain of exits at once, and a guard that keeps them in."""

from __future__ import annotations

import torch
from _chains import chain
from _common import fashion, held, percent, phase, seeded, told, trained

from pliant import bind, record, rules, sites, tune
from pliant.reproduce import Claim, Lab
from pliant.scores import MaxProbability
from pliant.scores.guard import Guarded, LogitDistance
from pliant.study import batches
from pliant.tune import geometric

ROWS, EPOCHS, SEEDS = 3_000, 4, (0, 1)
DATA = told(ROWS, "; four exits")


@torch.no_grad()
def leave(model, x):
    """Whether each image leaves at exit 1."""
    return torch.cat([record(model)(part)[1].dense("sites.0") == 0 for part in x.split(500)])


def run(lab: Lab) -> list[Claim]:
    data = fashion(lab, ROWS)
    x = data.test.x[:2000]
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    noise = (noise - torch.tensor(data.mean).reshape(1, -1, 1, 1)) / torch.tensor(data.std).reshape(1, -1, 1, 1)
    far, far_held, noisy, noisy_held, kept, share = ([] for _ in range(6))
    for seed in SEEDS:
        model = seeded(seed, lambda: chain((8, 16, 24, 32), halve=(0, 2)))
        trained(lab, f"seed {seed}", model, data, [phase(EPOCHS)], seed=seed)
        tune(model, batches(data.val), budget=0.6, solver=geometric)  # by search, nobody leaves at exit 1 here
        val, _ = held(model, data)
        parts = {}
        for k, (path, site) in enumerate(sites(model).items()):
            score = MaxProbability()
            score.temperature.copy_(site.scorer.temperature)
            guard = LogitDistance(10).fit(val.logits[k], val.labels, keep=0.95)
            parts[path] = (Guarded(score, guard), rules.Threshold(float(site.rule.threshold)))
        guarded = bind(model, parts)
        usual = leave(model, x)
        share.append(usual.double().mean().item())
        kept.append(leave(guarded, x)[usual].double().mean().item())
        far.append(leave(model, 50 * x).double().mean().item())
        far_held.append(leave(guarded, 50 * x).double().mean().item())
        noisy.append(leave(model, noise).double().mean().item())
        noisy_held.append(leave(guarded, noise).double().mean().item())
    return [
        Claim("images times 50 leave at exit 1 by the largest probability", f"{percent(far)} %", "> 90 %", min(far) > 0.9, far,
              f"thresholds by the geometric solver, 60 % of the FLOPs; {percent(share)} % of the images themselves leave there"),
        Claim("with the guard, images times 50 leave at exit 1", f"{percent(far_held)} %", "<= 10 %", max(far_held) <= 0.1, far_held),
        Claim("with the guard, uniform noise leaves at exit 1", f"{percent(noisy_held)} %", "<= 10 %", max(noisy_held) <= 0.1, noisy_held,
              f"without: {percent(noisy)} %"),
        Claim("of the images that left at exit 1, still leave there", f"{percent(kept)} %", ">= 90 %", min(kept) >= 0.9, kept),
    ]  # fmt: skip
