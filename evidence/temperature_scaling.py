"""Temperature scaling of an overfit chain of exits on CIFAR-10, and on which rows a temperature has to be fitted."""

from __future__ import annotations

import torch
from _chains import cifar, four, told_cifar
from _common import held, percent, phase, seeded, trained

from pliant.insight.calibration import calibration
from pliant.reproduce import Claim, Lab, Table
from pliant.tune import calibration_error, fit_temperature

ROWS, EPOCHS, SEEDS = 2_000, 14, (0, 1)
DATA = told_cifar(ROWS, ", 2,000 held-out images; four exits")


def run(lab: Lab) -> list[Claim | Table]:
    data = cifar(lab, ROWS)
    gap, before, after, same, own, pooled, whole, times, rows = ([] for _ in range(9))
    for seed in SEEDS:
        model = seeded(seed, lambda: four(size=2))
        trained(lab, f"seed {seed}", model, data, [phase(EPOCHS, weight_decay=0.0)], seed=seed)
        val, test = held(model, data)
        with torch.no_grad():
            fitted = torch.cat([model.plain(x).argmax(-1) for x in data.train.x.split(500)])
        gap.append((fitted == data.train.y).double().mean().item() - test.correct[-1].double().mean().item())
        t = fit_temperature(val.logits[-1], val.labels)
        before.append(calibration_error(test.logits[-1], test.labels))
        after.append(calibration_error(test.logits[-1] / t, test.labels))
        same.append(float(((test.logits[-1] / t).argmax(-1) != test.logits[-1].argmax(-1)).sum()))
        times.append(fit_temperature(3 * val.logits[-1], val.labels) / t)
        # The surer half leaves at exit 1; exit 2 is fitted on the other half, or on as many of all.
        threshold = val.scores[0].median()
        stay, stay_test = val.scores[0] > threshold, test.scores[0] > threshold
        some = torch.randperm(len(val.labels), generator=torch.Generator().manual_seed(seed))[: int(stay.sum())]
        z, y = test.logits[1][stay_test], test.labels[stay_test]
        for found, chosen in ((own, stay), (pooled, some), (whole, torch.ones_like(stay))):
            found.append(calibration_error(z / fit_temperature(val.logits[1][chosen], val.labels[chosen]), y))
        for k, logits in enumerate(test.logits):
            scaled = logits / fit_temperature(val.logits[k], val.labels)
            raw, new = (calibration(each.softmax(-1), test.labels) for each in (logits, scaled))
            pairs = [getattr(each, name) for name in ("ece", "brier", "nll", "auroc", "aurc") for each in (raw, new)]
            rows.append([f"seed {seed}, exit {k + 1}", raw.accuracy, *pairs])
    return [
        Claim("the network is overfit: training less test accuracy of the last exit", f"{percent(gap)} points", "> 10 points", min(gap) > 0.1, gap),
        Claim("scaling at least halves the last exit's ECE", f"{percent(before)} % to {percent(after)} %", "half or less",
              all(a <= b / 2 for a, b in zip(after, before, strict=True)), [*before, *after]),
        Claim("answers that scaling changes", f"{sum(same):.0f}", "0", not any(same), same),
        Claim("exit 2's ECE on the rows that go on from exit 1, fitted on such rows and on as many of all rows",
              f"{percent(own)} % against {percent(pooled)} %", "lower", all(a < b for a, b in zip(own, pooled, strict=True)), [*own, *pooled],
              f"fitted on all 2,000 held-out rows: {percent(whole)} %"),
        Claim("logits times 3 are undone: fitted temperature over 3 times the one before", f"{max(abs(v / 3 - 1) for v in times):.1e} off", "<= 2 %",
              max(abs(v / 3 - 1) for v in times) <= 0.02, times),
        Table("Calibration of every exit on the test part, before and after scaling; AUROC and AURC are of failure prediction",
              ("exit", "accuracy", "ECE", "ECE scaled", "Brier", "Brier scaled", "NLL", "NLL scaled", "AUROC", "AUROC scaled", "AURC", "AURC scaled"), rows),
    ]  # fmt: skip
