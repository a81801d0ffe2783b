"""BranchyNet: B-LeNet on Fashion-MNIST, the trunk first, then all exits."""

from __future__ import annotations

import torch
from _common import ALL_EXITS, LAST_ONLY, always, fashion, faster, held, percent, phase, seeded, told, trained

from pliant import create_model, plain
from pliant.insight.overthinking import auroc
from pliant.reproduce import Claim, Lab
from pliant.study import accuracy

ROWS, EPOCHS, SEEDS = 20_000, 5, (0, 1, 2)
DATA = told(ROWS, "; the paper's and the bound's MNIST isn't here")


def run(lab: Lab) -> list[Claim]:
    data = fashion(lab, ROWS)
    leave, loss_, speed, worse, auc = [], [], [], [], []
    for seed in SEEDS:
        model = seeded(seed, lambda: create_model("branchynet", in_chans=1))
        settings = {"lr": 0.05, "clip": 5.0}
        trained(lab, f"trunk, seed {seed}", plain(model), data, [phase(EPOCHS, **settings)], loss=LAST_ONLY, seed=seed)
        trunk_longer = seeded(seed, lambda: create_model("branchynet", in_chans=1))
        trunk_longer.load_state_dict(model.state_dict())
        again = [phase(EPOCHS, **settings)]
        trained(lab, f"trunk on, seed {seed}", plain(trunk_longer), data, again, loss=LAST_ONLY, seed=seed + 100)
        trained(lab, f"joint, seed {seed}", model, data, again, loss=ALL_EXITS, seed=seed + 100)
        trunk_longer.eval()
        last = accuracy(always(model), data.test)[0]
        worse.append(accuracy(plain(trunk_longer), data.test)[0] - last)
        val, test = held(model, data)
        threshold = val.scores[0].quantile(0.82)  # two points above the 80 % that the test images shall reach
        with torch.no_grad():
            model.sites[0].rule.threshold.copy_(threshold)
        leave.append((test.scores[0] <= threshold).double().mean().item())
        loss_.append(last - accuracy(model, data.test)[0])
        speed.append(faster(always(model), model, data.test.x[:512], batch=1, rounds=5))
        auc.append(auroc(test.scores[0], ~test.correct[0]))
    return [
        Claim("with the branch's threshold at the held-out 82 % quantile, this share of test images leaves there", f"{percent(leave)} %",
              ">= 80 %", min(leave) >= 0.8, leave),
        Claim("and accuracy stays near the joint network's last exit", f"{percent(loss_)} points lost", "<= 0.2 points", max(loss_) <= 0.002, loss_,
              "the bound is the paper's for MNIST; Fashion-MNIST is harder"),
        Claim("and time per image falls at batch 1", f"{min(speed):.2f}x (worst seed)", ">= 1.5x", min(speed) >= 1.5, speed),
        Claim("joint training doesn't hurt the last exit, against the same trunk trained as long alone", f"{percent(worse)} points lost",
              "<= 0.3 points (mean of 3 seeds)", sum(worse) / len(worse) <= 0.003, worse),
        Claim("the branch's entropy tells its mistakes from its hits (AUROC)", f"{min(auc):.3f} (worst seed)", ">= 0.85", min(auc) >= 0.85, auc),
    ]  # fmt: skip
