"""Shallow-Deep Network: six internal classifiers on a frozen ResNet-20, Fashion-MNIST."""

from __future__ import annotations

import torch
from _common import ALL_EXITS, LAST_ONLY, always, fashion, held, percent, phase, seeded, told, trained

from pliant import create_model, plain, tune
from pliant.insight.overthinking import auroc, confusion, overthinking
from pliant.reproduce import Claim, Lab
from pliant.study import accuracy, batches

ROWS, EPOCHS, SEEDS = 8_000, 6, (0, 1)
DATA = told(ROWS)


def run(lab: Lab) -> list[Claim]:
    data = fashion(lab, ROWS)
    above, wasteful, destructive, lost, saved, auc_gap, same = [], [], [], [], [], [], []
    for seed in SEEDS:
        model = seeded(seed, lambda: create_model("sdn", in_chans=1, backbone="resnet20", image_size=28))
        trained(lab, f"host, seed {seed}", plain(model), data, [phase(EPOCHS)], loss=LAST_ONLY, seed=seed)
        model.eval()
        with torch.no_grad():
            before = plain(model)(data.test.x[:256])
        heads = tuple(f"heads.{k}.*" for k in range(len(model.sites)))
        only = phase(12, optimizer="adam", lr=1e-3, momentum=0.0, nesterov=False, train=heads, weight_decay=0.0)
        trained(lab, f"exits only, seed {seed}", model, data, [only], loss=ALL_EXITS, seed=seed)
        with torch.no_grad():
            same.append(float(torch.equal(plain(model)(data.test.x[:256]), before)))
        _, test = held(model, data)
        found = overthinking(test.logits.argmax(-1), test.labels)
        final = test.correct[-1].double().mean().item()
        above.append(test.correct.any(0).double().mean().item() - final)
        wasteful.append(found.wasteful)
        destructive.append(found.destructive)
        tune(model, batches(data.val), budget=0.68)
        got, flops, _ = accuracy(model, data.test)
        dense_flops = accuracy(always(model), data.test)[1]
        lost.append(final - got)
        saved.append(1 - flops / dense_flops)
        wrong = ~test.correct[-1]
        doubt = 1 - test.logits[-1].softmax(-1).amax(-1)
        auc_gap.append(auroc(confusion(test.logits), wrong) - auroc(doubt, wrong))
    return [
        Claim("cumulative accuracy (right at any exit) exceeds the final exit's", f"{percent(above)} points", ">= 1.5 points", min(above) >= 0.015, above),
        Claim("the tool reports wasteful over-thinking", f"{percent(wasteful)} %", "reported", True, wasteful),
        Claim("and destructive over-thinking", f"{percent(destructive)} %", "reported", True, destructive),
        Claim("tuned on held-out data to a budget of 68 %, this much is saved", f"{percent(saved)} %", ">= 30 %", min(saved) >= 0.3, saved),
        Claim("and accuracy stays near the final exit's", f"{percent(lost)} points lost", "<= 0.3 points", max(lost) <= 0.003, lost,
              "tried before: 3 epochs for the exits, 0.31 points lost on average"),
        Claim("the confusion score tells final errors as well as the final confidence (AUROC difference)",
              f"{min(auc_gap):+.3f} (worst seed)", ">= -0.02", min(auc_gap) >= -0.02, auc_gap,
              "tried before: 3 epochs for the exits, -0.154"),
        Claim("training the exits alone leaves the host's own output byte-identical", "yes" if all(same) else "no", "yes", all(same), same),
    ]  # fmt: skip
